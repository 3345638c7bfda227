"""What a search needs, and whether it is there. Imports nothing heavy."""

from __future__ import annotations

from importlib.util import find_spec

from coin_ray.config import DemoScenes, PipelineConfig
from coin_ray.errors import ConfigError

PACKAGES = {
    "optuna": ("optuna",),
    "random": (),
    "bohb": ("hpbandster", "ConfigSpace"),
    "population": (),
}
"""What must be importable, by algorithm."""


def check_installed(algorithm: str) -> None:
    """Raises ConfigError naming what to install."""
    missing = [name for name in PACKAGES[algorithm] if find_spec(name) is None]
    if missing:
        install = (
            "coin-ray[search]"
            if algorithm == "optuna"
            else " ".join(PACKAGES[algorithm])
        )
        raise ConfigError(
            f"--algorithm {algorithm} needs {', '.join(missing)}: pip install"
            f" '{install}', or give --algorithm random, which needs nothing"
        )


def random_starts(trials: int) -> int:
    """Trials drawn at random before a model of them is believed: a quarter, at least
    four.
    """
    return max(4, trials // 4)


def has_validation(config: PipelineConfig) -> bool:
    """Whether the configuration names labelled validation images."""
    return (
        config.data.val > 0
        if isinstance(config.data, DemoScenes)
        else config.data.val is not None
    )
