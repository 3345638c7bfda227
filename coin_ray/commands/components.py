"""``coin-ray ablate co-detr``: what Co-DETR's components are worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coin_ray.commands.arguments import ExtraOptions
from coin_ray.commands.detector import parse_detector_arguments
from coin_ray.config.detector_training import DEMO_SOURCE
from coin_ray.errors import ConfigError

if TYPE_CHECKING:
    from coin_ray.experiments.components import ComponentStudy


def ablate_components(arguments: Sequence[str], description: str) -> None:
    """Train every variant and print the table."""
    study = parse_component_study(arguments, description)
    from coin_ray.experiments.components import run_component_study

    run_component_study(study)


def parse_component_study(
    arguments: Sequence[str], description: str = ""
) -> ComponentStudy:
    """Read the study's own options, and those of ``coin-ray detector``. Raise
    ConfigError with what to change.
    """
    extra = ExtraOptions("options of the table")
    extra.group.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2"
    )
    extra.group.add_argument(
        "--quick",
        action="store_true",
        help="few steps and one seed: does it run? The figures mean nothing",
    )
    study_options, detector_arguments = extra.parser.parse_known_args(list(arguments))
    option_names = [argument.partition("=")[0] for argument in detector_arguments]
    if "--data" not in option_names:
        detector_arguments += ["--data", DEMO_SOURCE]
    config, options = parse_detector_arguments(
        detector_arguments, "coin-ray ablate co-detr", extra.describe(description)
    )
    if config.model != "co-detr":
        raise ConfigError(
            f"the table is about Co-DETR: leave out --model {config.model}"
        )
    if config.seed:
        raise ConfigError(
            "the table has several seeds: give --seeds 0 1 2 instead of --seed"
        )
    from coin_ray.experiments.components import (
        QUICK_SCENES,
        ComponentStudy,
        build_component_trials,
        shorten_detector_training,
    )

    if study_options.quick:
        trials = build_component_trials(
            shorten_detector_training(config), study_options.seeds[:1], QUICK_SCENES
        )
    else:
        trials = build_component_trials(config, study_options.seeds)
    return ComponentStudy(trials, options.root, options.dry_run)
