"""What a search varies: settings of the distillation by dotted name, each with its
range around the preset's own value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from coin_ray.config import FusionRule, PipelineConfig
from coin_ray.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Real:
    """A number in ``low..high``, drawn evenly or, with ``log``, evenly in its
    logarithm.
    """

    low: float
    high: float
    log: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """One of ``values``."""

    values: tuple[str, ...]


Domain = Real | Choice
Space = dict[str, Domain]
Settings = Mapping[str, Any]
"""A value for each name of a space."""


def loss_weights(config: PipelineConfig) -> Space:
    """Return the weights of the alignment [lambda], of inconsistent [gamma 1] and of
    private boxes [gamma 2].
    """
    return _ranges_around(
        config,
        {"distill.alignment": 8, "distill.inconsistent": 8, "distill.private": 8},
    )


def augment(config: PipelineConfig) -> Space:
    """Return the strength of the strong augmentation's colour changes, and the weight
    decay.
    """
    strength: Space = {"distill.fit.augmentation": Real(0.0, 2.0)}
    return strength | _ranges_around(config, {"distill.fit.weight_decay": 5})


def fusion(config: PipelineConfig) -> Space:
    """Return the rule that supervises inconsistent boxes, the probability from which it
    does [pi], and its weight [gamma 1].
    """
    rules: Space = {
        "distill.fusion": Choice(get_args(FusionRule)),
        "distill.fusion_score_min": Real(0.0, 0.9),
    }
    return rules | _ranges_around(config, {"distill.inconsistent": 8})


def full(config: PipelineConfig) -> Space:
    """Return all of these, learning rates, the teacher's rate [1 - eta], and the
    thresholds of the separation.
    """
    rates = {
        "distill.fit.lr": 4,
        "distill.fit.visual_lr_factor": 4,
        "distill.ckg_lr": 4,
        "distill.teacher_rate": 10,
    }
    thresholds: Space = {
        "separate.iou_min": Real(0.35, 0.7),
        "separate.clip_score_min": Real(0.02, 0.5),
    }
    space = loss_weights(config) | augment(config) | fusion(config)
    return space | _ranges_around(config, rates) | thresholds


SPACES: dict[str, Callable[[PipelineConfig], Space]] = {
    "loss-weights": loss_weights,
    "augment": augment,
    "fusion": fusion,
    "full": full,
}


def build_space(name: str, config: PipelineConfig) -> Space:
    """Return the named space, widened to include the config's own values. Raise
    ConfigError for an unknown name, or if a setting would have no effect.
    """
    if name not in SPACES:
        raise ConfigError(f"--space must be one of {', '.join(SPACES)}; got {name!r}")
    space = {
        setting: _widened(domain, get_setting(config, setting))
        for setting, domain in SPACES[name](config).items()
    }
    if "distill.fusion_score_min" in space and config.distill.fusion_share is not None:
        raise ConfigError(
            f"--space {name} searches distill.fusion_score_min, which"
            " distill.fusion_share overrides: leave the latter out"
        )
    if not space:
        raise ConfigError(
            f"--space {name}: all its settings are switched off (0) in this"
            " configuration; there is nothing to search"
        )
    return space


def get_setting(config: Any, name: str) -> Any:
    """Return the setting with this dotted name."""
    for field_name in name.split("."):
        config = getattr(config, field_name)
    return config


def apply_settings(config: PipelineConfig, settings: Settings) -> PipelineConfig:
    """Return the config with these settings replaced, checked like any other. Raise
    ConfigError.
    """
    for name, setting in settings.items():
        config = _replace_setting(config, name.split("."), setting)
    return config


def preset_settings(config: PipelineConfig, space: Space) -> dict[str, Any]:
    """Return the config's own values, with which every search begins."""
    return {name: get_setting(config, name) for name in space}


def _replace_setting(config: Any, path: list[str], setting: Any) -> Any:
    field_name, *inner_path = path
    if inner_path:
        setting = _replace_setting(getattr(config, field_name), inner_path, setting)
    return replace(config, **{field_name: setting})


def _ranges_around(config: PipelineConfig, factors: Mapping[str, float]) -> Space:
    """Return ranges from setting / factor to setting x factor; a setting that is
    switched off (0) is left out.
    """
    space: Space = {}
    for name, factor in factors.items():
        present = float(get_setting(config, name))
        if present > 0:
            space[name] = Real(present / factor, present * factor, log=True)
    return space


def _widened(domain: Domain, present: Any) -> Domain:
    if isinstance(domain, Choice):
        return domain
    return replace(domain, low=min(domain.low, present), high=max(domain.high, present))
