"""Configs as YAML files. Reading is strict: unknown keys are errors."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from coin_ray.config import IN_PACKAGE, PACKAGE, PipelineConfig, relocate_paths
from coin_ray.config.class_prompts import parse_class_prompts
from coin_ray.errors import ConfigError
from coin_ray.storage import read_bytes

NestedSettings = dict[str, Any]
"""Settings by name; those of a section are a mapping of their own."""

RENAMED_SETTINGS = {"separate.cloud_vectors": "labels.cloud_vectors"}
"""Current names by earlier names, which older config files hold."""
REMOVED_SETTINGS = {
    "distill.schedule": (
        "the population search, whose schedules this setting held, was removed in this"
        " version"
    ),
}
"""Reasons by settings that older config files hold; they are ignored while empty."""
MAX_PROBLEMS = 5
"""Problems of a config file that one error message lists."""


def to_yaml(config: Any) -> str:
    """Serialise a config dataclass as YAML.

    Paths of files that ship with the package are written relative to the package.
    """
    plain = json.loads(json.dumps(dataclasses.asdict(config)))
    return yaml.safe_dump(relocate_paths(plain, PACKAGE, IN_PACKAGE), sort_keys=False)


def read_config(uri: str) -> PipelineConfig:
    """Read a config file written with ``to_yaml``.

    Raises ConfigError naming the file, the setting and what was expected.
    """
    try:
        settings = yaml.safe_load(read_bytes(uri))
    except FileNotFoundError as error:
        raise ConfigError(f"no config file at {uri}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{uri} is not YAML: {error}") from error
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{uri}: expected a mapping of settings, got {type(settings).__name__}"
        )
    return parse_config(settings, uri)


def is_class_file(text: str) -> bool:
    """Return whether this is the name of a YAML file, not of a class."""
    return text.lower().endswith((".yaml", ".yml"))


def with_class_file(config: PipelineConfig, uri: str) -> PipelineConfig:
    """Return the config with the classes of a YAML file: their phrases, descriptions,
    negatives and least scores (docs/classes.md).
    """
    try:
        settings = yaml.safe_load(read_bytes(uri))
    except FileNotFoundError as error:
        raise ConfigError(f"no file of classes at {uri}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{uri} is not YAML: {error}") from error
    return with_classes(config, settings, uri)


def with_classes(config: PipelineConfig, settings: Any, origin: str) -> PipelineConfig:
    """Return the config with classes as ``parse_class_prompts`` reads them."""
    classes, prompts, class_score_min = parse_class_prompts(settings, origin)
    labels = dataclasses.replace(config.labels, class_score_min=class_score_min)
    return dataclasses.replace(
        config, classes=classes, class_prompts=prompts, labels=labels
    )


def parse_config(settings: NestedSettings, origin: str) -> PipelineConfig:
    """Build the config from nested dicts of settings.

    Raises ConfigError naming ``origin``, the setting and what was expected.
    """
    local_settings = relocate_paths(settings, IN_PACKAGE, PACKAGE)
    current_settings = _apply_renames(_drop_removed(local_settings, origin))
    try:
        return _config_adapter().validate_python(current_settings)
    except ValidationError as error:
        problems = [
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
            for problem in error.errors()[:MAX_PROBLEMS]
        ]
        raise ConfigError(f"{origin}: {'; '.join(problems)}") from error


def _drop_removed(settings: NestedSettings, origin: str) -> NestedSettings:
    """Return the settings without removed ones; raise ConfigError if one has a value."""
    for setting, reason in REMOVED_SETTINGS.items():
        section_name, name = setting.split(".")
        section = settings.get(section_name)
        if not isinstance(section, dict) or name not in section:
            continue
        if section[name]:
            raise ConfigError(
                f"{origin}: {setting} is no longer a setting: {reason}. Remove it, or use"
                " the version that wrote the file"
            )
        remaining = {key: section[key] for key in section if key != name}
        settings = settings | {section_name: remaining}
    return settings


def _apply_renames(settings: NestedSettings) -> NestedSettings:
    """Return the settings by their current names; a current name takes precedence."""
    for old, new in RENAMED_SETTINGS.items():
        old_section, old_name = old.split(".")
        new_section, new_name = new.split(".")
        section = settings.get(old_section)
        if not isinstance(section, dict) or old_name not in section:
            continue
        remaining = {name: section[name] for name in section if name != old_name}
        moved = {new_name: section[old_name]} | (settings.get(new_section) or {})
        settings = settings | {old_section: remaining, new_section: moved}
    return settings


def _config_adapter() -> TypeAdapter[PipelineConfig]:
    for config_class in _config_classes():
        config_class.__pydantic_config__ = ConfigDict(extra="forbid")
    return TypeAdapter(PipelineConfig)


def _config_classes() -> list[Any]:
    import coin_ray.config

    exported = vars(coin_ray.config).values()
    return [c for c in exported if isinstance(c, type) and dataclasses.is_dataclass(c)]
