"""The labels that a finished run has for its images: of the cloud, of both teachers
where they agree, of the student, or fused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.data.formats.ragged import Integers, rows_of_images, starts_of
from coin_ray.errors import StepError
from coin_ray.evaluation.fusion_baselines import static_fusion
from coin_ray.experiments.image_rows import RowsById
from coin_ray.experiments.label_fusion import SHARE, LabelledBoxes, fuse_boxes
from coin_ray.runs.graph import build_steps, delivered_step
from coin_ray.runs.lease import hold_root
from coin_ray.runs.steps import Step, make_context
from coin_ray.stages.common.image_tables import read_images
from coin_ray.stages.common.teacher_outputs import open_corrections
from coin_ray.structures import Detections

Floats = NDArray[np.float32]
SOURCES = ("fused", "student", "cloud", "consistent")
STEPS_OF_SOURCE = {
    "fused": ("collect", "distill", "choose"),
    "student": ("distill", "choose"),
    "cloud": ("collect",),
    "consistent": ("separate",),
}
"""Steps that must be finished, besides ``images``, if they are part of the run."""
FUSION_IOU = 0.55
KIND_OF_MEMBERS = np.array(["", "teachers", "student", "both"], np.object_)
"""Kind of a fused box: 1 for the teachers' box in it, and 2 for the student's."""
PREDICTIONS_FOLDER = "labels"


@dataclass(frozen=True, slots=True, eq=False)
class ScoredLabels:
    """Boxes of images before a threshold: those of image i are the rows ``starts[i]``
    up to ``starts[i + 1]`` of ``boxes`` [M, 4] xyxy pixels, ``scores``, ``labels``,
    ``kinds`` [M] and ``probs`` [M, K+1].

    ``disputed`` [M] bool: the teachers do not agree, so the box is never an object.
    ``reviewed``: a person has labelled the images.
    """

    image_ids: Sequence[str]
    starts: Integers
    boxes: Floats
    scores: Floats
    labels: Integers
    probs: Floats
    kinds: NDArray[np.object_]
    disputed: NDArray[np.bool_]
    reviewed: bool = False

    def select(self, images: Integers) -> ScoredLabels:
        """Return the images at these positions."""
        if np.array_equal(images, np.arange(len(self.image_ids))):
            return self
        rows = rows_of_images(self.starts, images)
        return ScoredLabels(
            [self.image_ids[position] for position in images.tolist()],
            starts_of(np.diff(self.starts)[images]),
            self.boxes[rows],
            self.scores[rows],
            self.labels[rows],
            self.probs[rows],
            self.kinds[rows],
            self.disputed[rows],
            self.reviewed,
        )


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
        return [
            f"{name}-{self.steps[name].fingerprint}"
            for name in names
            if name in self.steps
        ]

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
        person's, in blocks. Labels of other splits may be among them.
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
                [image_id],
                np.array([0, count]),
                detections.boxes.numpy(),
                detections.scores.numpy(),
                detections.labels.numpy(),
                detections.probs.numpy(),
                np.full(count, "reviewed", np.object_),
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
        for block in storage.stream_table(uri, tables.DETECTION_COLUMNS):
            failed = pc.is_in(block["status"], value_set=tables.FAILED_STATUSES)
            yield _scored_labels(block.filter(pc.invert(failed)), kind)

    def _consistent_labels(self, split: str) -> Iterator[ScoredLabels]:
        """Yield all boxes of the separation: those that are not consistent are
        disputed. The score is the mean of both teachers' probabilities of the label, of
        a private box its one teacher's.
        """
        uri = storage.join(self.folder("separate"), "separation.parquet")
        for block in storage.stream_table(uri):
            kinds = _values(block, "kind").to_numpy(zero_copy_only=False)
            labels = _values(block, "cloud_labels").to_numpy(zero_copy_only=False)
            width = self.num_classes + 1
            cloud = _floats(block, "cloud_probs").reshape(-1, width)
            clip = _floats(block, "clip_probs").reshape(-1, width)
            is_private = kinds == "private"
            probs = np.where(is_private[:, None], cloud, (cloud + clip) / 2)
            yield ScoredLabels(
                block["image_id"].to_pylist(),
                _row_starts(block, "kind"),
                _floats(block, "boxes").reshape(-1, 4),
                probs[np.arange(len(labels)), labels],
                labels,
                probs,
                kinds.astype(np.object_),
                kinds != "consistent",
            )

    def _fused_labels(self, split: str) -> Iterator[ScoredLabels]:
        """Yield the fusion of the teachers' static fusion and the student's
        predictions, of images that the cloud has answered.
        """
        collect = self.folder("collect")
        cloud = _AnswersById(storage.join(collect, "cloud.parquet"))
        clip = None
        if self.config.collect.labeler != "none":
            clip = _AnswersById(storage.join(collect, "clip_labels.parquet"))
        for student in self._student_labels(split):
            answered = student.select(cloud.find_answered(student.image_ids))
            teachers = cloud.read(answered.image_ids, "teachers")
            if clip is not None:
                clip_labels = clip.read(answered.image_ids, "teachers")
                teachers = _fuse_teachers(teachers, clip_labels)
            yield fuse_labels(teachers, answered)

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
                self._write_predictions(delivered_step(self.steps), split, folder)
        return uri

    def _write_predictions(self, delivered: Step, split: str, folder: str) -> None:
        # imported only if needed, since it imports Ray
        from coin_ray.stages.common.prediction import write_predictions

        weights = {"student": storage.join(delivered.folder(self.root), "detector.pt")}
        write_predictions(weights, self.images(split), self.config, folder)


class _AnswersById:
    """The answers of a ``DETECTIONS`` file, whose boxes stay on the disk."""

    def __init__(self, uri: str) -> None:
        table = storage.open_table(uri, tables.DETECTION_COLUMNS)
        failed = pc.is_in(table["status"], value_set=tables.FAILED_STATUSES)
        self.uri, self.table = uri, table
        self.table_rows = np.flatnonzero(~failed.to_numpy())
        self.rows = RowsById(table["image_id"].filter(pc.invert(failed)))

    def find_answered(self, image_ids: Sequence[str]) -> Integers:
        """Return the positions of the images that have an answer."""
        return np.flatnonzero(self.rows.find(image_ids) >= 0)

    def read(self, image_ids: Sequence[str], kind: str) -> ScoredLabels:
        """Return the answers about these images. Raises StepError if one has none."""
        positions = self.rows.find(image_ids)
        if (positions < 0).any():
            missing = image_ids[int(positions.argmin())]
            raise StepError(
                f"{self.uri} has no answer about the image {missing}, which the cloud"
                " has answered; delete the folder and run the step collect again"
            )
        rows = self.table_rows[positions]
        first, end = int(rows.min(initial=0)), int(rows.max(initial=-1)) + 1
        # the tables are in one order, so that these are the rows alone, or few more
        block = self.table.slice(first, end - first)
        if not np.array_equal(rows, np.arange(first, end)):
            block = block.take(pa.array(rows - first))
        return _scored_labels(block, kind)


def _scored_labels(block: pa.Table, kind: str) -> ScoredLabels:
    """Return the labels of rows of a ``DETECTIONS`` table."""
    scores = _floats(block, "scores")
    count, image_ids = len(scores), block["image_id"].to_pylist()
    probs = _floats(block, "probs")
    width = len(probs) // count if count else 1
    return ScoredLabels(
        image_ids,
        _row_starts(block, "scores"),
        _floats(block, "boxes").reshape(-1, 4),
        scores,
        _values(block, "labels").to_numpy(zero_copy_only=False).astype(np.int64),
        probs.reshape(count, width),
        np.full(count, kind, np.object_),
        np.zeros(count, np.bool_),
    )


def _fuse_teachers(cloud: ScoredLabels, clip: ScoredLabels) -> ScoredLabels:
    """Return the static fusion of the cloud's boxes and what CLIP calls them."""
    clip_probs = torch.from_numpy(np.ascontiguousarray(clip.probs))
    fused = static_fusion(undisputed_detections(cloud), clip_probs)
    return replace(
        cloud,
        scores=fused.scores.numpy(),
        labels=fused.labels.numpy(),
        probs=fused.probs.numpy(),
    )


def fuse_labels(teachers: ScoredLabels, student: ScoredLabels) -> ScoredLabels:
    """Fuse the boxes of teachers and student in the same images (weighted box fusion
    with IoU ``FUSION_IOU``).

    A box that only one of them has keeps half its score. Probabilities are the mean of
    both; where one has no box its share is background.
    """
    fused = fuse_boxes(_boxes_of(teachers), _boxes_of(student), FUSION_IOU)
    width = max(teachers.probs.shape[1], student.probs.shape[1])
    probs = np.zeros((len(fused.scores), width), np.float32)
    for column, labels in enumerate((teachers, student)):
        rows = fused.members[:, column]
        has_box = rows >= 0
        probs[has_box] += SHARE * labels.probs[rows[has_box]]
        probs[~has_box, -1] += SHARE
    kinds = KIND_OF_MEMBERS[(fused.members >= 0) @ (1, 2)]
    return ScoredLabels(
        student.image_ids,
        fused.starts,
        fused.boxes,
        fused.scores,
        fused.labels,
        probs,
        kinds,
        np.zeros(len(kinds), np.bool_),
    )


def _boxes_of(labels: ScoredLabels) -> LabelledBoxes:
    return LabelledBoxes(labels.starts, labels.boxes, labels.scores, labels.labels)


def undisputed_detections(labels: ScoredLabels) -> Detections:
    """Return the boxes of all images that are not disputed."""
    rows = ~labels.disputed
    return Detections(
        torch.from_numpy(labels.boxes[rows]).float(),
        torch.from_numpy(labels.scores[rows]).float(),
        torch.from_numpy(labels.labels[rows]),
        torch.from_numpy(labels.probs[rows]).float(),
    )


def _values(block: pa.Table, name: str) -> pa.Array:
    """Return the entries of all lists of a column."""
    return _joined(block[name]).flatten()


def _joined(column: pa.ChunkedArray) -> pa.Array:
    """Return a column of a block as one array."""
    if column.num_chunks == 1:
        return column.chunk(0)
    return (
        pa.concat_arrays(column.chunks)
        if column.num_chunks
        else column.combine_chunks()
    )


def _floats(block: pa.Table, name: str) -> Floats:
    """Return the numbers of a column of lists of lists."""
    values = _values(block, name)
    while not pa.types.is_floating(values.type):
        values = values.flatten()
    numbers: Floats = values.to_numpy(zero_copy_only=False)
    return numbers


def _row_starts(block: pa.Table, name: str) -> Integers:
    """Return where the entries of each row begin, and the end [rows + 1]."""
    return starts_of(_joined(block[name]).value_lengths().to_numpy())
