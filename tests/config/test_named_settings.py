"""Settings that the package's messages and docstrings name exist."""

from __future__ import annotations

import ast
import dataclasses
import re
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

import coin_ray
from coin_ray.config import PipelineConfig
from coin_ray.config.detector_training import DetectorConfig
from coin_ray.config.yaml_files import REMOVED_SETTINGS, RENAMED_SETTINGS

PACKAGE = Path(coin_ray.__file__).parent
FILE_SUFFIXES = (".parquet", ".pt", ".json", ".yaml", ".yml", ".xml")
OTHER_NAMES = {
    "coin_ray/cloud/adapters": "fields of a service's response",
    "coin_ray/data/review/label_studio.py": "fields of an export",
}
"""Folders and files in which dotted names are no settings, by path below the repository.
"""


def _setting_names(config_class: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all settings, and of the sections that hold them."""
    types = typing.get_type_hints(config_class)
    for field in dataclasses.fields(config_class):
        name = prefix + field.name
        yield name
        field_type = types[field.name]
        for part in (field_type, *typing.get_args(field_type)):
            if isinstance(part, type) and dataclasses.is_dataclass(part):
                yield from _setting_names(part, f"{name}.")


SETTINGS = {*_setting_names(PipelineConfig), *_setting_names(DetectorConfig)}
SECTIONS = sorted({name.split(".")[0] for name in SETTINGS if "." in name})
SETTING_PATTERN = re.compile(
    r"(?<![\w./:-])(?:--)?((?:"
    + "|".join(section.replace("_", "[_-]") for section in SECTIONS)
    + r")(?:\.[a-z][\w-]*)+)"
)


def _named_settings(text: str) -> Iterator[str]:
    """Yield the settings that a text names, as in ``--cloud.max-usd`` or cloud.max_usd."""
    for match in SETTING_PATTERN.finditer(text):
        if not match[1].endswith(FILE_SUFFIXES):
            # a Boolean setting foo.bar is turned off by --foo.no-bar
            yield re.sub(r"\.no_", ".", match[1].replace("-", "_"))


def _texts(file: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _is_checked(file: Path) -> bool:
    path = file.relative_to(PACKAGE.parent).as_posix()
    return not path.startswith(tuple(OTHER_NAMES))


FILES = [file for file in sorted(PACKAGE.rglob("*.py")) if _is_checked(file)]


@pytest.mark.parametrize(
    ("text", "settings"),
    [
        ("give --cloud.serve-latency 0", ["cloud.serve_latency"]),
        ("distill.fit.workers must be 1", ["distill.fit.workers"]),
        ("turn it off by --tracking.no-enabled", ["tracking.enabled"]),
        ("--cloud.no-such-setting", ["cloud.such_setting"]),
        ("reads cloud.parquet and config/cloud.py", []),
    ],
)
def test_settings_are_found_in_texts(text: str, settings: list[str]) -> None:
    assert list(_named_settings(text)) == settings


def test_the_scan_finds_settings_in_the_package() -> None:
    settings = {
        s for file in FILES for text in _texts(file) for s in _named_settings(text)
    }
    assert len(settings) > 50
    assert "cloud.max_usd" in settings


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_every_named_setting_exists(file: Path) -> None:
    earlier = {*RENAMED_SETTINGS, *REMOVED_SETTINGS}
    for text in _texts(file):
        for setting in _named_settings(text):
            assert setting in SETTINGS | earlier, f"{setting} is named in {text!r}"


def test_earlier_settings_exist_no_more() -> None:
    assert not SETTINGS & {*RENAMED_SETTINGS, *REMOVED_SETTINGS}
    assert set(RENAMED_SETTINGS.values()) <= SETTINGS
