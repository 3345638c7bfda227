"""Configs as YAML, strictly: unknown keys are errors. And what of a config identifies a
result.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from coin_ray.config import IN_PACKAGE, PACKAGE, PipelineConfig, relocate_paths
from coin_ray.errors import ConfigError
from coin_ray.storage import read_bytes

MOVED = {"separate.cloud_vectors": "labels.cloud_vectors"}
"""Old names of settings, which older config files hold."""


def to_yaml(config: Any) -> str:
    """Of a dataclass of plain values; files that ship with the package are named from
    there.
    """
    plain = relocate_paths(
        json.loads(json.dumps(dataclasses.asdict(config))), PACKAGE, IN_PACKAGE
    )
    return yaml.safe_dump(plain, sort_keys=False)


def from_yaml(uri: str) -> PipelineConfig:
    """Read a whole config as written by ``to_yaml``. Raises ConfigError naming the
    file, the key and what was expected.
    """
    try:
        values = yaml.safe_load(read_bytes(uri))
    except FileNotFoundError as error:
        raise ConfigError(f"no config file at {uri}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{uri} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(
            f"{uri}: expected a mapping of settings, got {type(values).__name__}"
        )
    return from_dict(values, uri)


def from_dict(values: dict[str, Any], origin: str) -> PipelineConfig:
    """``origin`` names the values in an error."""
    try:
        return _adapter().validate_python(
            _moved(relocate_paths(values, IN_PACKAGE, PACKAGE))
        )
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}"
            for e in error.errors()[:5]
        )
        raise ConfigError(f"{origin}: {problems}") from error


def _moved(values: dict[str, Any]) -> dict[str, Any]:
    """Settings by the names they have now."""
    for old, new in MOVED.items():
        (old_part, old_name), (new_part, new_name) = old.split("."), new.split(".")
        part = values.get(old_part)
        if isinstance(part, dict) and old_name in part:
            target = values.get(new_part) or {}
            kept = {k: v for k, v in part.items() if k != old_name}
            values = values | {
                old_part: kept,
                new_part: {new_name: part[old_name]} | target,
            }
    return values


def _adapter() -> TypeAdapter[PipelineConfig]:
    for kind in _config_types():
        kind.__pydantic_config__ = ConfigDict(extra="forbid")
    return TypeAdapter(PipelineConfig)


def _config_types() -> list[Any]:
    import coin_ray.config as module

    return [
        k
        for k in vars(module).values()
        if dataclasses.is_dataclass(k) and isinstance(k, type)
    ]


def identity(value: Any) -> Any:
    """``value`` as plain data without the fields that only say how it runs
    (``coin_ray.config.execution``).

    Of files that ship with the package, where it is installed is no part either.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kept = [
            f for f in dataclasses.fields(value) if _counts(f, getattr(value, f.name))
        ]
        return {"": _class_name(value)} | {
            f.name: identity(getattr(value, f.name)) for f in kept
        }
    if isinstance(value, dict):
        return {key: identity(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [identity(item) for item in value]
    if isinstance(value, str):
        return relocate_paths(value, PACKAGE, "coin_ray")
    if isinstance(value, float) and value.is_integer():
        return int(value)  # 1 and 1.0 are the same setting
    return value


CLASS_NAMES_IN_FINGERPRINTS = {"TrainingConfig": "Optimize"}
"""Earlier names of config classes, which the fingerprints of finished steps hold."""


def _class_name(config: Any) -> str:
    """Return the name by which a fingerprint knows the class of ``config``."""
    name = type(config).__name__
    return CLASS_NAMES_IN_FINGERPRINTS.get(name, name)


def _counts(field: dataclasses.Field[Any], value: Any) -> bool:
    rule = field.metadata.get("identity", True)
    return value != field.default if rule == "if changed" else bool(rule)


def fingerprint(value: Any) -> str:
    """Twelve hex digits that change if and only if the identity of ``value`` does."""
    text = json.dumps(identity(value), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
