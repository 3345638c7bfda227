"""The command lines of the grids: ``SCRIPT PRESET [--seeds 0 1 2] [--quick]
[settings]``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coin_ray import storage
from coin_ray.commands.arguments import parse, reported
from coin_ray.config import PipelineConfig
from coin_ray.errors import ConfigError
from coin_ray.experiments.variants import shortened

QUICK = 0.1
"""Share of the training steps with ``--quick``."""


@dataclass(frozen=True)
class Request:
    """What a grid is made for. ``share``: of the inconsistent boxes that teach, for the
    fair thresholds.
    """

    config: PipelineConfig
    root: str
    seeds: tuple[int, ...]
    share: float
    dry_run: bool


def main(script: str, description: str, work: Callable[[Request], None]) -> int:
    """Read the command line and do ``work``; returns the exit code."""
    return reported(lambda: work(request(sys.argv[1:], script, description)))


def request(arguments: Sequence[str], script: str, description: str) -> Request:
    """The grid's own options, and the preset's settings as for ``full.py``. Raises
    ConfigError with what to change.
    """
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS
    )
    own = parser.add_argument_group("options of the grid")
    own.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2"
    )
    own.add_argument(
        "--quick",
        action="store_true",
        help=(
            "a tenth of the training steps and seeds 0 1: does it run? The figures mean"
            " nothing"
        ),
    )
    own.add_argument(
        "--steps-share",
        type=float,
        default=1.0,
        help="share of all training steps to make",
    )
    own.add_argument(
        "--share",
        type=float,
        default=0.5,
        help="fair thresholds: share of the inconsistent boxes that teach (default .5)",
    )
    known, rest = parser.parse_known_args(list(arguments))
    config, options = parse(rest, script, f"{description}\n\n{parser.format_help()}")
    if options.until is not None or options.baselines:
        raise ConfigError(
            "a grid decides itself what runs: leave out --until and --baselines"
        )
    if config.seed:
        raise ConfigError(
            "a grid has several seeds: give --seeds 0 1 2 instead of --seed"
        )
    seeds = [0, 1] if known.quick and known.seeds == [0, 1, 2] else known.seeds
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"--seeds must differ; got {seeds}")
    for name, value in (("--share", known.share), ("--steps-share", known.steps_share)):
        if not 0 < value <= 1:
            raise ConfigError(f"{name} must lie in 0..1, and above 0; got {value}")
    made = known.steps_share * (QUICK if known.quick else 1)
    return Request(
        config if made == 1 else shortened(config, made),
        storage.absolute(options.root),
        tuple(seeds),
        known.share,
        options.dry_run,
    )
