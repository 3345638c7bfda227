"""``coin-ray adapt PRESET`` and ``coin-ray plan PRESET``: the whole adaptation."""

from __future__ import annotations

from collections.abc import Sequence

from coin_ray.commands.arguments import RunOptions, parse_run_arguments
from coin_ray.config import PipelineConfig
from coin_ray.errors import ConfigError

DESCRIPTION = """\
Run the whole adaptation: images, collect, propagate, separate, distill, evaluate,
export, report. Finished steps are skipped, so the same command resumes a run.

    coin-ray adapt demo
    coin-ray adapt folder --images DIR --classes person,dog --cloud https://detector.example.com
    coin-ray adapt thermal --assets DIR
    ray job submit --working-dir . -- python pipelines/full.py demo --root s3://bucket/run
"""


def adapt_command(arguments: Sequence[str]) -> None:
    """Run the pipeline; with ``--dry-run`` print its plan."""
    run_or_plan(*parse_run_arguments(arguments, "coin-ray adapt", DESCRIPTION))


def plan_command(arguments: Sequence[str]) -> None:
    """Print the steps, calls, cost and time of ``adapt`` with the same arguments."""
    adapt_command([*arguments, "--dry-run"])


def run_or_plan(
    config: PipelineConfig, options: RunOptions, only: str | None = None
) -> None:
    """Run the pipeline, or the step ``only`` and what it needs; with ``dry_run`` print
    the plan. Raise ConfigError if the step is not part of the run.
    """
    from coin_ray.runs.graph import build_steps
    from coin_ray.runs.runner import print_plan, run_pipeline

    steps = build_steps(config, baselines=options.baselines)
    until = only or options.until
    if until is not None and until not in steps:
        required_option = "corrections" if until == "corrections" else "baselines"
        raise ConfigError(
            f"step {until} is part of the run only with --{required_option}"
        )
    # a command that only reads the collection leaves its failed images alone
    ask_failed = only in (None, "collect")
    if options.dry_run:
        print_plan(config, steps, options.root, until, ask_failed=ask_failed)
    else:
        run_pipeline(config, steps, options.root, until, ask_failed=ask_failed)
