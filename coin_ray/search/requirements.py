"""What a search requires of the installation and of the data. Imports nothing heavy."""

from __future__ import annotations

from importlib.util import find_spec

from coin_ray.config import DemoScenes, PipelineConfig
from coin_ray.errors import ConfigError

ALGORITHM_PACKAGES: dict[str, tuple[str, ...]] = {
    "optuna": ("optuna",),
    "random": (),
}
"""Optional packages that each algorithm imports."""


def check_algorithm_installed(algorithm: str) -> None:
    """Raise ConfigError with the command to run if the algorithm's packages are missing."""
    packages = ALGORITHM_PACKAGES[algorithm]
    missing_packages = [name for name in packages if find_spec(name) is None]
    if missing_packages:
        raise ConfigError(
            f"--algorithm {algorithm} needs {', '.join(missing_packages)}: run pip"
            " install 'coin-ray[search]', or give --algorithm random, which needs"
            " nothing"
        )


def count_random_trials(trials: int) -> int:
    """Return how many of ``trials`` optuna draws at random before it trusts its model:
    a quarter, at least four.
    """
    return max(4, trials // 4)


def has_validation_images(config: PipelineConfig) -> bool:
    """Return whether the configuration names labelled validation images."""
    if isinstance(config.data, DemoScenes):
        return config.data.val > 0
    return config.data.val is not None
