"""Fingerprints: hashes of the settings that a result depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

from coin_ray.config.fields import PACKAGE, relocate_paths

CLASS_NAMES = {"TrainingConfig": "Optimize"}
"""Names by which fingerprints know config classes that were renamed since."""


def fingerprint(value: Any) -> str:
    """Return twelve hex digits that change if and only if the identity of ``value`` does."""
    text = json.dumps(to_identity(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def to_identity(value: Any) -> Any:
    """Return ``value`` as plain data, without fields that results do not depend on.

    See ``coin_ray.config.fields.runtime_only`` and ``new_field``. Paths of files that
    ship with the package do not depend on where it is installed.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _dataclass_identity(value)
    if isinstance(value, dict):
        return {key: to_identity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_identity(item) for item in value]
    if isinstance(value, str):
        return relocate_paths(value, PACKAGE, "coin_ray")
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1 and 1.0 are the same setting
    return value


def _dataclass_identity(config: Any) -> dict[str, Any]:
    class_name = type(config).__name__
    identity = {"": CLASS_NAMES.get(class_name, class_name)}
    for field in dataclasses.fields(config):
        field_value = getattr(config, field.name)
        if _is_identifying(field, field_value):
            identity[field.name] = to_identity(field_value)
    return identity


def _is_identifying(field: dataclasses.Field[Any], value: Any) -> bool:
    rule = field.metadata.get("identity", True)
    if rule == "if changed":
        return bool(value != field.default)
    return bool(rule)
