"""``coin-ray collect views PRESET``: compare renderings before all images are paid for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coin_ray.commands.arguments import ExtraOptions
from coin_ray.config import PipelineConfig
from coin_ray.errors import ConfigError

DESCRIPTION = """\
Query the cloud about a few images in every rendering before all are paid for, and see in
which it detects with the highest confidence.

    coin-ray collect views PRESET [--sample 40] [--in plain grey]

The figure that counts is the mean over images of the best score: no label is needed for
it. How well it ranks renderings is measured in docs/demo.md. Answers are kept in the
run's journal, so a collection with the chosen rendering does not pay for them again.
"""


def compare_renderings_command(arguments: Sequence[str]) -> None:
    """Compare the renderings; with ``--dry-run`` print the calls and their cost."""
    from coin_ray.experiments.rendering_comparison import (
        RENDERINGS,
        SAMPLE_SIZE,
        compare_renderings,
    )

    extra = ExtraOptions("options of the comparison")
    extra.group.add_argument(
        "--sample",
        type=int,
        default=SAMPLE_SIZE,
        help=f"images that are sent in every rendering (default {SAMPLE_SIZE})",
    )
    extra.group.add_argument(
        "--in",
        dest="renderings",
        nargs="+",
        default=list(RENDERINGS),
        metavar="RENDERING",
        help=f"renderings (default: {' '.join(RENDERINGS)})",
    )
    comparison_options, config, options = extra.parse(
        arguments, "coin-ray collect views", DESCRIPTION
    )
    sample_size = comparison_options.sample
    if sample_size < 1:
        raise ConfigError(f"--sample must be at least 1; got {sample_size}")
    renderings = tuple(comparison_options.renderings)
    cloud = replace(config.cloud, views=renderings, batch=False)  # asked singly
    config = replace(config, cloud=cloud, more_clouds=())
    if options.dry_run:
        _print_cost(config, sample_size)
    else:
        compare_renderings(config, options.root, sample_size)


def _print_cost(config: PipelineConfig, sample_size: int) -> None:
    from coin_ray.cloud.question_client import questions_for
    from coin_ray.runs.estimate import Estimate, effective_rate, print_estimate

    renderings = len(config.cloud.views)
    questions = len(questions_for(config, config.cloud))
    calls = sample_size * renderings * questions
    rate = effective_rate(config.cloud)
    estimate = Estimate(
        config.cloud.service,
        sample_size,
        0,
        calls,
        calls * config.cloud.usd_per_call,
        calls / rate / 60,
        rate,
        at_most=True,
        views=renderings,
        questions=questions,
    )
    print_estimate(config.cloud, estimate)
