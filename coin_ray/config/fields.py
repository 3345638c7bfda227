"""Kinds of fields, checks and package paths that all settings share."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Any

from coin_ray.errors import ConfigError

PACKAGE = str(Path(__file__).parents[1])
"""Folder where the package is installed."""
IN_PACKAGE = "{coin_ray}"
"""Stands for that folder in config files, since another machine has another one."""


def runtime_only(default: Any) -> Any:
    """Return a field that does not change results and is not part of a fingerprint."""
    return field(default=default, metadata={"identity": False})


def new_field(default: Any) -> Any:
    """Return a field that was added later: part of a fingerprint unless at its default.

    Results of earlier versions, which did not have the field, so stay valid.
    """
    return field(default=default, metadata={"identity": "if changed"})


def relocate_paths(value: Any, old: str, new: str) -> Any:
    """Return a config, or plain data, with ``new`` for ``old`` in paths below ``old``.

    A path may have a prefix with a colon, as in ``open_clip:/FILE``.
    """
    if old == new:
        return value
    if isinstance(value, str):
        return _relocate_path(value, old, new)
    if isinstance(value, dict):
        return {key: relocate_paths(item, old, new) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(relocate_paths(item, old, new) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        relocated_fields = {
            f.name: relocate_paths(getattr(value, f.name), old, new)
            for f in dataclasses.fields(value)
        }
        return type(value)(**relocated_fields)
    return value


def _relocate_path(text: str, old: str, new: str) -> str:
    prefix, colon, path = text.rpartition(":")
    if path != old and not path.startswith(f"{old}/"):
        return text
    return prefix + colon + new + path.removeprefix(old)


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with the message if the condition does not hold."""
    if not condition:
        raise ConfigError(message)


def check_fraction(setting: str, share: float) -> None:
    """Raise ConfigError if a setting does not lie in 0..1."""
    require(0 <= share <= 1, f"{setting} must lie in 0..1; got {share}")
