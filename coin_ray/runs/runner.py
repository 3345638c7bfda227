"""Run the steps that are not finished, track them, and write ``summary.json``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext

from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.config.optional_dependencies import check_installed
from coin_ray.config.yaml_files import to_yaml
from coin_ray.report.run_summary import RunSummary
from coin_ray.report.table import print_summary
from coin_ray.runs.steps import Manifest, Stage, Step, finished_manifests, run_step
from coin_ray.runs.summary import build_summary
from coin_ray.runs.tracking import ChildRun, RunConfig, Tracker


def run_pipeline(
    config: PipelineConfig,
    steps: Mapping[str, Step],
    root: str,
    until: str | None = None,
) -> RunSummary:
    """Run the steps up to and including ``until`` and return the summary.

    The summary is also printed and written to ROOT/summary.json.
    """
    selected = select_steps(steps, until)
    missing = {name for name, step in selected.items() if not step.is_finished(root)}
    if missing:
        check_installed(config, missing)
        config_file = storage.join(root, "config.yaml")
        storage.write_bytes(config_file, to_yaml(config).encode())
    tracker = open_tracker(selected.values(), config, root)
    manifests = run_missing_steps(selected.values(), config, root, tracker=tracker)
    summary = build_summary(config, manifests)
    if tracker is not None:
        _log_results(tracker, config, selected, summary, root)
    storage.write_json(storage.join(root, "summary.json"), summary.to_json())
    print_summary(summary)
    return summary


def run_missing_steps(
    steps: Iterable[Step],
    config: object,
    root: str,
    *,
    tracker: Tracker | None = None,
    progress: bool = True,
    work: Mapping[str, Stage] | None = None,
    step_configs: Mapping[str, object] | None = None,
) -> dict[str, Manifest]:
    """Run, in order, the steps without a manifest; return the manifests of all by name.

    Each step becomes a run of ``tracker``, which also gets the metrics of finished steps
    that it missed while its server was lost. By step name, ``work`` replaces a stage's
    own ``run`` and ``step_configs`` replaces ``config``.
    """
    steps = list(steps)
    manifests = finished_manifests(steps, root)
    all_finished = len(manifests) == len(steps)
    stages = work or {}
    configs = step_configs or {}
    for step in steps:
        if step.name in manifests:
            if progress and not all_finished:
                print(f"{step.name}: finished before", flush=True)
            if tracker is not None and _has_pending_metrics(tracker, step, root):
                with _child_run(tracker, step, steps, manifests, root) as child_run:
                    child_run.log(manifests[step.name].metrics, step.folder(root))
            continue
        if progress:
            print(f"{step.name}: started", flush=True)
        start = time.monotonic()
        step_config = configs.get(step.name, config)
        with _child_run(tracker, step, steps, manifests, root) as child_run:
            manifest = run_step(step, step_config, root, stages.get(step.name))
            child_run.log(manifest.metrics, step.folder(root))
        manifests[step.name] = manifest
        if progress:
            seconds = time.monotonic() - start
            print(f"{step.name}: finished in {seconds:.0f} s", flush=True)
    return {step.name: manifests[step.name] for step in steps}


def select_steps(steps: Mapping[str, Step], until: str | None) -> dict[str, Step]:
    """Return the step ``until`` and those it depends on; all steps if it is None."""
    if until is None:
        return dict(steps)
    needed: set[str] = set()

    def add_with_inputs(step: Step) -> None:
        needed.add(step.name)
        for upstream in step.inputs:
            add_with_inputs(upstream)

    add_with_inputs(steps[until])
    return {name: step for name, step in steps.items() if name in needed}


def open_tracker(steps: Iterable[Step], config: RunConfig, root: str) -> Tracker | None:
    """Connect to MLflow if there is something to write; otherwise return None.

    There is if a step is not finished, if a lost server missed metrics of a finished
    one, or if the student is to be registered as a model.
    """
    if not config.tracking.enabled:
        return None
    needed = config.tracking.model is not None or any(
        not step.is_finished(root) or storage.exists(_pending_file(step, root))
        for step in steps
    )
    return Tracker(config, root) if needed else None


def print_plan(
    config: PipelineConfig,
    steps: Mapping[str, Step],
    root: str,
    until: str | None = None,
) -> None:
    """Print which steps a run would do, and the calls and cost, without doing any."""
    selected = select_steps(steps, until)
    for name, step in selected.items():
        state = "finished" if step.is_finished(root) else "to do"
        print(f"{name:<13} {state:<9} {step.folder(root)}")
    collect = selected.get("collect")
    if collect is None or collect.is_finished(root):
        return
    from coin_ray.runs.estimate import estimate_cost, print_estimate

    estimates = estimate_cost(config, selected, root)
    for cloud, estimate in zip(config.services, estimates, strict=True):
        print_estimate(cloud, estimate)


def _has_pending_metrics(tracker: Tracker, step: Step, root: str) -> bool:
    return tracker.enabled and storage.exists(_pending_file(step, root))


def _pending_file(step: Step, root: str) -> str:
    """Return the file that exists until tracking has all metrics of the step."""
    return storage.join(root, "mlflow", "owed", f"{step.name}-{step.fingerprint}.json")


def _child_run(
    tracker: Tracker | None,
    step: Step,
    steps: Iterable[Step],
    manifests: Mapping[str, Manifest],
    root: str,
) -> AbstractContextManager[ChildRun]:
    """Open the step's MLflow run; without a tracker, one that writes nothing."""
    if tracker is None:
        return nullcontext(ChildRun())
    parameters = {"fingerprint": step.fingerprint, "options": _loggable(step.options)}
    images = next((s for s in steps if s.name == "images"), None)
    digest, images_table = "", ""
    if images is not None:
        images_table = storage.join(images.folder(root), "images.parquet")
    if "images" in manifests:
        digest = str(manifests["images"].metrics.get("digest", ""))
    return tracker.child_run(
        step.name, parameters, digest, images_table, _pending_file(step, root)
    )


def _loggable(options: Mapping[str, object]) -> dict[str, object]:
    """Return the options that are plain values; a whole config is logged elsewhere."""
    return {
        name: option
        for name, option in options.items()
        if isinstance(option, (str, int, float))
    }


def _log_results(
    tracker: Tracker,
    config: PipelineConfig,
    steps: Mapping[str, Step],
    summary: RunSummary,
    root: str,
) -> None:
    """Log the final figures, and register the exported student as a model."""
    scores = {k: v for k, v in summary.map50.items() if v is not None}
    figures = {f"map50/{method}": score for method, score in scores.items()}
    total_seconds = summary.seconds["total"]
    tracker.log_summary(figures | {"seconds": total_seconds}, summary.page)
    export = steps.get("export")
    if config.tracking.model is not None and export is not None:
        tracker.register_model(export.folder(root), figures)
