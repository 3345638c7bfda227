"""The subcommands that run one step, and first whatever it needs and is not finished."""

from __future__ import annotations

from collections.abc import Sequence

from coin_ray.commands.adapt import run_or_plan
from coin_ray.commands.arguments import parse_run_arguments

COLLECT = """\
Query the cloud about every image and CLIP about every box.

    coin-ray collect demo [--dry-run]
    coin-ray collect views PRESET [--sample 40]    compare renderings of a few images
"""
PROPAGATE = """\
Train the CLIP detector on cloud boxes with CLIP labels.

    coin-ray propagate demo [--dry-run]
"""
SEPARATE = """\
Split the detections of the cloud and of the CLIP detector into consistent, inconsistent
and private ones.

    coin-ray separate demo [--dry-run]
"""
DISTILL = """\
Train the student on the separated teacher outputs.

    coin-ray distill demo [--dry-run]
"""
EVALUATE = """\
Evaluate every teacher and student on the test images.

    coin-ray evaluate demo [--dry-run]
"""
PREREQUISITES = "\nUnfinished steps before it are run first.\n"


def collect(arguments: Sequence[str]) -> None:
    """Run the step collect, or compare the renderings of a few images."""
    if arguments[:1] == ["views"]:
        from coin_ray.commands.renderings import compare_renderings_command

        compare_renderings_command(arguments[1:])
    else:
        run_single_step("collect", COLLECT, arguments)


def propagate(arguments: Sequence[str]) -> None:
    run_single_step("propagate", PROPAGATE, arguments)


def separate(arguments: Sequence[str]) -> None:
    run_single_step("separate", SEPARATE, arguments)


def distill(arguments: Sequence[str]) -> None:
    run_single_step("distill", DISTILL, arguments)


def evaluate(arguments: Sequence[str]) -> None:
    run_single_step("evaluate", EVALUATE, arguments)


def run_single_step(step: str, description: str, arguments: Sequence[str]) -> None:
    """Run one step of the pipeline and what it needs."""
    config, options = parse_run_arguments(
        arguments, f"coin-ray {step}", description + PREREQUISITES
    )
    run_or_plan(config, options, only=step)
