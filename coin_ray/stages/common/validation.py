"""Validation: mAP50 on the labelled validation images, at once or beside a training, by
tasks of their own that hold up no step.

The training's worker leaves the detector's weights in the step's folder; whoever drives
the run sees them and has them measured. So the worker waits for nothing, and a killed
run finds what is still to be measured.
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
from coin_ray.stages.common.prediction import Detectors
from coin_ray.stages.common.teacher_outputs import image_table, truth_of
from coin_ray.stages.common.training_job import save_weights
from coin_ray.tables import Truth

CURVE = "validation.json"
"""Beside ``curve.json`` and in its form: ``step`` (steps made) and
``validation_map50``."""
POLL = 2.0
RETRIES = 3
"""Workers that a look may lose."""


def validation_truth(images: str) -> dict[str, Truth]:
    """Truth of the validation images of a step images' folder; empty if they have no
    boxes.
    """
    chosen = truth_of(images).of(image_table(images, "val")["image_id"])
    return chosen if any(len(annotated.boxes) for annotated in chosen.values()) else {}


def validation_map50(
    config: PipelineConfig, images: str, name: str, weights: str
) -> float:
    """mAP50 (VOC, area) of the detector ``name`` with these weights on the annotated
    validation images, in this very process.
    """
    truth = validation_truth(images)
    table = image_table(images, "val")
    table = table.filter(
        pa.array([i in truth for i in table["image_id"].to_pylist()], pa.bool_())
    )
    found = tables.read_detections(
        Detectors({name: weights}, config)(table), len(config.classes)
    )
    return average_precision(
        found, truth, len(config.classes), plus_one=config.evaluate.plus_one
    ).map


@dataclass(frozen=True)
class Looks:
    """Of one training: at which of its states to look. ``part``: where the detector
    ``name`` is in a task's state.
    """

    config: PipelineConfig
    images: str
    folder: str
    name: str
    part: str
    optimize: TrainingConfig

    @property
    def place(self) -> str:
        return storage.join(self.folder, "looks")

    def leave(self, step: int, state: Mapping[str, Any]) -> None:
        """The worker's side, told of each saved state after ``step`` steps: the
        weights, if it is time for a look.

        A training that goes on from an earlier state comes to the same weights again;
        one look at them is enough.
        """
        every, before = (
            self.optimize.validate_every,
            step - self.optimize.checkpoint_every,
        )
        weights = storage.join(self.place, f"{step:09}.pt")
        if step // every == max(before, 0) // every and step != self.optimize.steps:
            return
        # in this order: a look writes its figure, then removes the weights
        if storage.exists(weights) or storage.exists(_figure(weights)):
            return
        save_weights(weights, state["task"][self.part])

    def waiting(self) -> list[str]:
        """Weights that nobody has looked at, in the order of the steps."""
        return sorted(storage.list_files(self.place, ".pt"))

    def look(self, weights: str) -> None:
        """Measure and leave the figure in the weights' place."""
        figure = validation_map50(self.config, self.images, self.name, weights)
        step = int(weights.rsplit("/", 1)[-1].removesuffix(".pt"))
        storage.write_json(
            _figure(weights), {"step": step, "validation_map50": round(figure, 4)}
        )
        storage.remove(weights)

    def curve(self) -> list[dict[str, float]]:
        return [
            storage.read_json(place)
            for place in sorted(storage.list_files(self.place, ".json"))
        ]


def _figure(weights: str) -> str:
    return weights.removesuffix(".pt") + ".json"


def looks(
    config: PipelineConfig,
    images: str,
    folder: str,
    name: str,
    part: str,
    optimize: TrainingConfig,
) -> Looks | None:
    """None unless ``validate_every`` is set and validation images are labelled."""
    if not optimize.validate_every:
        return None
    if not validation_truth(images):
        print(
            "validate_every: no validation image is labelled (--val DIR), so there is"
            " nothing to look at",
            flush=True,
        )
        return None
    return Looks(config, images, folder, name, part, optimize)


@contextmanager
def beside(wanted: Looks | None) -> Iterator[None]:
    """Look at what the training inside leaves, one look at a time; then finish what is
    waiting and write ``CURVE``.
    """
    if wanted is None:
        yield
        return
    ended, failed = threading.Event(), threading.Event()
    watcher = threading.Thread(
        target=partial(_follow, wanted, ended, failed), name="validation"
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
    storage.write_json(storage.join(wanted.folder, CURVE), wanted.curve())
    for place in storage.list_files(wanted.place, ".json"):
        storage.remove(place)


def _follow(wanted: Looks, ended: threading.Event, failed: threading.Event) -> None:
    while not failed.is_set():
        last = ended.is_set()  # before what is waiting is listed
        for weights in wanted.waiting():
            if not failed.is_set():
                _look(wanted, weights)
        if last:
            return
        ended.wait(POLL)


def _look(wanted: Looks, weights: str) -> None:
    """In a process of its own. A look that fails costs a point of the curve, not the
    training.
    """
    gpus = 1 if wanted.optimize.gpu else 0
    try:
        ensure_ray()
        ray.get(
            ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(
                Looks.look
            ).remote(wanted, weights)
        )
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[-1]
        print(
            f"validation: {weights} could not be measured ({type(error).__name__}:"
            f" {reason[:300]}); the training goes on",
            flush=True,
        )
        storage.remove(weights)
        return
    point = storage.read_json(_figure(weights))
    print(
        f"validation after {point['step']} steps: mAP50"
        f" {100 * point['validation_map50']:.1f}",
        flush=True,
    )
