"""Adapter of the reference wire format: ``POST /v1/detect`` with JSON in and out
(docs/cloud.md).

request  ``{"image": {"b64": ...}, "classes": [...], "threshold": 0.05,
           "model": "default", "return": "probs"}``
response ``{"image": {"w": 640, "h": 480}, "detections": [{"box": [x0, y0, x1, y1],
           "label": "car", "score": 0.71, "scores": {"car": 0.71, "bus": 0.08}}]}``

Boxes are in pixels of the image sent; ``scores`` may be omitted. Labels must be among the
class names of the request. With a label map the server may use its own names.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coin_ray.cloud.adapters.parsing import (
    PlacedBoxes,
    check_box_units,
    check_sent_size,
    error_object,
    expect_list,
    expect_numbers,
    expect_object,
    expect_score,
    expect_text,
    load_json,
    raise_malformed,
    sanitize_text,
)
from coin_ray.cloud.label_map import LabelMap
from coin_ray.cloud.protocol import (
    BoxCounts,
    Capabilities,
    Frame,
    PreparedRequest,
    Query,
    RawDetections,
    ScoreKind,
    error_for_status,
)
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import BadRequest, CloudError

SIDE_MAX = 65_535
"""No limit in practice: the server is the user's own, so ``cloud.max_side`` decides."""
ClassLookup = Callable[[str], tuple[int, float] | None]
"""Class index and weight of a name; None for a name that means no class."""


@dataclass(frozen=True)
class ReferenceAdapter:
    """The reference wire format as an ``Adapter``."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "reference",
            open_vocabulary=True,
            per_class_scores=True,
            idempotent=True,
            health_path="/health",
            max_side=SIDE_MAX,
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        if len(set(query.classes)) < len(query.classes):
            raise BadRequest(
                "a class name is given twice; responses could not tell them apart"
            )
        body = {
            "image": {
                "b64": base64.b64encode(image.data).decode(),
                "media_type": image.media_type,
            },
            "classes": list(query.classes),
            "threshold": query.score_min,
            "model": query.model,
            "return": "probs",
        }
        return PreparedRequest("/v1/detect", json.dumps(body).encode())

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        """Parse a response. Raises ``ProtocolError`` naming the field and the reason."""
        response = expect_object(load_json(headers, body), "the response")
        image = expect_object(response.get("image"), "image")
        check_sent_size(image.get("w"), image.get("h"), frame)
        nodes = expect_list(response.get("detections"), "detections")
        all_boxes = [
            _parse_box(node, f"detections[{i}]") for i, node in enumerate(nodes)
        ]
        find_class = _class_lookup(query)
        check_box_units([box.box for box in all_boxes], "xyxy", frame)
        mapped_boxes = [box for box in all_boxes if find_class(box.label) is not None]
        class_scores = [_class_scores(box, find_class) for box in mapped_boxes]
        placed = PlacedBoxes.convert([box.box for box in mapped_boxes], "xyxy", frame)
        best_scores = [max(by_class.values()) for by_class in class_scores]
        rows, counts = placed.select_best(np.array(best_scores, np.float32))
        scores = np.zeros((len(rows), len(query.classes)), np.float32)
        for number, row in enumerate(rows.tolist()):
            for column, score in class_scores[row].items():
                scores[number, column] = score
        all_per_class = all(box.per_class for box in all_boxes)
        kind: ScoreKind = "per_class" if all_per_class else "label"
        unmapped = _unmapped_labels(all_boxes, query.labels)
        num_ignored = len(all_boxes) - len(mapped_boxes) - len(unmapped)
        counts += BoxCounts(unmapped=len(unmapped), ignored=num_ignored)
        return RawDetections(placed.boxes[rows], scores, kind, unmapped, counts)

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        problem = error_object(body)
        detail = sanitize_text(problem.get("title"), problem.get("detail"))
        return error_for_status(status, headers, detail)


@dataclass(frozen=True, slots=True)
class _ScoredBox:
    """One box of the response. ``scores``: by the server's names, the label's included;
    ``per_class``: whether the server scored other classes too.
    """

    box: list[float]
    label: str
    scores: Mapping[str, float]
    per_class: bool


def _parse_box(node: Any, field: str) -> _ScoredBox:
    json_object = expect_object(node, field)
    label = expect_text(json_object.get("label"), f"{field}.label")
    scores = {label: expect_score(json_object.get("score"), f"{field}.score")}
    per_class = "scores" in json_object
    if per_class:
        scores_object = expect_object(json_object["scores"], f"{field}.scores")
        for name, score in scores_object.items():
            scores[name] = expect_score(score, f"{field}.scores")
    box = expect_numbers(json_object.get("box"), 4, f"{field}.box")
    return _ScoredBox(box, label, scores, per_class)


def _class_lookup(query: Query) -> ClassLookup:
    """Return a lookup by the label map or, without one, by the query's class names; then
    any other name is an error.
    """
    labels = query.labels
    if labels is not None:
        return lambda name: labels.find([name])
    columns = {name: (k, 1.0) for k, name in enumerate(query.classes)}

    def find_queried_class(name: str) -> tuple[int, float]:
        if name not in columns:
            raise_malformed(
                f"label {name[:60]!r} was not asked for; if the server uses its own"
                " names, give a --cloud.label-map"
            )
        return columns[name]

    return find_queried_class


def _class_scores(box: _ScoredBox, find_class: ClassLookup) -> dict[int, float]:
    """Return scores by class index: for each the best of the names that mean it."""
    scores: dict[int, float] = {}
    for name, score in box.scores.items():
        match = find_class(name)
        if match is not None:
            column, weight = match
            scores[column] = max(scores.get(column, 0.0), weight * score)
    return scores


def _unmapped_labels(
    boxes: Sequence[_ScoredBox], labels: LabelMap | None
) -> tuple[str, ...]:
    """Return the labels of dropped boxes that the map neither maps nor ignores."""
    if labels is None:
        return ()
    return tuple(
        box.label
        for box in boxes
        if labels.find([box.label]) is None and not labels.ignores([box.label])
    )
