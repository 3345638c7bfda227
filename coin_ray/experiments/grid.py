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
from coin_ray.experiments.tracked import Runs
from coin_ray.runs.graph import graph
from coin_ray.runs.runner import up_to
from coin_ray.runs.steps import Step, execute, finished
from coin_ray.runs.summary import PACKAGES, gap_closed

ON_DRIVER = ("images", "collect")
"""Stages that use the whole cluster themselves and pay: one at a time, before all
others."""


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
        return ", ".join(
            part
            for part in (self.variant, self.group, f"seed {self.config.seed}")
            if part
        )

    @property
    def steps(self) -> dict[str, Step]:
        return up_to(graph(self.config, baselines=self.baselines), "evaluate")


@dataclass(frozen=True)
class Job:
    """Steps to do one after the other, in one process."""

    title: str
    config: PipelineConfig
    steps: tuple[Step, ...]

    def run(self, root: str) -> None:
        for step in self.steps:
            if step.manifest(root) is None:
                execute(step, self.config, root)


Report = Callable[[Job, float], None]
"""Told of each finished job and its seconds."""
Host = Callable[[Sequence[Job], str, Report], None]
"""Runs jobs that do not depend on each other, in any order; returns when all are done.
"""


def one_by_one(jobs: Sequence[Job], root: str, report: Report) -> None:
    """The host without Ray: in this process."""
    for job in jobs:
        start = time.monotonic()
        job.run(root)
        report(job, time.monotonic() - start)


def waves(trials: Sequence[Trial], root: str) -> list[list[Job]]:
    """What is not finished: first the steps that several trials share, level by level,
    then the rest of each trial.

    No step is in two jobs, and a wave needs nothing but the waves before it.
    """
    users = Counter(
        step.fingerprint for trial in trials for step in trial.steps.values()
    )
    shared: dict[int, dict[str, Job]] = {}
    own: list[Job] = []
    for trial in trials:
        todo = [step for step in trial.steps.values() if step.manifest(root) is None]
        alone = tuple(
            step
            for step in todo
            if users[step.fingerprint] == 1 and step.stage not in ON_DRIVER
        )
        for step in todo:
            if step not in alone:
                title = (
                    f"{step.name} for {trial.title}"
                    if step.stage not in ON_DRIVER
                    else step.name
                )
                shared.setdefault(_depth(step), {}).setdefault(
                    step.fingerprint, Job(title, trial.config, (step,))
                )
        own += [Job(trial.title, trial.config, alone)] if alone else []
    return [
        *(list(shared[depth].values()) for depth in sorted(shared)),
        *([own] if own else []),
    ]


def run(
    name: str, trials: Sequence[Trial], root: str, host: Host, runs: Runs
) -> list[dict[str, Any]]:
    """Do what is missing and return one record per trial, which is also in
    ROOT/NAME.json with the versions that made it.
    """
    todo = waves(trials, root)
    total, count = sum(len(wave) for wave in todo), 0
    by_title = {trial.title: trial for trial in trials}

    def report(job: Job, seconds: float) -> None:
        nonlocal count
        count += 1
        print(f"[{count}/{total}] {job.title}: {seconds:.0f} s", flush=True)
        if job.title in by_title:
            _track(by_title[job.title], root, runs)

    for job in chain.from_iterable(todo):
        check_installed(job.config, {step.name for step in job.steps})
    for wave in todo:
        alone = any(job.steps[0].stage in ON_DRIVER for job in wave)
        (one_by_one if alone else host)(wave, root, report)
    for trial in trials:
        _track(trial, root, runs)
    records = [record(trial, root) for trial in trials]
    versions = {package: version(package) for package in PACKAGES} | {
        "python": platform.python_version()
    }
    storage.write_json(
        storage.join(root, f"{name}.json"),
        {"grid": name, "trials": records, "versions": versions},
    )
    return records


def record(trial: Trial, root: str) -> dict[str, Any]:
    """What a finished trial found: mAP50 by method, the share of the gap closed,
    seconds of all its steps, shared ones too.
    """
    done = finished(list(trial.steps.values()), root)
    map50 = done["evaluate"]["metrics"]["map50"]
    return {
        "variant": trial.variant,
        "group": trial.group,
        "seed": trial.config.seed,
        "map50": map50,
        "gap_closed": gap_closed(map50),
        "seconds": {name: manifest["seconds"] for name, manifest in done.items()},
        "steps": {name: manifest["fingerprint"] for name, manifest in done.items()},
    }


def _track(trial: Trial, root: str, runs: Runs) -> None:
    found = record(trial, root)
    figures = {name: found[name] for name in ("map50", "gap_closed", "seconds")}
    runs.add(
        trial.title,
        figures,
        trial.config,
        trial.steps["distill"].folder(root),
        found["steps"]["images"],
    )


def _depth(step: Step) -> int:
    return 1 + max((_depth(i) for i in step.inputs), default=-1)
