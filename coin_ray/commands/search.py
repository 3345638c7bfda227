"""``coin-ray search PRESET [options of the search] [settings of the preset]``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coin_ray.commands.arguments import ExtraOptions
from coin_ray.errors import ConfigError
from coin_ray.search.requirements import (
    ALGORITHM_PACKAGES,
    check_algorithm_installed,
    has_validation_images,
)
from coin_ray.search.space import SPACES

if TYPE_CHECKING:
    from coin_ray.search.plan import Search

DESCRIPTION = """\
Search the settings of the distillation: loss weights, fusion, thresholds, learning
rates, the teacher's rate, augmentation.

    coin-ray search demo --space fusion --trials 16
    coin-ray search demo --space fusion --trials 16 --resume
    coin-ray search folder --images DIR --val LABELLED_DIR --classes person,dog --cloud https://detector.example.com

Shares images, answers and trained teachers with other runs below the same --root.
Results: ROOT/search/SPACE-OBJECTIVE and MLflow.
"""


@dataclass(frozen=True)
class SearchRequest:
    search: Search
    resume: bool
    dry_run: bool


def search(arguments: Sequence[str]) -> None:
    """Run the search; with ``--dry-run`` print what it would do."""
    request = parse_search(arguments)
    from coin_ray.search.run import print_search_plan, run_search

    if request.dry_run:
        print_search_plan(request.search)
        return
    check_algorithm_installed(request.search.algorithm)
    from coin_ray.search.page import write_page
    from coin_ray.search.tuner import run_trials_with_tune

    run_search(request.search, run_trials_with_tune, resume=request.resume)
    print(f"page: {write_page(request.search.folder)}")


def parse_search(arguments: Sequence[str]) -> SearchRequest:
    """Read the search's own options, and the preset's settings as for ``adapt``. Raise
    ConfigError with what to change.
    """
    extra = _search_options()
    search_options, config, options = extra.parse(
        arguments, "coin-ray search", DESCRIPTION
    )
    if options.until is not None or options.baselines:
        raise ConfigError(
            "a search decides itself what runs: leave out --until and --baselines"
        )
    for name, choice, choices in (
        ("algorithm", search_options.algorithm, ALGORITHM_PACKAGES),
        ("space", search_options.space, SPACES),
    ):
        if choice not in choices:
            raise ConfigError(
                f"--{name} must be one of {', '.join(choices)}; got {choice!r}"
            )
    objective = search_options.objective
    if objective == "auto":
        objective = "map50" if has_validation_images(config) else "label-free"
    from coin_ray.search.plan import Search

    search = Search(
        config,
        options.root,
        search_options.space,
        objective,
        search_options.algorithm,
        search_options.scheduler,
        search_options.trials,
        search_options.steps_share,
        _parse_concurrent(search_options.concurrent),
    )
    return SearchRequest(search, search_options.resume, options.dry_run)


def _parse_concurrent(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.isdigit():
        raise ConfigError(f"--concurrent must be a number or auto; got {text!r}")
    return int(text)


def _search_options() -> ExtraOptions:
    extra = ExtraOptions("options of the search")
    extra.group.add_argument(
        "--space",
        default="loss-weights",
        help=f"what is varied: {', '.join(SPACES)} (default: loss-weights)",
    )
    extra.group.add_argument(
        "--objective",
        default="auto",
        choices=["auto", "map50", "label-free"],
        help=(
            "auto (default): mAP50 if there are labelled validation images (--val),"
            " else a score without labels"
        ),
    )
    extra.group.add_argument(
        "--algorithm",
        default="optuna",
        help=f"{', '.join(ALGORITHM_PACKAGES)} (default: optuna)",
    )
    extra.group.add_argument(
        "--scheduler",
        default="asha",
        choices=["asha", "none"],
        help="asha (default) stops bad trials early",
    )
    extra.group.add_argument(
        "--trials",
        type=int,
        default=16,
        help="default: 16; the first is the preset as it is",
    )
    extra.group.add_argument(
        "--concurrent",
        default="auto",
        help=(
            "trials at once; auto (default): one for each CPU (GPU, with"
            " --distill.fit.gpu)"
        ),
    )
    extra.group.add_argument(
        "--steps-share",
        type=float,
        default=1.0,
        help="share of the distillation's steps that each trial makes (default: 1)",
    )
    extra.group.add_argument(
        "--resume",
        action="store_true",
        help="continue a search that was stopped or killed; all else as it was",
    )
    return extra
