"""``coin-ray teachers compare PRESET``: compare clouds and phrases on a few images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from coin_ray.commands.arguments import ExtraOptions, check_config
from coin_ray.config import PipelineConfig
from coin_ray.errors import ConfigError

USAGE = "usage: coin-ray teachers compare PRESET [options]"
DESCRIPTION = """\
Ask each configured cloud about a few images before all are paid for, and compare their
answers without labels.

    coin-ray teachers compare PRESET --cloud A --more-clouds B,C [--sample 40]
    coin-ray teachers compare PRESET --cloud A --classes a,b --phrases FILE.yaml

Printed for each cloud, rendering and set of phrases: boxes per image, confidence,
agreement with the others, calibration by the others, latency and price; with pictures.
Answers are kept in the run's journal, so a collection does not pay for them again.
"""


def teachers(arguments: Sequence[str]) -> None:
    """Run ``teachers compare``."""
    subject, *options = arguments or [""]
    if subject != "compare":
        raise ConfigError(f"{USAGE}; got {subject or 'no subject'}")
    compare_command(options)


def compare_command(arguments: Sequence[str]) -> None:
    """Compare the teachers; with ``--dry-run`` print the calls and their cost."""
    from coin_ray.experiments.rendering_comparison import SAMPLE_SIZE
    from coin_ray.experiments.teacher_comparison import compare_teachers

    extra = ExtraOptions("options of the comparison")
    extra.group.add_argument(
        "--sample",
        type=int,
        default=SAMPLE_SIZE,
        help=f"images that each teacher is asked about (default {SAMPLE_SIZE})",
    )
    extra.group.add_argument(
        "--phrases",
        nargs="+",
        default=[],
        metavar="FILE.yaml",
        help="files of the same classes, asked by other phrases (docs/classes.md)",
    )
    comparison, config, options = extra.parse(
        arguments, "coin-ray teachers compare", DESCRIPTION
    )
    if comparison.sample < 1:
        raise ConfigError(f"--sample must be at least 1; got {comparison.sample}")
    config = _one_by_one(config)
    if options.dry_run:
        _print_calls(config, comparison.sample, comparison.phrases)
    else:
        compare_teachers(config, options.root, comparison.sample, comparison.phrases)


def _one_by_one(config: PipelineConfig) -> PipelineConfig:
    """Return the config whose clouds are asked singly, whatever combines them later."""
    single = replace(config.cloud, batch=False)
    others = tuple(replace(cloud, batch=False) for cloud in config.more_clouds)
    config = replace(config, cloud=single, more_clouds=others)
    check_config(config)
    return config


def _print_calls(
    config: PipelineConfig, sample_size: int, class_files: Sequence[str]
) -> None:
    from coin_ray.cloud.question_client import questions_for
    from coin_ray.experiments.teacher_comparison import configs_by_phrases

    calls, usd = 0, 0.0
    for _, phrase_config in configs_by_phrases(config, class_files):
        for cloud in phrase_config.clouds:
            cloud_calls = sample_size * len(questions_for(phrase_config, cloud))
            calls += cloud_calls
            usd += cloud_calls * cloud.usd_per_call
    print(f"at most {calls} calls, ${usd:.2f}, less those on record")
