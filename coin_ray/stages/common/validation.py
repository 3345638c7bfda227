"""Validation: mAP50 on the labelled validation images, at once or during a training, by
Ray tasks of their own that hold up no step.

The training's worker saves the detector's weights in the step's folder; the process
that drives the run has them measured. So the worker waits for nothing, and a killed run
finds the weights that are still to be measured.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig, TrainingConfig
from coin_ray.evaluation.voc import average_precision
from coin_ray.stages.common.cluster import ensure_ray
from coin_ray.stages.common.image_tables import open_annotations, read_images
from coin_ray.stages.common.prediction import DetectorGroup
from coin_ray.stages.common.training_job import save_weights
from coin_ray.tables import Truth

VALIDATION_CURVE_FILE = "validation.json"
"""Lies beside ``curve.json`` and has its form: ``step`` (number of steps) and
``validation_map50``."""
POLL_SECONDS = 2.0
RETRIES = 3
"""Workers that one validation may lose."""


def read_validation_annotations(images_folder: str) -> dict[str, Truth]:
    """Return the annotations of the validation images by image id; empty if they have
    no boxes.
    """
    image_ids = read_images(images_folder, "val")["image_id"]
    annotations = open_annotations(images_folder).select(image_ids)
    has_boxes = any(len(truth.boxes) for truth in annotations.values())
    return annotations if has_boxes else {}


def measure_validation_map50(
    config: PipelineConfig, images_folder: str, name: str, weights: str
) -> float:
    """Return the mAP50 (VOC, area) of the detector ``name`` with these weights on the
    annotated validation images. Runs in this process.
    """
    annotations = read_validation_annotations(images_folder)
    images = read_images(images_folder, "val")
    annotated = [image_id in annotations for image_id in images["image_id"].to_pylist()]
    images = images.filter(pa.array(annotated, pa.bool_()))
    num_classes = len(config.classes)
    detectors = DetectorGroup({name: weights}, config)
    detections = tables.detections_by_image(detectors(images), num_classes)
    report = average_precision(
        detections, annotations, num_classes, plus_one=config.evaluate.plus_one
    )
    return report.map


@dataclass(frozen=True)
class CheckpointValidation:
    """Which checkpoints of one training are validated. ``state_key``: where the weights
    of the detector ``name`` are in a task's state.
    """

    config: PipelineConfig
    images_folder: str
    folder: str
    name: str
    state_key: str
    training: TrainingConfig

    @property
    def pending_folder(self) -> str:
        """The folder of weights to measure, and of the figures of those measured."""
        return storage.join(self.folder, "looks")

    def save_due_weights(self, steps: int, checkpoint: Mapping[str, Any]) -> None:
        """Save the detector's weights if a validation is due. The training's worker
        calls it with each checkpoint and the number of steps.

        A training that goes on from an earlier checkpoint comes to the same weights
        again; they are measured once.
        """
        if not self._is_due(steps):
            return
        weights = storage.join(self.pending_folder, f"{steps:09}.pt")
        # in this order: ``measure`` writes the figure, then removes the weights
        if storage.exists(weights) or storage.exists(_figure_uri(weights)):
            return
        save_weights(weights, checkpoint["task"][self.state_key])

    def _is_due(self, steps: int) -> bool:
        """Return whether a multiple of ``validate_every`` was passed since the last
        checkpoint, or training has ended.
        """
        if steps == self.training.steps:
            return True
        every = self.training.validate_every
        steps_before = max(steps - self.training.checkpoint_every, 0)
        return steps // every != steps_before // every

    def list_pending(self) -> list[str]:
        """Return the weights that are not measured yet, in the order of the steps."""
        return sorted(storage.list_files(self.pending_folder, ".pt"))

    def measure(self, weights: str) -> None:
        """Measure the weights and replace them with their figure."""
        storage.set_patience(self.config.storage.patience)
        map50 = measure_validation_map50(
            self.config, self.images_folder, self.name, weights
        )
        file_name = weights.rpartition("/")[2]
        step = int(file_name.removesuffix(".pt"))
        figure = {"step": step, "validation_map50": round(map50, 4)}
        storage.write_json(_figure_uri(weights), figure)
        storage.remove(weights)

    def list_figures(self) -> list[str]:
        """Return the files of the figures, in the order of the steps."""
        return sorted(storage.list_files(self.pending_folder, ".json"))

    def read_curve(self) -> list[dict[str, float]]:
        """Return the figures, in the order of the steps."""
        return [storage.read_json(uri) for uri in self.list_figures()]


def _figure_uri(weights: str) -> str:
    return weights.removesuffix(".pt") + ".json"


def plan_validation(
    config: PipelineConfig,
    images_folder: str,
    folder: str,
    name: str,
    state_key: str,
    training: TrainingConfig,
) -> CheckpointValidation | None:
    """Return which checkpoints to validate; None unless ``validate_every`` is set and
    validation images are labelled.
    """
    if not training.validate_every:
        return None
    if not read_validation_annotations(images_folder):
        print(
            "validate_every has no effect: no validation image is labelled. Name labelled"
            " ones with --val DIR",
            flush=True,
        )
        return None
    return CheckpointValidation(
        config, images_folder, folder, name, state_key, training
    )


@contextmanager
def validate_during_training(validation: CheckpointValidation | None) -> Iterator[None]:
    """Measure the weights that the training in the ``with`` block saves, one after the
    other; after it measure the pending ones and write ``VALIDATION_CURVE_FILE``.
    """
    if validation is None:
        yield
        return
    ended = threading.Event()
    failed = threading.Event()
    watcher = threading.Thread(
        target=partial(_measure_until_ended, validation, ended, failed),
        name="validation",
    )
    watcher.start()
    try:
        yield
    except BaseException:
        failed.set()
        raise
    finally:
        ended.set()
        watcher.join()
    curve_uri = storage.join(validation.folder, VALIDATION_CURVE_FILE)
    storage.write_json(curve_uri, validation.read_curve())
    for uri in validation.list_figures():
        storage.remove(uri)


def _measure_until_ended(
    validation: CheckpointValidation, ended: threading.Event, failed: threading.Event
) -> None:
    while not failed.is_set():
        is_last_round = ended.is_set()  # read before the pending weights are listed
        for weights in validation.list_pending():
            if not failed.is_set():
                _measure_in_task(validation, weights)
        if is_last_round:
            return
        ended.wait(POLL_SECONDS)


def _measure_in_task(validation: CheckpointValidation, weights: str) -> None:
    """Measure the weights in a process of their own. If that fails, the curve lacks a
    point and training goes on.
    """
    gpus = 1 if validation.training.gpu else 0
    try:
        ensure_ray()
        task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(
            CheckpointValidation.measure
        )
        ray.get(task.remote(validation, weights))
    except Exception as error:
        lines = str(error).strip().splitlines()
        reason = lines[-1] if lines else ""
        print(
            f"validation: {weights} could not be measured ({type(error).__name__}:"
            f" {reason[:300]}); training goes on",
            flush=True,
        )
        storage.remove(weights)
        return
    point = storage.read_json(_figure_uri(weights))
    print(
        f"validation after {point['step']} steps: mAP50"
        f" {100 * point['validation_map50']:.1f}",
        flush=True,
    )
