"""Run the steps of a graph in order: skip what is finished, track what runs, leave
``summary.json`` at the root.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.config.files import to_yaml
from coin_ray.config.optional_dependencies import check_installed
from coin_ray.report.table import print_summary
from coin_ray.runs.steps import Step, execute, finished
from coin_ray.runs.summary import summarise

if TYPE_CHECKING:
    from coin_ray.runs.tracking import Tracker


def run(
    config: PipelineConfig,
    steps: Mapping[str, Step],
    root: str,
    until: str | None = None,
) -> dict[str, Any]:
    """Run the steps up to and including ``until``; returns the summary, which is also
    printed and written to ROOT/summary.json.
    """
    chosen = up_to(steps, until)
    done = finished(list(chosen.values()), root)
    if len(done) < len(chosen):
        _run_missing(config, chosen, done, root)
    elif config.tracking.enabled:
        _track_late(config, chosen, done, root)
    summary = summarise(config, done)
    storage.write_json(storage.join(root, "summary.json"), summary)
    print_summary(summary, done.get("report", {}).get("metrics", {}).get("page"))
    return summary


def up_to(steps: Mapping[str, Step], until: str | None) -> dict[str, Step]:
    if until is None:
        return dict(steps)
    needed: dict[str, Step] = {}

    def add(step: Step) -> None:
        for upstream in step.inputs:
            add(upstream)
        needed[step.name] = step

    add(steps[until])
    return {name: step for name, step in steps.items() if name in needed}


def _run_missing(
    config: PipelineConfig,
    steps: Mapping[str, Step],
    done: dict[str, dict[str, Any]],
    root: str,
) -> None:
    from coin_ray.runs.tracking import Tracker

    check_installed(config, steps.keys() - done.keys())
    storage.write_bytes(storage.join(root, "config.yaml"), to_yaml(config).encode())
    tracker = Tracker(config, root)
    for name, step in steps.items():
        if name in done:
            print(f"{name}: finished before", flush=True)
            if config.tracking.enabled and storage.exists(_owed(step, root)):
                _track(tracker, step, done, root, steps)
            continue
        print(f"{name}: started", flush=True)
        start = time.monotonic()
        _track(
            tracker,
            step,
            done,
            root,
            steps,
            lambda step=step: execute(step, config, root),
        )  # type: ignore[misc]
        print(f"{name}: finished in {time.monotonic() - start:.0f} s", flush=True)
    _close(tracker, config, steps, done, root)


def _track(
    tracker: Tracker,
    step: Step,
    done: dict[str, dict[str, Any]],
    root: str,
    steps: Mapping[str, Step],
    work: Callable[[], dict[str, Any]] | None = None,
) -> None:
    """Do a step (``work``) within its run, or write of a finished one what tracking
    does not have.
    """
    digest = str(done.get("images", {}).get("metrics", {}).get("digest", ""))
    images = (
        storage.join(steps["images"].folder(root), "images.parquet")
        if "images" in steps
        else ""
    )
    about = {"fingerprint": step.fingerprint, "options": dict(step.options)}
    with tracker.stage(step.name, about, digest, images, _owed(step, root)) as stage:
        if work is not None:
            done[step.name] = work()
        stage.finish(done[step.name]["metrics"], step.folder(root))


def _owed(step: Step, root: str) -> str:
    return storage.join(root, "mlflow", "owed", f"{step.name}-{step.fingerprint}.json")


def _track_late(
    config: PipelineConfig,
    steps: Mapping[str, Step],
    done: dict[str, dict[str, Any]],
    root: str,
) -> None:
    """Of a finished run, write what tracking does not have; its server is asked only if
    there is something.
    """
    owed = [step for step in steps.values() if storage.exists(_owed(step, root))]
    if not owed and config.tracking.model is None:
        return
    from coin_ray.runs.tracking import Tracker

    tracker = Tracker(config, root)
    for step in owed:
        _track(tracker, step, done, root, steps)
    _close(tracker, config, steps, done, root)


def _close(
    tracker: Tracker,
    config: PipelineConfig,
    steps: Mapping[str, Step],
    done: dict[str, dict[str, Any]],
    root: str,
) -> None:
    """Final figures, and the student as a registered model."""
    summary = summarise(config, done)
    figures = {f"map50/{k}": v for k, v in summary["map50"].items() if v is not None}
    tracker.summary(
        figures | {"seconds": summary["seconds"]["total"]},
        done.get("report", {}).get("metrics", {}).get("page"),
    )
    if config.tracking.model is not None and "export" in done:
        tracker.register(steps["export"].folder(root), figures)


def plan(
    config: PipelineConfig,
    steps: Mapping[str, Step],
    root: str,
    until: str | None = None,
) -> None:
    """Print what a run would do and what it would ask and pay, without doing it."""
    chosen = up_to(steps, until)
    done = finished(list(chosen.values()), root)
    for name, step in chosen.items():
        print(
            f"{name:<13} {'finished' if name in done else 'to do':<9} {step.folder(root)}"
        )
    if "collect" in chosen and "collect" not in done:
        from coin_ray.runs.estimate import estimate, print_estimate

        for cloud, figures in zip(
            config.services, estimate(config, chosen, root), strict=True
        ):
            print_estimate(cloud, figures)
