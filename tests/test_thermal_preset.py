"""One folder gives the preset ``thermal`` all it reads."""

from __future__ import annotations

from pathlib import Path

import pytest

from coin_ray.cli import parse
from coin_ray.config import Folder
from coin_ray.configfile import to_yaml
from coin_ray.errors import ConfigError


def test_every_path_is_below_the_assets(tmp_path: Path) -> None:
    config, _ = parse(("thermal", "--assets", str(tmp_path)))
    data = config.data
    assert isinstance(data, Folder)
    paths = (data.images, data.test, config.mobilenet.text_vectors, *config.cloud.onnx_models)
    assert all(path is not None and path.startswith(f"{tmp_path}/") for path in paths)
    assert (config.collect.labeler, config.detector.backbone) == ("none", "mobilenet_v2")


def test_a_relative_folder_becomes_absolute_and_settings_come_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, _ = parse(("thermal", "--assets", "here", "--test", "elsewhere"))
    assert config.data == Folder(images=f"{tmp_path}/here/data/thermal/train", test="elsewhere")


def test_the_written_config_needs_no_assets(tmp_path: Path) -> None:
    config, _ = parse(("thermal", "--assets", str(tmp_path)))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse(("--config", str(tmp_path / "config.yaml")))[0] == config


@pytest.mark.parametrize("arguments", [("thermal",), ("demo", "--assets", "x")])
def test_assets_are_for_thermal_and_thermal_needs_them(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="thermal --assets DIR"):
        parse(arguments)
