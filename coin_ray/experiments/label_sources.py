"""The labels that a finished run has for its images: of the cloud, of both teachers
where they agree, of the student, or fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from coin_ray import storage, tables
from coin_ray.cloud.answer_fusion import fuse_with_members
from coin_ray.cloud.protocol import RawDetections
from coin_ray.config import PipelineConfig
from coin_ray.errors import StepError
from coin_ray.evaluation.fusion_baselines import static_fusion
from coin_ray.runs.graph import build_steps
from coin_ray.runs.lease import hold_root
from coin_ray.runs.steps import Step, make_context
from coin_ray.stages.common.image_tables import read_images
from coin_ray.stages.common.teacher_outputs import open_collected, open_corrections
from coin_ray.structures import Detections

Floats = NDArray[np.float32]
SOURCES = ("fused", "student", "cloud", "consistent")
STEPS_OF_SOURCE = {
    "fused": ("collect", "distill"),
    "student": ("distill",),
    "cloud": ("collect",),
    "consistent": ("separate",),
}
"""Steps that must be finished, besides ``images``."""
FUSION_IOU = 0.55
TEACHERS_WEIGHT, STUDENT_WEIGHT = 1.0, 1.0
KIND_OF_MEMBERS = {
    (True, True): "both",
    (True, False): "teachers",
    (False, True): "student",
}
"""Kind of a fused box by whether teachers and student have a box in it."""
PREDICTIONS_FOLDER = "labels"


@dataclass(frozen=True, slots=True, eq=False)
class ScoredLabels:
    """Boxes of one image before a threshold: ``boxes`` [N, 4] xyxy pixels, ``scores``
    [N], ``labels`` [N], ``probs`` [N, K+1], ``kinds`` N.

    ``disputed`` [N] bool: the teachers do not agree, so the box is never an object.
    ``reviewed``: a person has labelled the image.
    """

    image_id: str
    boxes: Floats
    scores: Floats
    labels: NDArray[np.int64]
    probs: Floats
    kinds: list[str]
    disputed: NDArray[np.bool_]
    reviewed: bool = False


class FinishedRun:
    """The finished steps of a run that labels come from. Raises StepError naming a step
    that is not finished.
    """

    def __init__(self, root: str, config: PipelineConfig, source: str) -> None:
        self.root, self.source = root, source
        self.steps = build_steps(config)
        needed = {"images", "corrections", *STEPS_OF_SOURCE[source]}
        for name in needed & self.steps.keys():
            if not self.steps[name].is_finished(root):
                raise StepError(
                    f"labels of {source} need the finished step {name} below {root};"
                    f" run coin-ray adapt --config {root}/config.yaml first"
                )
        self.config = make_context(self.steps["separate"], config, root).config

    def folder(self, step: str) -> str:
        """Return the folder of a step's results."""
        return self.steps[step].folder(self.root)

    def fingerprints(self) -> list[str]:
        """Return the folder names of the steps that the labels come from."""
        names = ("images", *STEPS_OF_SOURCE[self.source])
        return [f"{name}-{self.steps[name].fingerprint}" for name in names]

    @property
    def num_classes(self) -> int:
        return len(self.config.classes)

    @cached_property
    def corrections(self) -> Mapping[str, Detections]:
        """Return people's labels by image id; empty in a run without corrections."""
        folders = {
            name: self.folder(name) for name in self.steps if name == "corrections"
        }
        return open_corrections(folders, self.config)

    def images(self, split: str) -> pa.Table:
        """Return the images of a split, each once."""
        return read_images(self.folder("images"), split)

    def labels(self, split: str) -> Iterator[ScoredLabels]:
        """Yield the labels of the split's images that have any answer, none of them a
        person's. Labels of other splits may be among them.
        """
        makers: dict[str, Callable[[str], Iterator[ScoredLabels]]] = {
            "cloud": self._cloud_labels,
            "consistent": self._consistent_labels,
            "student": self._student_labels,
            "fused": self._fused_labels,
        }
        return makers[self.source](split)

    def reviewed_labels(self) -> Iterator[ScoredLabels]:
        """Yield the labels of the images that a person has reviewed."""
        for image_id, detections in self.corrections.items():
            count = len(detections)
            yield ScoredLabels(
                image_id,
                *_arrays(detections),
                ["reviewed"] * count,
                np.zeros(count, np.bool_),
                reviewed=True,
            )

    def _cloud_labels(self, split: str) -> Iterator[ScoredLabels]:
        uri = storage.join(self.folder("collect"), "cloud.parquet")
        return self._read_detections(uri, "cloud")

    def _student_labels(self, split: str) -> Iterator[ScoredLabels]:
        return self._read_detections(self.predict(split), "student")

    def _read_detections(self, uri: str, kind: str) -> Iterator[ScoredLabels]:
        """Yield the rows of a ``DETECTIONS`` file that are answers."""
        columns = ["image_id", "status", "boxes", "scores", "labels", "probs"]
        failed = set(tables.FAILED_STATUSES.to_pylist())
        for block in storage.stream_table(uri, columns):
            starts = _row_starts(block, "scores")
            boxes = _floats(block, "boxes").reshape(-1, 4)
            scores = _floats(block, "scores")
            labels = _values(block, "labels").to_numpy(zero_copy_only=False)
            probs = _floats(block, "probs").reshape(-1, self.num_classes + 1)
            ids = block["image_id"].to_pylist()
            for row, status in enumerate(block["status"].to_pylist()):
                if status in failed:
                    continue
                part = slice(starts[row], starts[row + 1])
                count = part.stop - part.start
                yield ScoredLabels(
                    ids[row],
                    boxes[part],
                    scores[part],
                    labels[part],
                    probs[part],
                    [kind] * count,
                    np.zeros(count, np.bool_),
                )

    def _consistent_labels(self, split: str) -> Iterator[ScoredLabels]:
        """Yield all boxes of the separation: those that are not consistent are
        disputed. The score is the mean of both teachers' probabilities of the label, of
        a private box its one teacher's.
        """
        uri = storage.join(self.folder("separate"), "separation.parquet")
        for block in storage.stream_table(uri):
            starts = _row_starts(block, "kind")
            boxes = _floats(block, "boxes").reshape(-1, 4)
            kinds = _values(block, "kind").to_pylist()
            labels = _values(block, "cloud_labels").to_numpy(zero_copy_only=False)
            width = self.num_classes + 1
            cloud = _floats(block, "cloud_probs").reshape(-1, width)
            clip = _floats(block, "clip_probs").reshape(-1, width)
            is_private = np.array([kind == "private" for kind in kinds], np.bool_)
            probs = np.where(is_private[:, None], cloud, (cloud + clip) / 2)
            scores = probs[np.arange(len(labels)), labels]
            disputed = np.array([kind != "consistent" for kind in kinds], np.bool_)
            for row, image_id in enumerate(block["image_id"].to_pylist()):
                part = slice(starts[row], starts[row + 1])
                yield ScoredLabels(
                    image_id,
                    boxes[part],
                    scores[part],
                    labels[part],
                    probs[part],
                    kinds[part],
                    disputed[part],
                )

    def _fused_labels(self, split: str) -> Iterator[ScoredLabels]:
        """Yield the fusion of the teachers' static fusion and the student's
        predictions, of images that the cloud has answered.
        """
        collect = self.folder("collect")
        cloud = open_collected(collect, "cloud", self.config)
        clip = None
        if self.config.collect.labeler != "none":
            clip = open_collected(collect, "clip_labels", self.config)
        for student in self._student_labels(split):
            if student.image_id not in cloud:
                continue
            teachers = cloud[student.image_id]
            if clip is not None:
                teachers = static_fusion(teachers, clip[student.image_id].probs)
            yield fuse_labels(teachers, student)

    def predict(self, split: str) -> str:
        """Return the URI of the student's predictions, made if they do not exist yet; a
        killed prediction continues where it stopped.
        """
        export = self.steps["export"]
        folder = storage.join(
            self.root, PREDICTIONS_FOLDER, f"student-{export.fingerprint}", split
        )
        uri = storage.join(folder, "student.parquet")
        if not storage.exists(uri):
            with hold_root(self.root):
                self._write_predictions(self.steps["distill"], split, folder)
        return uri

    def _write_predictions(self, distill: Step, split: str, folder: str) -> None:
        # imported only if needed, since it imports Ray
        from coin_ray.stages.common.prediction import write_predictions

        weights = {"student": storage.join(distill.folder(self.root), "detector.pt")}
        write_predictions(weights, self.images(split), self.config, folder)


def fuse_labels(teachers: Detections, student: ScoredLabels) -> ScoredLabels:
    """Fuse the boxes of teachers and student in one image (weighted box fusion with
    IoU ``FUSION_IOU``).

    A box that only one of them has keeps half its score. Probabilities are the mean of
    both; where one has no box its share is background.
    """
    num_classes = teachers.num_classes
    answers, vectors = [], []
    for boxes, scores, labels, probs in (
        _arrays(teachers),
        (student.boxes, student.scores, student.labels, student.probs),
    ):
        answers.append(_raw_detections(boxes, scores, labels, num_classes))
        background = np.zeros((1, num_classes + 1), np.float32)
        background[0, -1] = 1
        # row -1 is what an answer without the box says of it
        vectors.append(np.concatenate([probs, background]))
    weights = (TEACHERS_WEIGHT, STUDENT_WEIGHT)
    fused, members = fuse_with_members(answers, weights, FUSION_IOU)
    has_box = members >= 0
    shares = np.array(weights, np.float32) / sum(weights)
    probs = (
        shares[0] * vectors[0][members[:, 0]] + shares[1] * vectors[1][members[:, 1]]
    )
    return ScoredLabels(
        student.image_id,
        fused.boxes,
        fused.class_scores.max(1, initial=0),
        fused.class_scores.argmax(1) if len(fused) else np.zeros(0, np.int64),
        probs,
        [KIND_OF_MEMBERS[a, b] for a, b in has_box.tolist()],
        np.zeros(len(fused), np.bool_),
    )


def _arrays(
    detections: Detections,
) -> tuple[Floats, Floats, NDArray[np.int64], Floats]:
    """Return boxes, scores, labels and probs."""
    return (
        detections.boxes.numpy(),
        detections.scores.numpy(),
        detections.labels.numpy(),
        detections.probs.numpy(),
    )


def _raw_detections(
    boxes: Floats, scores: Floats, labels: NDArray[np.int64], num_classes: int
) -> RawDetections:
    """Return detections that give their score to the label alone."""
    class_scores = np.zeros((len(scores), num_classes), np.float32)
    class_scores[np.arange(len(scores)), labels] = scores
    return RawDetections(boxes.reshape(-1, 4), class_scores, "per_class")


def to_detections(labels: ScoredLabels) -> Detections:
    """Return the boxes that are not disputed."""
    rows = ~labels.disputed
    return Detections(
        torch.from_numpy(np.ascontiguousarray(labels.boxes[rows])).float(),
        torch.from_numpy(np.ascontiguousarray(labels.scores[rows])).float(),
        torch.from_numpy(np.ascontiguousarray(labels.labels[rows])),
        torch.from_numpy(np.ascontiguousarray(labels.probs[rows])).float(),
    )


def _values(block: pa.Table, name: str) -> pa.Array:
    """Return the entries of all lists of a column."""
    return block[name].combine_chunks().flatten()


def _floats(block: pa.Table, name: str) -> Floats:
    """Return the numbers of a column of lists of lists."""
    values = _values(block, name)
    while not pa.types.is_floating(values.type):
        values = values.flatten()
    numbers: Floats = values.to_numpy(zero_copy_only=False)
    return numbers


def _row_starts(block: pa.Table, name: str) -> list[int]:
    """Return where the entries of each row begin, and the end [rows + 1]."""
    lengths = block[name].combine_chunks().value_lengths().to_numpy()
    starts: list[int] = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    return starts
