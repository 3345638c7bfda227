"""The gallery's pictures: which images are shown, and what each method saw in them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torchvision.ops import box_iou

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.data.canonical import decode_rgb
from coin_ray.evaluation.operating import ImageCounts, regression_by_image
from coin_ray.report.gallery import Box, GalleryImage
from coin_ray.runs.steps import Context
from coin_ray.stages.common.image_tables import (
    open_annotations,
    read_image_rows,
    read_images,
)
from coin_ray.stages.evaluate import PredictionsByMethod
from coin_ray.structures import Detections
from coin_ray.tables import Truth

TEST, TRAIN, WORST = 12, 12, 6
LONG_SIDE = 640
SHOWN_FROM = {"cloud": 0.3, "clip_labels": 0.3, "clip_detector": 0.4, "student": 0.4}
"""Scores from which boxes are drawn, where no truth says a better one."""
IOU = 0.5
Row = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class Seen:
    """``layers``: what each method saw by image id; ``from_score``: the threshold it is
    drawn at; ``tallies`` of annotated test images.
    """

    layers: PredictionsByMethod
    from_score: Mapping[str, float]
    truth: Mapping[str, Truth]
    tallies: Mapping[str, ImageCounts]


def seen(
    context: Context[PipelineConfig],
    layers: PredictionsByMethod,
    points: Mapping[str, Mapping[str, float]],
    tallies: Mapping[str, ImageCounts],
) -> Seen:
    limits = {
        name: points.get(name, {}).get("score", SHOWN_FROM[name]) for name in SHOWN_FROM
    }
    return Seen(
        {n: f for n, f in layers.items() if n in limits},
        limits,
        open_annotations(context.inputs["images"]),
        tallies,
    )


def gallery(context: Context[PipelineConfig], what: Seen) -> list[GalleryImage]:
    """The test images on which the student is worst against the cloud, further ones
    evenly spread, and training images with their kinds.
    """
    test = read_image_rows(context.inputs["images"], "test")
    worst = _worst(test, what)
    ids = {row["image_id"] for row, _ in worst}
    rest = _spread([i for i in test if i["image_id"] not in ids], TEST)
    chosen = [("worst", row, note) for row, note in worst]
    chosen += [("test", row, "") for row in rest]
    train = _separated(context, TRAIN + TEST - len(rest))
    chosen += [("train", row, "") for row in train]
    place, ids = (
        storage.join(context.inputs["separate"], "separation.parquet"),
        pa.array([row["image_id"] for row in train], pa.string()),
    )
    kinds = {row["image_id"]: row for row in tables.stream_rows(place, ids)}
    return [
        _image(row, group, note, what, kinds, context.config)
        for group, row, note in chosen
    ]


def _separated(context: Context[PipelineConfig], count: int) -> list[Row]:
    """So many training images of which there is knowledge, evenly spread."""
    images = read_images(context.inputs["images"], "train")
    known = [
        rows["image_id"]
        for rows in storage.stream_table(
            storage.join(context.inputs["separate"], "separation.parquet"), ["image_id"]
        )
    ]
    separated = images.filter(
        pc.is_in(
            images["image_id"],
            value_set=pa.chunked_array(
                [c for k in known for c in k.chunks], pa.string()
            ),
        )
    )
    rows: list[Row] = separated.take(_spread(range(len(separated)), count)).to_pylist()
    return rows


def _worst(test: Sequence[Row], what: Seen) -> list[tuple[Row, str]]:
    """Images with the largest loss, worst first, and what changed in words."""
    if not {"cloud", "student"} <= set(what.tallies):
        return []
    ours, theirs = what.tallies["student"], what.tallies["cloud"]
    rows = {str(i["image_id"]): i for i in test}
    lost, ids = regression_by_image(ours, theirs), sorted(i for i in rows if i in what.truth)
    order = [int(n) for n in np.argsort(-lost, kind="stable")[:WORST] if lost[n] > 0]
    told = (
        "Of {} objects the cloud finds {}, the student {}; wrong boxes: cloud {},"
        " student {}"
    )
    return [
        (
            rows[ids[n]],
            told.format(
                ours.truth[n],
                theirs.found[n],
                ours.found[n],
                theirs.wrong[n],
                ours.wrong[n],
            ),
        )
        for n in order
    ]


def _spread(rows: Sequence[T], count: int) -> list[T]:
    return (
        [rows[i * len(rows) // count] for i in range(min(count, len(rows)))]
        if rows
        else []
    )


def _image(
    image: Row,
    group: str,
    note: str,
    what: Seen,
    kinds: Mapping[str, Row],
    config: PipelineConfig,
) -> GalleryImage:
    image_id = str(image["image_id"])
    shown = {
        n: found[image_id] for n, found in what.layers.items() if image_id in found
    }
    shown = {n: d[d.scores >= what.from_score[n]] for n, d in shown.items()}
    if "clip_labels" in shown:  # row by row the cloud's boxes
        cloud = what.layers["cloud"][image_id]
        shown["clip_labels"] = what.layers["clip_labels"][image_id][
            cloud.scores >= what.from_score["cloud"]
        ]
    layers = {n: _boxes(d, config) for n, d in shown.items()}
    if image_id in what.truth:
        known = what.truth[image_id]
        layers["truth"] = [
            _box(b, config.classes[int(c)])
            for b, c in zip(known.boxes.tolist(), known.labels, strict=True)
        ]
    if group == "train":
        layers["separation"] = _kinds(kinds[image_id], config)
    jpeg, width, height = _jpeg(str(image["uri"]))
    name = str(image["uri"]).rsplit("/", 1)[-1]
    return GalleryImage(
        jpeg,
        width,
        height,
        name,
        layers,
        group,
        note,
        disagreements(shown, what.truth.get(image_id)),
    )


def disagreements(
    shown: Mapping[str, Detections], truth: Truth | None
) -> tuple[str, ...]:
    """Which differ on this image: ``teachers`` (names of one box), ``student`` (and the
    cloud), and by the truth ``worse``, ``better`` than the cloud.
    """
    cloud, clip, student = (shown.get(n) for n in ("cloud", "clip_labels", "student"))
    found = []
    if (
        cloud is not None
        and clip is not None
        and bool((cloud.labels != clip.labels).any())
    ):
        found.append("teachers")
    if cloud is None or student is None:
        return tuple(found)
    if not (_matched(cloud, student).all() and _matched(student, cloud).all()):
        found.append("student")
    if truth is not None:
        named = Detections(
            truth.boxes,
            torch.ones(len(truth.boxes)),
            truth.labels,
            torch.zeros(len(truth.boxes), cloud.probs.shape[1]),
        )
        gained = int(_matched(named, student).sum()) - int(_matched(named, cloud).sum())
        found += ["better"] if gained > 0 else ["worse"] if gained < 0 else []
    return tuple(found)


def _matched(boxes: Detections, others: Detections) -> torch.Tensor:
    """[N] whether some other box of the same name overlaps each."""
    if not len(boxes) or not len(others):
        return torch.zeros(len(boxes), dtype=torch.bool)
    same = boxes.labels[:, None] == others.labels[None]
    matched: torch.Tensor = (same & (box_iou(boxes.boxes, others.boxes) > IOU)).any(1)
    return matched


def _boxes(shown: Detections, config: PipelineConfig) -> list[Box]:
    names = (*config.classes, "background")
    return [
        _box(b, names[int(c)], float(s))
        for b, c, s in zip(
            shown.boxes.tolist(), shown.labels, shown.scores, strict=True
        )
    ]


def _kinds(row: Mapping[str, Any], config: PipelineConfig) -> list[Box]:
    names = (*config.classes, "background")
    boxes = []
    for box, kind, cloud, clip in zip(
        row["boxes"], row["kind"], row["cloud_labels"], row["clip_labels"], strict=True
    ):
        boxes.append(
            _box(
                box,
                (
                    f"{names[cloud]} / {names[clip]}"
                    if kind == "inconsistent"
                    else names[cloud]
                ),
                None,
                kind,
            )
        )
    return boxes


def _box(
    box: list[float], label: str, score: float | None = None, kind: str = ""
) -> Box:
    return Box((box[0], box[1], box[2], box[3]), label, score, kind)


def _jpeg(uri: str) -> tuple[bytes, int, int]:
    """The picture of at most ``LONG_SIDE`` pixels, and the size of the original, in
    which boxes are drawn.
    """
    image = decode_rgb(storage.read_bytes(uri))
    width, height = image.size
    image.thumbnail((LONG_SIDE, LONG_SIDE))
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=85)
    return encoded.getvalue(), width, height
