"""Run the steps that are not finished, track them, and write ``summary.json``."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import (
    AbstractContextManager,
    ExitStack,
    contextmanager,
    nullcontext,
)

from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.config.optional_dependencies import check_installed
from coin_ray.config.students import is_region_student
from coin_ray.config.yaml_files import to_yaml
from coin_ray.report.run_summary import RunSummary
from coin_ray.report.table import print_summary
from coin_ray.runs.changed_images import (
    find_changes,
    keep_listing,
    reopened_images,
)
from coin_ray.runs.environment import check_environment
from coin_ray.runs.failed_images import count_failed_images
from coin_ray.runs.lease import hold_root
from coin_ray.runs.steps import (
    Manifest,
    Stage,
    Step,
    reopen_step,
    restore_step,
    run_step,
)
from coin_ray.runs.summary import build_summary
from coin_ray.runs.tracking import ChildRun, RunConfig, Tracker

STUDENT_TRAININGS = {"distill", "pseudo_label", "oracle"}
"""Steps that start from the student's pretrained weights."""


def run_pipeline(
    config: PipelineConfig,
    steps: Mapping[str, Step],
    root: str,
    until: str | None = None,
    *,
    ask_failed: bool = True,
) -> RunSummary:
    """Run the steps up to and including ``until`` and return the summary.

    The summary is also printed and written to ROOT/summary.json. With ``ask_failed`` a
    finished collection asks again about the images that failed; if one of them is
    answered now, the steps that read the collection are run again. If files of the
    images are new, gone or changed, the images are read again; if that makes other
    images or labels of them, all steps that read them are run again.

    Raises RootInUse if another run works below the root. A run with nothing to do does
    not need the root for itself.
    """
    selected = select_steps(steps, until)
    images = selected.get("images")
    changes = find_changes(images, root)
    asks_again = bool(changes) or (
        ask_failed and count_failed_images(selected.get("collect"), config, root) > 0
    )
    _check_packages(config, selected, steps, root, asks_again)
    with ExitStack() as holding:
        if asks_again or _has_work(selected, config, root):
            check_environment(root)
            holding.enter_context(hold_root(root))
        keep_listing(images, root)
        if changes and images is not None:
            holding.enter_context(reopened_images(images, root, changes))
        failed = 0
        if ask_failed:
            failed = count_failed_images(selected.get("collect"), config, root)
        if failed or _unfinished_steps(selected, root):
            config_file = storage.join(root, "config.yaml")
            storage.write_bytes(config_file, to_yaml(config).encode())
        if failed:
            holding.enter_context(_reopened(selected["collect"], root, failed))
        tracker = open_tracker(selected.values(), config, root)
        manifests = run_missing_steps(selected.values(), config, root, tracker=tracker)
        summary = build_summary(config, manifests)
        if tracker is not None:
            _log_results(tracker, config, selected, summary, root)
        storage.write_json(storage.join(root, "summary.json"), summary.to_json())
    print_summary(summary)
    return summary


def _check_packages(
    config: PipelineConfig,
    selected: Mapping[str, Step],
    steps: Mapping[str, Step],
    root: str,
    asks_again: bool,
) -> None:
    """Raise ConfigError if a package is missing that an unfinished step needs, or
    InputError if the student's pretrained weights can't be used.

    Before a call is paid that includes the steps of a later command, all of ``steps``.
    """
    unfinished = _unfinished_steps(selected, root)
    if asks_again:
        unfinished |= {"collect"} & set(selected)
    if "collect" in unfinished:
        unfinished |= _unfinished_steps(steps, root)
    if unfinished:
        check_installed(config, unfinished)
    if unfinished & STUDENT_TRAININGS and not is_region_student(config.distill.student):
        from coin_ray.models.students.building import check_pretrained_student

        check_pretrained_student(config.distill, config.classes)


def _has_work(steps: Mapping[str, Step], config: PipelineConfig, root: str) -> bool:
    """Return whether a step or a tracking server has something missing."""
    unfinished = _unfinished_steps(steps, root)
    return bool(unfinished) or _tracking_is_needed(steps.values(), config, root)


def _unfinished_steps(steps: Mapping[str, Step], root: str) -> set[str]:
    return {name for name, step in steps.items() if not step.is_finished(root)}


def ask_failed_images(
    steps: Mapping[str, Step], config: PipelineConfig, root: str
) -> None:
    """Ask again about the images that a finished collection among the steps failed in.
    If one is answered now, the steps that read the collection are not finished any more.

    Raises ConfigError before that if a package is missing that a step needs.
    """
    collect = steps.get("collect")
    failed = count_failed_images(collect, config, root)
    if collect is None or not failed:
        return
    check_installed(config, set(steps))
    with _reopened(collect, root, failed):
        run_missing_steps([collect], config, root, progress=False)


@contextmanager
def _reopened(collect: Step, root: str, failed: int) -> Iterator[None]:
    """Reopen a finished collection. If the block raises before the collection has ended
    again, it stays finished as it was.
    """
    manifest = collect.read_manifest(root)
    assert manifest is not None
    folder = collect.folder(root)
    print(f"collect: {failed} images failed before and are asked again", flush=True)
    reopen_step(folder, manifest)
    try:
        yield
    except BaseException:
        restore_step(folder)
        raise


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
    all_finished = all(step.is_finished(root) for step in steps)
    stages = work or {}
    configs = step_configs or {}
    manifests: dict[str, Manifest] = {}
    for step in steps:
        # read here: a step may have removed the results of later ones
        finished = step.read_manifest(root)
        if finished is not None:
            manifests[step.name] = finished
            if progress and not all_finished:
                print(f"{step.name}: finished before", flush=True)
            if tracker is not None and _has_pending_metrics(tracker, step, root):
                with _child_run(tracker, step, steps, manifests, root) as child_run:
                    child_run.log(finished.metrics, step.folder(root))
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
    return manifests


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
    return Tracker(config, root) if _tracking_is_needed(steps, config, root) else None


def _tracking_is_needed(steps: Iterable[Step], config: RunConfig, root: str) -> bool:
    if not config.tracking.enabled:
        return False
    return config.tracking.model is not None or any(
        not step.is_finished(root) or storage.exists(_pending_file(step, root))
        for step in steps
    )


def print_plan(
    config: PipelineConfig,
    steps: Mapping[str, Step],
    root: str,
    until: str | None = None,
    *,
    ask_failed: bool = True,
) -> None:
    """Print which steps a run would do, and the calls and cost, without doing any.

    ``ask_failed``: as for ``run_pipeline``.
    """
    selected = select_steps(steps, until)
    for name, step in selected.items():
        state = "finished" if step.is_finished(root) else "to do"
        print(f"{name:<13} {state:<9} {step.folder(root)}")
    if changes := find_changes(selected.get("images"), root):
        print(
            f"images: since they were read: {changes.describe()}; they are read again,"
            " and the steps after them are made again"
        )
    collect = selected.get("collect")
    failed = count_failed_images(collect, config, root) if ask_failed else 0
    if failed:
        print(
            f"collect: {failed} images failed and are asked again; if one is answered,"
            " the later steps are run again"
        )
    if collect is None or (collect.is_finished(root) and not failed):
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
