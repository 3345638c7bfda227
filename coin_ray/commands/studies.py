"""``coin-ray compare PRESET`` and ``coin-ray ablate PRESET``: studies over several seeds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coin_ray.commands.arguments import ExtraOptions
from coin_ray.errors import ConfigError

if TYPE_CHECKING:
    from coin_ray.experiments.studies import StudyRequest

QUICK_SHARE = 0.1
"""Share of the training steps with ``--quick``."""
COMPARE = """\
Compare the fusion rules on inconsistent boxes, where the teachers disagree: one teacher,
rules, Dawid-Skene, CKG; with the published threshold and a fair one.

    coin-ray compare demo [--seeds 0 1 2] [--quick] [--dry-run]

Shares images, answers and trained teachers with other runs below the same --root.
Results: ROOT/fusion.{json,md,svg} and MLflow.
"""
ABLATE = """\
Measure what each loss and each stage is worth: COIN with one of them left out, over
several seeds.

    coin-ray ablate demo [--seeds 0 1 2] [--quick] [--dry-run]
    coin-ray ablate co-detr [--data coco:DIR --classes person,dog] [--seeds 0 1 2] [--quick]

Shares images, answers and trained teachers with other runs below the same --root.
Results: ROOT/ablation.{json,md,svg} and MLflow. co-detr: what Co-DETR's auxiliary heads
and positive queries are worth, on the demo's source scenes or on labelled images, with
the settings of coin-ray detector. Results: ROOT/components.{json,md}.
"""


def compare(arguments: Sequence[str]) -> None:
    """Compare the fusion rules."""
    request = parse_study(arguments, "coin-ray compare", COMPARE)
    from coin_ray.experiments.studies import run_fusion_study
    from coin_ray.experiments.tuning import run_jobs_with_tune

    run_fusion_study(request, run_jobs_with_tune)


def ablate(arguments: Sequence[str]) -> None:
    """Leave out each loss and each stage, or each component of Co-DETR."""
    if arguments[:1] == ["co-detr"]:
        from coin_ray.commands.components import ablate_components

        ablate_components(arguments[1:], ABLATE)
        return
    request = parse_study(arguments, "coin-ray ablate", ABLATE)
    from coin_ray.experiments.studies import run_ablation
    from coin_ray.experiments.tuning import run_jobs_with_tune

    run_ablation(request, run_jobs_with_tune)


def parse_study(
    arguments: Sequence[str], program: str, description: str
) -> StudyRequest:
    """Read the study's own options, and the preset's settings as for ``adapt``. Raise
    ConfigError with what to change.
    """
    extra = _study_options()
    study_options, config, options = extra.parse(arguments, program, description)
    if options.until is not None or options.baselines:
        raise ConfigError(
            "a study decides itself what runs: leave out --until and --baselines"
        )
    if config.seed:
        raise ConfigError(
            "a study has several seeds: give --seeds 0 1 2 instead of --seed"
        )
    seeds = study_options.seeds
    if study_options.quick and seeds == [0, 1, 2]:
        seeds = [0, 1]
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds must differ; got {seeds}")
    for name, share in (
        ("--share", study_options.share),
        ("--steps-share", study_options.steps_share),
    ):
        if not 0 < share <= 1:
            raise ConfigError(f"{name} must lie in 0..1, and above 0; got {share}")
    from coin_ray.experiments.studies import StudyRequest
    from coin_ray.experiments.variants import shorten_training

    steps_share = study_options.steps_share
    if study_options.quick:
        steps_share *= QUICK_SHARE
    if steps_share != 1:
        config = shorten_training(config, steps_share)
    return StudyRequest(
        config, options.root, tuple(seeds), study_options.share, options.dry_run
    )


def _study_options() -> ExtraOptions:
    extra = ExtraOptions("options of the study")
    extra.group.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2"
    )
    extra.group.add_argument(
        "--quick",
        action="store_true",
        help=(
            "a tenth of the training steps and seeds 0 1: does it run? The figures mean"
            " nothing"
        ),
    )
    extra.group.add_argument(
        "--steps-share",
        type=float,
        default=1.0,
        help="share of all training steps to make",
    )
    extra.group.add_argument(
        "--share",
        type=float,
        default=0.5,
        help="fair thresholds: share of the inconsistent boxes that teach (default .5)",
    )
    return extra
