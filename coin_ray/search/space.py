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


CHANGEABLE = frozenset({"distill.alignment", "distill.inconsistent", "distill.private"})
"""Settings that are read anew at every step, so that they can change within a training
(``coin_ray.config.Change``)."""
Space = dict[str, Real | Choice]
Settings = Mapping[str, Any]
"""A value for each name of a space."""


def loss_weights(config: PipelineConfig) -> Space:
    """Weights of the alignment [lambda], of inconsistent [gamma 1] and of private boxes
    [gamma 2].
    """
    return _around(
        config,
        {"distill.alignment": 8, "distill.inconsistent": 8, "distill.private": 8},
    )


def augment(config: PipelineConfig) -> Space:
    """Strength of the strong view's colour changes, and weight decay."""
    return {"distill.fit.augmentation": Real(0.0, 2.0)} | _around(
        config, {"distill.fit.weight_decay": 5}
    )


def fusion(config: PipelineConfig) -> Space:
    """Who supervises inconsistent boxes, from which certainty on [pi], and with which
    weight [gamma 1].
    """
    rules: Space = {
        "distill.fusion": Choice(get_args(FusionRule)),
        "distill.fusion_score_min": Real(0.0, 0.9),
    }
    return rules | _around(config, {"distill.inconsistent": 8})


def full(config: PipelineConfig) -> Space:
    """All of these, learning rates, the teacher's rate [1 - eta], and the thresholds of
    the separation.
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
    return (
        loss_weights(config)
        | augment(config)
        | fusion(config)
        | _around(config, rates)
        | thresholds
    )


SPACES: dict[str, Callable[[PipelineConfig], Space]] = {
    "loss-weights": loss_weights,
    "augment": augment,
    "fusion": fusion,
    "full": full,
}


def space_of(name: str, config: PipelineConfig) -> Space:
    """The named space; the config's own values lie in it. Raises ConfigError for an
    unknown name, or if a setting would have no effect.
    """
    if name not in SPACES:
        raise ConfigError(f"--space must be one of {', '.join(SPACES)}; got {name!r}")
    space = {
        key: _with(domain, value(config, key))
        for key, domain in SPACES[name](config).items()
    }
    if "distill.fusion_score_min" in space and config.distill.fusion_share is not None:
        raise ConfigError(
            f"--space {name} searches distill.fusion_score_min, which"
            " distill.fusion_share overrides: leave the latter out"
        )
    changed = sorted(space.keys() & CHANGEABLE)
    if changed and config.distill.schedule:
        raise ConfigError(
            f"--space {name} searches {', '.join(changed)}, which distill.schedule"
            " changes on the way: leave the latter out"
        )
    if not space:
        raise ConfigError(
            f"--space {name}: all its settings are switched off (0) in this"
            " configuration; there is nothing to search"
        )
    return space


def value(config: Any, name: str) -> Any:
    """The setting with this dotted name."""
    for part in name.split("."):
        config = getattr(config, part)
    return config


def apply(config: PipelineConfig, settings: Settings) -> PipelineConfig:
    """The config with these settings replaced, checked like any other. Raises
    ConfigError.
    """
    for name, new in settings.items():
        config = _replaced(config, name.split("."), new)
    return config


def start(config: PipelineConfig, space: Space) -> dict[str, Any]:
    """The config's own values: where every search begins."""
    return {name: value(config, name) for name in space}


def _replaced(item: Any, path: list[str], new: Any) -> Any:
    head, *rest = path
    return replace(
        item, **{head: _replaced(getattr(item, head), rest, new) if rest else new}
    )


def _around(config: PipelineConfig, factors: Mapping[str, float]) -> Space:
    """From value / factor to value x factor; what is switched off (0) stays off."""
    return {
        name: Real(v / f, v * f, log=True)
        for name, f in factors.items()
        if (v := float(value(config, name))) > 0
    }


def _with(domain: Real | Choice, present: Any) -> Real | Choice:
    return (
        replace(domain, low=min(domain.low, present), high=max(domain.high, present))
        if isinstance(domain, Real)
        else domain
    )
