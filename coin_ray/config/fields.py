"""Kinds of fields, checks and package paths that all settings share."""

from __future__ import annotations

import dataclasses
from dataclasses import field
from pathlib import Path
from typing import Any

from coin_ray.errors import ConfigError


def runtime_only(default: Any) -> Any:
    """A field that says how something runs, not what comes out; it is no part of a
    step's identity.
    """
    return field(default=default, metadata={"identity": False})


def new_field(default: Any) -> Any:
    """A field that came later: at its default it is no part of an identity, so what was
    made before still counts.
    """
    return field(default=default, metadata={"identity": "if changed"})


PACKAGE = str(Path(__file__).parents[1])


IN_PACKAGE = "{coin_ray}"
"""Stands in files for where the package is installed, which is another place on another
machine."""


def relocate_paths(value: Any, old: str, new: str) -> Any:
    """A config, or plain data, whose paths below ``old`` lie below ``new``. A kind may
    stand before a path, as in ``open_clip:/FILE``.
    """
    if old == new:
        return value
    if isinstance(value, str):
        kind, colon, path = value.rpartition(":")
        return (
            kind + colon + new + path.removeprefix(old)
            if path == old or path.startswith(f"{old}/")
            else value
        )
    if isinstance(value, dict):
        return {key: relocate_paths(item, old, new) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(relocate_paths(item, old, new) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {
            f.name: relocate_paths(getattr(value, f.name), old, new)
            for f in dataclasses.fields(value)
        }
        return type(value)(**changed)
    return value


def check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def check_fraction(name: str, value: float) -> None:
    check(0 <= value <= 1, f"{name} must lie in 0..1; got {value}")
