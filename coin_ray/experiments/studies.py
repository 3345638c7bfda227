"""The three studies: what each loss and stage is worth, how opinions are best fused,
and COIN beside its baselines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.experiments.fusion_notes import fusion_notes
from coin_ray.experiments.grid import RunJobs, Trial, TrialResult, plan_waves, run_grid
from coin_ray.experiments.outcome import (
    StudyRow,
    draw_rows,
    format_markdown,
    method_rows,
    print_rows,
    variant_rows,
)
from coin_ray.experiments.tracked import TrialRuns
from coin_ray.experiments.variants import ABLATION, build_trials, fusion_variants
from coin_ray.runs.environment import check_environment
from coin_ray.runs.lease import hold_root


@dataclass(frozen=True)
class StudyRequest:
    """What a study is made for. ``share``: of the inconsistent boxes that teach, for the
    fair thresholds.
    """

    config: PipelineConfig
    root: str
    seeds: tuple[int, ...]
    share: float
    dry_run: bool


Study = Callable[[StudyRequest, RunJobs], list[StudyRow]]


def run_ablation(request: StudyRequest, run_jobs: RunJobs) -> list[StudyRow]:
    """Leave out each loss and each stage."""
    trials = build_trials(request.config, ABLATION, request.seeds)
    return _run_study("ablation", "Ablation", trials, request, run_jobs, variant_rows)


def run_fusion_study(request: StudyRequest, run_jobs: RunJobs) -> list[StudyRow]:
    """Compare the decision-level fusions, with the published threshold and with one of
    their own.
    """
    groups = fusion_variants(request.share)
    trials = build_trials(request.config, groups, request.seeds)
    reference_trials = [trial for trial in trials if not trial.group]

    def rows_with_notes(results: Sequence[TrialResult]) -> list[StudyRow]:
        notes = fusion_notes(
            reference_trials, list(groups), request.share, request.root
        )
        return variant_rows(results, notes)

    title = "Fusion of inconsistent boxes"
    return _run_study("fusion", title, trials, request, run_jobs, rows_with_notes)


def run_baselines(request: StudyRequest, run_jobs: RunJobs) -> list[StudyRow]:
    """Compare teachers, COIN, and the same network on plain pseudo-labels and on the
    truth.
    """
    trials = build_trials(request.config, {}, request.seeds, baselines=True)
    return _run_study("baselines", "Baselines", trials, request, run_jobs, method_rows)


def _run_study(
    name: str,
    title: str,
    trials: Sequence[Trial],
    request: StudyRequest,
    run_jobs: RunJobs,
    build_rows: Callable[[Sequence[TrialResult]], list[StudyRow]],
) -> list[StudyRow]:
    """Run, print and write NAME.json, NAME.md and NAME.svg at the root. With
    ``dry_run`` only print what is to do.
    """
    root = request.root
    if request.dry_run:
        _print_waves(trials, root)
        return []
    check_environment(root)
    with hold_root(root):
        runs = TrialRuns(name, request.config, root)
        rows = build_rows(run_grid(name, trials, root, run_jobs, runs))
        heading = f"{title}: {request.config.preset}"
        print_rows(heading, rows)
        table = format_markdown(rows)
        storage.write_bytes(storage.join(root, f"{name}.md"), table.encode())
        figure = draw_rows(heading, rows)
        storage.write_bytes(storage.join(root, f"{name}.svg"), figure.encode())
    return rows


def _print_waves(trials: Sequence[Trial], root: str) -> None:
    for number, wave in enumerate(plan_waves(trials, root), start=1):
        for job in wave:
            steps = ", ".join(step.name for step in job.steps)
            print(f"wave {number}  {job.title}: {steps}")
