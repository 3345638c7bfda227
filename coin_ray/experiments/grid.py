"""A grid of runs of the pipeline below one root. Steps are found by their content, so
what runs share is done, and paid, once.
"""

from __future__ import annotations

import platform
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from typing import Any

from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.config.optional_dependencies import check_installed
from coin_ray.experiments.tracked import TrialRuns
from coin_ray.runs.changed_images import reopen_if_changed
from coin_ray.runs.graph import build_steps
from coin_ray.runs.runner import (
    ask_failed_images,
    run_missing_steps,
    select_steps,
)
from coin_ray.runs.steps import Step, finished_manifests
from coin_ray.runs.summary import PACKAGES, gap_closed

DRIVER_STAGES = ("images", "collect")
"""Stages that use the whole cluster themselves and pay: one at a time, before all
others."""
TrialResult = dict[str, Any]
"""A row of NAME.json: ``variant``, ``group``, ``seed``, ``map50``, ``gap_closed``,
``seconds`` and ``steps``."""


@dataclass(frozen=True)
class Trial:
    """One run up to its evaluation. ``group``: what the variant belongs to, as the
    losses or a threshold; empty for the reference.
    """

    variant: str
    group: str
    config: PipelineConfig
    baselines: bool = False

    @property
    def title(self) -> str:
        parts = (self.variant, self.group, f"seed {self.config.seed}")
        return ", ".join(part for part in parts if part)

    @property
    def steps(self) -> dict[str, Step]:
        steps = build_steps(self.config, baselines=self.baselines)
        return select_steps(steps, "evaluate")


@dataclass(frozen=True)
class Job:
    """Steps to do one after the other, in one process."""

    title: str
    config: PipelineConfig
    steps: tuple[Step, ...]

    @property
    def uses_driver(self) -> bool:
        return self.steps[0].stage in DRIVER_STAGES

    def run(self, root: str) -> None:
        run_missing_steps(self.steps, self.config, root, progress=False)


OnJobEnd = Callable[[Job, float], None]
"""Is called with each finished job and its seconds."""
RunJobs = Callable[[Sequence[Job], str, OnJobEnd], None]
"""Runs jobs that do not depend on each other, in any order; returns when all are done.
"""


def run_jobs_in_order(jobs: Sequence[Job], root: str, on_job_end: OnJobEnd) -> None:
    """Run the jobs one after the other in this process, without Ray."""
    for job in jobs:
        start = time.monotonic()
        job.run(root)
        on_job_end(job, time.monotonic() - start)


def plan_waves(trials: Sequence[Trial], root: str) -> list[list[Job]]:
    """Return the jobs that are not finished: first the steps that several trials share,
    level by level, then the remaining steps of each trial.

    No step is in two jobs, and a wave needs nothing but the waves before it.
    """
    step_users = Counter(
        step.fingerprint for trial in trials for step in trial.steps.values()
    )
    shared_jobs: dict[int, dict[str, Job]] = {}
    trial_jobs: list[Job] = []
    for trial in trials:
        unshared_steps: list[Step] = []
        for step in trial.steps.values():
            if step.is_finished(root):
                continue
            on_driver = step.stage in DRIVER_STAGES
            if step_users[step.fingerprint] == 1 and not on_driver:
                unshared_steps.append(step)
                continue
            title = step.name if on_driver else f"{step.name} for {trial.title}"
            level = shared_jobs.setdefault(_step_depth(step), {})
            level.setdefault(step.fingerprint, Job(title, trial.config, (step,)))
        if unshared_steps:
            trial_jobs.append(Job(trial.title, trial.config, tuple(unshared_steps)))
    waves = [list(shared_jobs[depth].values()) for depth in sorted(shared_jobs)]
    return [*waves, trial_jobs] if trial_jobs else waves


def run_grid(
    name: str, trials: Sequence[Trial], root: str, run_jobs: RunJobs, runs: TrialRuns
) -> list[TrialResult]:
    """Run what is not finished and return one result per trial; they are also in
    ROOT/NAME.json with the versions that made them.
    """
    _read_changed_images(trials, root)
    _ask_failed_images(trials, root)
    waves = plan_waves(trials, root)
    job_count, finished_count = sum(len(wave) for wave in waves), 0
    trials_by_title = {trial.title: trial for trial in trials}

    def on_job_end(job: Job, seconds: float) -> None:
        nonlocal finished_count
        finished_count += 1
        progress = f"[{finished_count}/{job_count}]"
        print(f"{progress} {job.title}: {seconds:.0f} s", flush=True)
        if job.title in trials_by_title:
            _track_trial(trials_by_title[job.title], root, runs)

    for job in chain.from_iterable(waves):
        check_installed(job.config, {step.name for step in job.steps})
    for wave in waves:
        uses_driver = any(job.uses_driver for job in wave)
        (run_jobs_in_order if uses_driver else run_jobs)(wave, root, on_job_end)
    for trial in trials:
        _track_trial(trial, root, runs)
    results = [read_trial_result(trial, root) for trial in trials]
    versions = {package: version(package) for package in PACKAGES}
    versions["python"] = platform.python_version()
    storage.write_json(
        storage.join(root, f"{name}.json"),
        {"grid": name, "trials": results, "versions": versions},
    )
    return results


def _read_changed_images(trials: Sequence[Trial], root: str) -> None:
    """Read images again whose files have changed: trials that are finished may not be
    finished any more.
    """
    for trial in trials:
        images = trial.steps["images"]
        if images.is_finished(root):
            reopen_if_changed([images], root)
            run_missing_steps([images], trial.config, root, progress=False)


def _ask_failed_images(trials: Sequence[Trial], root: str) -> None:
    """Ask again about images that finished collections failed in, each collection once."""
    asked: set[str] = set()
    for trial in trials:
        steps = trial.steps
        collect = steps["collect"].fingerprint
        if collect not in asked and steps["images"].is_finished(root):
            asked.add(collect)
            ask_failed_images(steps, trial.config, root)


def read_trial_result(trial: Trial, root: str) -> TrialResult:
    """Return what a finished trial measured: mAP50 by method, the share of the gap
    closed, seconds of all its steps, shared ones too.
    """
    manifests = finished_manifests(trial.steps.values(), root)
    map50 = manifests["evaluate"].metrics["map50"]
    return {
        "variant": trial.variant,
        "group": trial.group,
        "seed": trial.config.seed,
        "map50": map50,
        "gap_closed": gap_closed(map50),
        "seconds": {name: manifest.seconds for name, manifest in manifests.items()},
        "steps": {name: manifest.fingerprint for name, manifest in manifests.items()},
    }


def _track_trial(trial: Trial, root: str, runs: TrialRuns) -> None:
    trial_result = read_trial_result(trial, root)
    figures = {name: trial_result[name] for name in ("map50", "gap_closed", "seconds")}
    folder = trial.steps["distill"].folder(root)
    digest = trial_result["steps"]["images"]
    runs.add(trial.title, figures, trial.config, folder, digest)


def _step_depth(step: Step) -> int:
    return 1 + max((_step_depth(upstream) for upstream in step.inputs), default=-1)
