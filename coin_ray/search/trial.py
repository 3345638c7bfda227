"""One trial: the pipeline's own distillation with some settings replaced, evaluated
twice during its training and at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.errors import CoinError, StorageUnavailable
from coin_ray.evaluation.label_free import label_free_score
from coin_ray.evaluation.voc import average_precision
from coin_ray.runs.runner import run_missing_steps
from coin_ray.runs.steps import Context, Metrics, with_found_range
from coin_ray.search.plan import PARTS, RUNGS, Search
from coin_ray.search.space import Settings
from coin_ray.stages import distill
from coin_ray.stages.common.image_tables import read_images
from coin_ray.stages.common.prediction import predict_images
from coin_ray.stages.common.training_job import (
    TrainingJob,
    save_weights,
    train_on_worker,
)
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.structures import Detections
from coin_ray.training.loop import Curve

FAILED_SCORE = -1.0
"""Score of a trial that failed: worse than any."""
Figures = dict[str, Any]
"""``score`` of a student, and what it consists of."""
Report = Callable[[Figures], None]
"""Is called with a trial's figures so far, and how many ``ninths`` it has made."""


def run_trial(search: Search, settings: Settings, report: Report) -> None:
    """Train, or resume a trial that was killed; a finished student is only evaluated.
    A training that diverges counts as failed. Raises StorageUnavailable, after which a
    trial can go on.
    """
    try:
        figures = _distill_and_evaluate(search, settings, report)
    except StorageUnavailable:
        raise
    except CoinError as error:
        failure = f"{type(error).__name__}: {error}"
        figures = {"score": FAILED_SCORE, "failure": failure}
    report({"ninths": PARTS, **figures})


def _distill_and_evaluate(
    search: Search, settings: Settings, report: Report
) -> Figures:
    config, steps = search.trial_config(settings), search.steps(settings)
    distill_stage = partial(_distill_with_reports, search=search, report=report)
    run_missing_steps(
        steps.values(),
        config,
        search.root,
        progress=False,
        work={"distill": distill_stage},
    )
    return evaluate_finished(search, steps["distill"].folder(search.root))


def evaluate_finished(search: Search, folder: str) -> Figures:
    """Return the figures of the student in a finished distillation's folder; with a
    label-free score also its mAP50, if there are validation labels.
    """
    weights = {
        "student": storage.join(folder, WEIGHTS),
        "teacher": storage.join(folder, "teacher.pt"),
    }
    figures = evaluate_weights(search, weights)
    if search.objective == "map50":
        return figures
    return figures | {"validation": evaluate_on_validation(search, weights["student"])}


def _distill_with_reports(
    context: Context[PipelineConfig], search: Search, report: Report
) -> Metrics:
    def report_rung(
        steps_per_part: int, step: int, checkpoint: Mapping[str, Any] | None
    ) -> None:
        ninths, remainder = divmod(step + 1, steps_per_part)
        if checkpoint is None or remainder or search.scheduler == "none":
            return
        if ninths in RUNGS:
            figures = evaluate_checkpoint(search, context.folder, checkpoint)
            report({"ninths": ninths, **figures})

    def train_with_reports(job: TrainingJob) -> Curve:
        steps_per_part = max(1, job.training.steps // PARTS)
        training = replace(job.training, checkpoint_every=steps_per_part)
        return train_on_worker(
            replace(job, training=training),
            lambda step, _, checkpoint: report_rung(steps_per_part, step, checkpoint),
        )

    return distill.run(context, train_with_reports)


def evaluate_checkpoint(
    search: Search, folder: str, checkpoint: Mapping[str, Any]
) -> Figures:
    """Return the figures of a training's checkpoint; its weights lie below ``folder``
    while they are evaluated.
    """
    weights = {
        name: storage.join(folder, "looked_at", f"{name}.pt")
        for name in ("student", "teacher")
    }
    for name, uri in weights.items():
        save_weights(uri, checkpoint["task"][name])
    figures = evaluate_weights(search, weights)
    for uri in weights.values():
        storage.remove(uri)
    return figures


def evaluate_weights(search: Search, weights: Mapping[str, str]) -> Figures:
    """Return ``score`` and its parts, of student and teacher weights by URI: on
    validation images, or label-free on held-out ones.
    """
    if search.objective == "map50":
        map50 = evaluate_on_validation(search, weights["student"])
        return {"score": map50, "validation": map50}
    expected_truth = search.expected_truth()
    detections = _predict(search, dict(weights), "train", expected_truth)
    return label_free_score(
        detections["student"],
        detections["teacher"],
        expected_truth,
        len(search.config.classes),
    )


def evaluate_on_validation(search: Search, student: str) -> float | None:
    """Return mAP50 on the validation images; None if they have no truth. Test images
    are never read.
    """
    truth = search.validation_truth()
    if not truth:
        return None
    detections = _predict(search, {"student": student}, "val", truth)
    return average_precision(
        detections["student"],
        truth,
        len(search.config.classes),
        plus_one=search.config.evaluate.plus_one,
    ).map


def _predict(
    search: Search, weights: dict[str, str], split: str, image_ids: Container[str]
) -> dict[str, Mapping[str, Detections]]:
    """Return each detector's detections on those images of a split that are in
    ``image_ids``.
    """
    images_folder = search.shared_steps["images"].folder(search.root)
    images = read_images(images_folder, split)
    is_requested = [image in image_ids for image in images["image_id"].to_pylist()]
    images = images.filter(pa.array(is_requested, pa.bool_()))
    batches = predict_images(
        weights, images, with_found_range(search.config, images_folder)
    )
    detections = pa.concat_tables([tables.DETECTIONS.empty_table(), *batches])
    class_count = len(search.config.classes)
    return {
        name: tables.detections_by_image(
            detections.filter(pc.equal(detections["source"], name)), class_count
        )
        for name in weights
    }
