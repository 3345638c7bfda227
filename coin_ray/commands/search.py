"""The command line of a search: ``search.py PRESET [options of the search] [settings of
the preset]``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coin_ray.commands.arguments import parse, reported
from coin_ray.errors import ConfigError
from coin_ray.search.needs import PACKAGES, check_installed, has_validation
from coin_ray.search.space import SPACES

if TYPE_CHECKING:
    from coin_ray.search.plan import Search
    from coin_ray.search.run import Host


@dataclass(frozen=True)
class Request:
    search: Search
    resume: bool
    dry_run: bool


def main(script: str, description: str) -> int:
    """Search, or with ``--dry-run`` say what would be done; returns the exit code."""

    def work() -> None:
        asked = request(sys.argv[1:], script, description)
        from coin_ray.search import run

        if asked.dry_run:
            run.plan(asked.search)
            return
        check_installed(asked.search.algorithm)
        run.search(asked.search, _host(asked.search), resume=asked.resume)
        from coin_ray.search.page import write_page

        print(f"page: {write_page(asked.search.folder)}")

    return reported(work, "the same command with --resume goes on from here")


def _host(wanted: Search) -> Host:
    if wanted.population:
        from coin_ray.search.population import under_population

        return under_population
    from coin_ray.search.tuner import under_tune

    return under_tune


def request(arguments: Sequence[str], script: str, description: str) -> Request:
    """The search's own options, and the preset's settings as for ``full.py``. Raises
    ConfigError with what to change.
    """
    parser = _options()
    known, rest = parser.parse_known_args(list(arguments))
    config, options = parse(rest, script, f"{description}\n\n{parser.format_help()}")
    if options.until is not None or options.baselines:
        raise ConfigError(
            "a search decides itself what runs: leave out --until and --baselines"
        )
    if known.concurrent != "auto" and not known.concurrent.isdigit():
        raise ConfigError(
            f"--concurrent must be a number or auto; got {known.concurrent!r}"
        )
    for name, value, choices in (
        ("algorithm", known.algorithm, PACKAGES),
        ("space", known.space, SPACES),
    ):
        if value not in choices:
            raise ConfigError(
                f"--{name} must be one of {', '.join(choices)}; got {value!r}"
            )
    from coin_ray.search.plan import Search

    search = Search(
        config,
        options.root,
        known.space,
        (
            ("map50" if has_validation(config) else "label-free")
            if known.objective == "auto"
            else known.objective
        ),
        known.algorithm,
        known.scheduler or ("none" if known.algorithm == "population" else "asha"),
        known.trials,
        known.steps_share,
        None if known.concurrent == "auto" else int(known.concurrent),
    )
    return Request(search, known.resume, options.dry_run)


def _options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS
    )
    own = parser.add_argument_group("options of the search")
    own.add_argument(
        "--space",
        default="loss-weights",
        help=f"what is varied: {', '.join(SPACES)} (default: loss-weights)",
    )
    own.add_argument(
        "--objective",
        default="auto",
        choices=["auto", "map50", "label-free"],
        help=(
            "auto (default): mAP50 if there are labelled validation images (--val),"
            " else a score without labels"
        ),
    )
    own.add_argument(
        "--algorithm", default="optuna", help=f"{', '.join(PACKAGES)} (default: optuna)"
    )
    own.add_argument(
        "--scheduler",
        choices=["asha", "none"],
        help="asha (default) stops bad trials early; a population has none",
    )
    own.add_argument(
        "--trials",
        type=int,
        default=16,
        help=(
            "default: 16; the first is the preset as it is. Of a population: its"
            " members"
        ),
    )
    own.add_argument(
        "--concurrent",
        default="auto",
        help=(
            "trials at once; auto (default): one for each CPU (GPU, with"
            " --distill.fit.gpu)"
        ),
    )
    own.add_argument(
        "--steps-share",
        type=float,
        default=1.0,
        help="share of the distillation's steps that each trial makes (default: 1)",
    )
    own.add_argument(
        "--resume",
        action="store_true",
        help="go on with a search that was stopped or killed; all else as it was",
    )
    return parser
