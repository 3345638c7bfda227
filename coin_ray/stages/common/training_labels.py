"""The labels of the training images, from teachers or from the truth, with people's
corrections in place of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from coin_ray import storage
from coin_ray.config import Labels, PipelineConfig
from coin_ray.data.examples import LabelLookup, TableExamples
from coin_ray.errors import InputError
from coin_ray.stages.common.image_tables import open_annotations, read_images
from coin_ray.stages.common.teacher_outputs import (
    open_collected,
    open_corrections,
    select_clip_labels,
    select_cloud_labels,
)
from coin_ray.structures import Detections
from coin_ray.tables import DetectionsTable, TruthTable

LabelSource = Literal["clip", "cloud", "truth"]


class TrainingLabels(NamedTuple):
    """Ids of the images that have labels, the labels of each by name, and the labels of
    the images that people have reviewed.
    """

    image_ids: pa.Array | pa.ChunkedArray
    lookup: LabelLookup
    reviewed: Mapping[str, Detections]


def is_held_out(image_id: str, share: float) -> bool:
    """Return whether an image is among the ``share`` of all that a search keeps from
    training; its id alone decides.
    """
    return int(image_id[:8], 16) < share * 16**8


def open_training_labels(
    source: LabelSource, folders: Mapping[str, str], config: PipelineConfig
) -> TrainingLabels:
    """Return ``labels`` of each training image: CLIP's on the cloud's boxes (the cloud's
    own without CLIP), the cloud's, or the truth (the oracle). A person's come first, but
    not before the truth.
    """
    if source == "truth":
        annotations = open_annotations(folders["images"])
        image_ids = _annotated_training_images(annotations, folders["images"])
        lookup: LabelLookup = partial(_look_up_truth, annotations, len(config.classes))
        return TrainingLabels(image_ids, lookup, {})
    cloud = open_collected(folders["collect"], "cloud", config)
    if source == "clip" and config.collect.labeler != "none":
        clip = open_collected(folders["collect"], "clip_labels", config)
        lookup = partial(_look_up_clip_labels, cloud, clip, config.labels)
    else:
        lookup = partial(_look_up_cloud_labels, cloud, config.labels)
    reviewed = open_corrections(folders, config)
    return add_corrections(cloud.ids, lookup, ("labels",), reviewed)


def _look_up_truth(
    annotations: TruthTable, num_classes: int, image_id: str
) -> dict[str, Detections]:
    truth = annotations[image_id]
    boxes = truth.boxes[~truth.difficult]
    labels = truth.labels[~truth.difficult]
    probs = F.one_hot(labels, num_classes + 1).float()
    return {"labels": Detections(boxes, torch.ones(len(labels)), labels, probs)}


def _look_up_cloud_labels(
    cloud: DetectionsTable, labels: Labels, image_id: str
) -> dict[str, Detections]:
    return {"labels": select_cloud_labels(cloud[image_id], labels)}


def _look_up_clip_labels(
    cloud: DetectionsTable, clip: DetectionsTable, labels: Labels, image_id: str
) -> dict[str, Detections]:
    return {"labels": select_clip_labels(cloud[image_id], clip[image_id], labels)}


def add_corrections(
    image_ids: pa.Array | pa.ChunkedArray,
    lookup: LabelLookup,
    names: Sequence[str],
    reviewed: Mapping[str, Detections],
) -> TrainingLabels:
    """Return the labels with the reviewed images: there each of ``names`` is what the
    person said, also where no teacher had an answer.
    """
    if not reviewed:
        return TrainingLabels(image_ids, lookup, reviewed)
    if isinstance(image_ids, pa.ChunkedArray):
        image_ids = image_ids.combine_chunks()
    reviewed_ids = pa.array(list(reviewed), image_ids.type)
    return TrainingLabels(
        pa.concat_arrays([image_ids, reviewed_ids]),
        partial(_look_up_corrected, reviewed, lookup, names),
        reviewed,
    )


def _look_up_corrected(
    reviewed: Mapping[str, Detections],
    lookup: LabelLookup,
    names: Sequence[str],
    image_id: str,
) -> Mapping[str, Detections]:
    correction = reviewed.get(image_id)
    if correction is None:
        return lookup(image_id)
    return dict.fromkeys(names, correction)


def build_training_examples(
    images_folder: str,
    labels: TrainingLabels,
    intensity_range: tuple[float, float] | None = None,
) -> TableExamples:
    """Return the training images that have labels, as examples. ``intensity_range``: of
    deep grey images.
    """
    uri = storage.join(images_folder, "images.parquet")
    images = storage.open_table(uri, ("image_id", "split"))
    in_training = pc.equal(images["split"], "train")
    labelled = pc.is_in(images["image_id"], value_set=labels.image_ids)
    rows = np.flatnonzero(pc.and_(in_training, labelled).to_numpy())
    return TableExamples(uri, rows, labels.lookup, labels.reviewed, intensity_range)


def count_labels(
    source: LabelSource, folders: Mapping[str, str], config: PipelineConfig
) -> int:
    """Return how many boxes ``open_training_labels`` has for all training images
    together. They are counted in the tables: building an example takes half a
    millisecond.
    """
    if source == "truth":
        annotations = open_annotations(folders["images"])
        image_ids = _annotated_training_images(annotations, folders["images"])
        return sum(
            int((~annotations[image_id.as_py()].difficult).sum())
            for image_id in image_ids
        )
    reviewed = open_corrections(folders, config)
    image_ids = read_images(folders["images"], "train")["image_id"]
    reviewed_ids = pa.array(list(reviewed), pa.string())
    image_ids = image_ids.filter(pc.invert(pc.is_in(image_ids, value_set=reviewed_ids)))
    cloud_blocks = storage.stream_table(
        storage.join(folders["collect"], "cloud.parquet"), ("image_id", "scores")
    )
    clip_blocks: Iterable[pa.Table | None] = repeat(None)
    if source == "clip" and config.collect.labeler != "none":
        # its rows are those of cloud.parquet, in the same order
        clip_blocks = storage.stream_table(
            storage.join(folders["collect"], "clip_labels.parquet"), ("scores", "probs")
        )
    count = sum(len(labels) for labels in reviewed.values())
    for cloud, clip in zip(cloud_blocks, clip_blocks, strict=False):
        count += _count_selected_boxes(cloud, clip, image_ids, config)
    return count


def _count_selected_boxes(
    cloud: pa.Table,
    clip: pa.Table | None,
    image_ids: pa.ChunkedArray,
    config: PipelineConfig,
) -> int:
    """Count the boxes of these images above the thresholds, in rows of ``cloud`` and the
    same rows of ``clip_labels``.
    """
    labels = config.labels
    num_classes = len(config.classes)
    rows = pc.is_in(cloud["image_id"], value_set=image_ids)
    scores = _flatten(cloud["scores"].filter(rows))
    selected = scores >= labels.score_min
    thresholds = labels.thresholds(num_classes)
    if thresholds is not None:
        box_labels = _flatten(cloud["labels"].filter(rows))
        selected = scores >= np.asarray(thresholds)[box_labels]
    if clip is not None:
        clip_scores = _flatten(clip["scores"].filter(rows))
        selected &= clip_scores >= labels.clip_score_min
        if labels.clip_background == "drop":
            probs = _flatten(pc.list_flatten(clip["probs"].filter(rows)))
            best_class = probs.reshape(-1, num_classes + 1).argmax(1)
            selected &= best_class < num_classes
    return int(selected.sum())


def _flatten(column: pa.ChunkedArray) -> NDArray[np.float32]:
    numbers: NDArray[np.float32] = pc.list_flatten(column).to_numpy()
    return numbers


def _annotated_training_images(
    annotations: TruthTable, images_folder: str
) -> pa.ChunkedArray:
    """Return the ids of the training images that have annotations. Raises InputError if
    none has.
    """
    training_ids = read_images(images_folder, "train")["image_id"]
    annotated = annotations.ids.filter(
        pc.is_in(annotations.ids, value_set=training_ids)
    )
    if not len(annotated):
        raise InputError(
            "the oracle baseline needs annotated training images; data.images has no"
            " labels in a format of docs/formats.md"
        )
    return annotated
