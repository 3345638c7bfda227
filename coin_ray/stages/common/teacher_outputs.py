"""What training reads of the collected tables: thresholds and label choices, applied
for free; and people's corrections above them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from coin_ray import storage, tables
from coin_ray.config import Labels, PipelineConfig
from coin_ray.data.examples import Know, TableExamples
from coin_ray.errors import InputError
from coin_ray.evaluation.fusion_baselines import static_fusion
from coin_ray.fusion.vectors import FORMS
from coin_ray.structures import Detections
from coin_ray.tables import DetectionsTable, TruthTable

LabelSource = Literal["clip", "cloud", "truth"]
OPINIONS = ("cloud", "clip", "clip_labels")
"""What distillation is told of an image: by the cloud, by the CLIP detector, and CLIP's
verdicts on the cloud's boxes."""


def image_table(folder: str, split: str) -> pa.Table:
    """The images of one split."""
    images = storage.read_table(storage.join(folder, "images.parquet"))
    return images.filter(pc.equal(images["split"], split))


def image_rows(folder: str, split: str) -> list[dict[str, object]]:
    """Rows of ``image_table``; for splits that are small."""
    rows: list[dict[str, object]] = image_table(folder, split).to_pylist()
    return rows


def truth_of(folder: str, name: str = "annotations") -> TruthTable:
    """All annotations of the step images."""
    return TruthTable(storage.join(folder, f"{name}.parquet"))


def held_out(image_id: str, share: float) -> bool:
    """Whether an image is among the ``share`` of all that a search keeps from training;
    decided by its id alone.
    """
    return int(image_id[:8], 16) < share * 16**8


def collected(folder: str, name: str, config: PipelineConfig) -> DetectionsTable:
    """All answered images of ``cloud`` or ``clip_labels``, full tail."""
    return tables.open_detections(
        storage.join(folder, f"{name}.parquet"), len(config.classes)
    )


def foreground_only(detections: Detections) -> Detections:
    """Class vectors normalised to the foreground, background exactly 0: the published
    form. Scores keep their rank.
    """
    foreground = detections.probs[:, :-1] / detections.probs[:, :-1].sum(
        1, keepdim=True
    ).clamp(min=1e-12)
    return Detections(
        detections.boxes,
        detections.scores,
        detections.labels,
        F.pad(foreground, (0, 1)),
    )


def cloud_knowledge(cloud: Detections, labels: Labels) -> Detections:
    """The cloud's results that take part in training."""
    kept = cloud[cloud.scores >= labels.score_min]
    return foreground_only(kept) if labels.probabilities == "published" else kept


def separated_cloud(cloud: Detections, labels: Labels) -> Detections:
    """The cloud's results as separation gets them."""
    return FORMS[labels.cloud_vectors](cloud_knowledge(cloud, labels))


def clip_labelled(cloud: Detections, clip: Detections, labels: Labels) -> Detections:
    """Cloud boxes above the threshold with CLIP's labels; row i of ``clip`` is CLIP's
    opinion of row i of ``cloud``.
    """
    used = (cloud.scores >= labels.score_min) & (clip.scores >= labels.clip_score_min)
    if labels.clip_background == "drop":
        used &= clip.probs.argmax(1) < clip.num_classes
    return clip[used]


def opinions(
    cloud: DetectionsTable, clip: DetectionsTable, folder: str, config: PipelineConfig
) -> Know:
    """What both teachers say of an image: ``cloud``, ``clip`` (the CLIP detector) and
    ``clip_labels``.

    The last are CLIP's verdicts that stand beside the CLIP detector's results in
    separation: none, unless ``separate.clip_labels``.
    """
    stands = config.separate.clip_labels and config.collect.labeler != "none"
    return partial(
        _opinions,
        cloud,
        clip,
        collected(folder, "clip_labels", config) if stands else None,
        config.labels,
    )


def _opinions(
    cloud: DetectionsTable,
    clip: DetectionsTable,
    labelled: DetectionsTable | None,
    labels: Labels,
    image_id: str,
) -> dict[str, Detections]:
    found = cloud[image_id]
    standing = (
        Detections.empty(cloud.num_classes)
        if labelled is None
        else clip_verdicts(found, labelled[image_id], labels)
    )
    return {
        "cloud": separated_cloud(found, labels),
        "clip": clip[image_id],
        "clip_labels": standing,
    }


def clip_verdicts(cloud: Detections, clip: Detections, labels: Labels) -> Detections:
    """CLIP's opinion of each cloud box above the threshold; ``labels`` is K where CLIP
    says "background", which no cloud label equals.
    """
    used = clip[cloud.scores >= labels.score_min]
    best = used.probs.max(1)
    return Detections(used.boxes, best.values, best.indices, used.probs)


def fused_opinions(
    images: Iterable[str], folders: Mapping[str, str], config: PipelineConfig
) -> dict[str, Detections]:
    """What a person says of each image, else what the free fusion of both teachers does
    (the cloud alone without CLIP). Unanswered images are left out.
    """
    cloud, reviewed = (
        collected(folders["collect"], "cloud", config),
        corrected(folders, config),
    )
    known = {
        i: reviewed[i] if i in reviewed else cloud[i]
        for i in images
        if i in reviewed or i in cloud
    }
    if config.collect.labeler == "none":
        return known
    clip = collected(folders["collect"], "clip_labels", config)
    return {
        i: found if i in reviewed else static_fusion(found, clip[i].probs)
        for i, found in known.items()
    }


def labels_for(
    source: LabelSource, folders: Mapping[str, str], config: PipelineConfig
) -> tuple[pa.Array, Know, Mapping[str, Detections]]:
    """Ids of the images with training labels, ``labels`` of each, and the images that
    people have labelled, whose word goes first.

    Labels are CLIP's on cloud boxes (the cloud's own without CLIP), the cloud's, or the
    truth (the oracle).
    """
    if source == "truth":
        truth, annotated = _annotated(folders["images"])
        return annotated, partial(_true_labels, truth, len(config.classes)), {}
    cloud = collected(folders["collect"], "cloud", config)
    know: Know = partial(_cloud_labels, cloud, config.labels)
    if source == "clip" and config.collect.labeler != "none":
        know = partial(
            _clip_labels,
            cloud,
            collected(folders["collect"], "clip_labels", config),
            config.labels,
        )
    return with_corrections(cloud.ids, know, ("labels",), corrected(folders, config))


def count_labels(
    source: LabelSource, folders: Mapping[str, str], config: PipelineConfig
) -> int:
    """Boxes that ``labels_for`` has for all training images together. Counted in the
    tables: building an example takes half a millisecond.
    """
    if source == "truth":
        truth, annotated = _annotated(folders["images"])
        return sum(int((~truth[i.as_py()].difficult).sum()) for i in annotated)
    reviewed = corrected(folders, config)
    train = image_table(folders["images"], "train")["image_id"]
    ids = train.filter(
        pc.invert(pc.is_in(train, value_set=pa.array(list(reviewed), pa.string())))
    )
    cloud = storage.stream_table(
        storage.join(folders["collect"], "cloud.parquet"), ("image_id", "scores")
    )
    clip: Iterable[pa.Table | None] = repeat(None)
    # row by row the cloud's boxes
    if source == "clip" and config.collect.labeler != "none":
        clip = storage.stream_table(
            storage.join(folders["collect"], "clip_labels.parquet"), ("scores", "probs")
        )
    used = sum(
        _used(ours, theirs, ids, config)
        for ours, theirs in zip(cloud, clip, strict=False)
    )
    return used + sum(map(len, reviewed.values()))


def _used(
    cloud: pa.Table, clip: pa.Table | None, ids: pa.ChunkedArray, config: PipelineConfig
) -> int:
    """Boxes of these images above the thresholds, in rows of ``cloud`` and the same
    rows of ``clip_labels``.
    """
    labels = config.labels
    wanted = pc.is_in(cloud["image_id"], value_set=ids)
    used = _flat(cloud["scores"].filter(wanted)) >= labels.score_min
    if clip is not None:
        used &= _flat(clip["scores"].filter(wanted)) >= labels.clip_score_min
        if labels.clip_background == "drop":
            probs = _flat(pc.list_flatten(clip["probs"].filter(wanted))).reshape(
                -1, len(config.classes) + 1
            )
            used &= probs.argmax(1) < len(config.classes)
    return int(used.sum())


def _flat(column: pa.ChunkedArray) -> NDArray[np.float32]:
    values: NDArray[np.float32] = pc.list_flatten(column).to_numpy()
    return values


def _true_labels(
    truth: TruthTable, classes: int, image_id: str
) -> dict[str, Detections]:
    known = truth[image_id]
    boxes, labels = known.boxes[~known.difficult], known.labels[~known.difficult]
    return {
        "labels": Detections(
            boxes,
            torch.ones(len(labels)),
            labels,
            F.one_hot(labels, classes + 1).float(),
        )
    }


def _cloud_labels(
    cloud: DetectionsTable, labels: Labels, image_id: str
) -> dict[str, Detections]:
    return {"labels": cloud_knowledge(cloud[image_id], labels)}


def _clip_labels(
    cloud: DetectionsTable, clip: DetectionsTable, labels: Labels, image_id: str
) -> dict[str, Detections]:
    return {"labels": clip_labelled(cloud[image_id], clip[image_id], labels)}


def corrected(
    folders: Mapping[str, str], config: PipelineConfig
) -> Mapping[str, Detections]:
    """What people say of the images they have reviewed; nothing in a run without
    corrections.
    """
    folder = folders.get("corrections")
    return (
        {}
        if folder is None
        else tables.open_detections(
            storage.join(folder, "corrections.parquet"), len(config.classes)
        )
    )


def with_corrections(
    known: pa.Array,
    know: Know,
    names: Sequence[str],
    reviewed: Mapping[str, Detections],
) -> tuple[pa.Array, Know, Mapping[str, Detections]]:
    """The same for ``reviewed`` images too: there every teacher (``names``) says what
    the person said, even where it had no answer.
    """
    if not reviewed:
        return known, know, reviewed
    ids = known.combine_chunks() if isinstance(known, pa.ChunkedArray) else known
    return (
        pa.concat_arrays([ids, pa.array(list(reviewed), ids.type)]),
        partial(_outranked, reviewed, know, names),
        reviewed,
    )


def _outranked(
    reviewed: Mapping[str, Detections], know: Know, names: Sequence[str], image_id: str
) -> Mapping[str, Detections]:
    person = reviewed.get(image_id)
    return know(image_id) if person is None else dict.fromkeys(names, person)


def training_examples(
    folder: str, known: pa.Array, know: Know, reviewed: Container[str] = ()
) -> TableExamples:
    """The training images of the step images in ``folder`` whose id is ``known``."""
    uri = storage.join(folder, "images.parquet")
    images = storage.open_table(uri, ("image_id", "split"))
    chosen = pc.and_(
        pc.equal(images["split"], "train"),
        pc.is_in(images["image_id"], value_set=known),
    )
    return TableExamples(uri, np.flatnonzero(chosen.to_numpy()), know, reviewed)


def _annotated(folder: str) -> tuple[TruthTable, pa.ChunkedArray]:
    """The truth, and the training images that have some. Raises InputError if none has."""
    truth, train = truth_of(folder), image_table(folder, "train")["image_id"]
    found = truth.ids.filter(pc.is_in(truth.ids, value_set=train))
    if not len(found):
        raise InputError(
            "the oracle baseline needs annotated training images; data.images has no"
            " labels in a format of docs/formats.md"
        )
    return truth, found
