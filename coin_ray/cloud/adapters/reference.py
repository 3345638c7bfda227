"""Adapter of the reference wire format: ``POST /v1/detect`` with JSON in and out
(docs/cloud.md).

request  ``{"image": {"b64": ...}, "classes": [...], "threshold": 0.05, "model":
"default", "return": "probs"}`` answer   ``{"image": {"w": 640, "h": 480}, "detections":
[{"box": [x0, y0, x1, y1], "label": "car", "score": 0.71, "scores": {"car": 0.71, "bus":
0.08}}]}``; boxes in pixels of the image sent, ``scores`` may be left out.

The server answers in the names it was asked for; any other is an error. With a label
map it may answer in names of its own.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coin_ray.cloud.adapters.parsing import (
    as_list,
    as_numbers,
    as_object,
    as_score,
    as_text,
    check_sent_size,
    error_object,
    finished,
    load_json,
    malformed,
    short_text,
    to_original,
)
from coin_ray.cloud.label_map import LabelMap
from coin_ray.cloud.protocol import (
    Capabilities,
    Frame,
    PreparedRequest,
    Query,
    RawDetections,
    ScoreKind,
    by_status,
)
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import BadRequest, CloudError

SIDE_MAX = 65_535
"""The server is the user's own: how large an image it gets is up to ``cloud.max_side``.
"""
Meaning = Callable[[str], tuple[int, float] | None]
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
                "a class name is given twice: answers could not be told apart"
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
        """Raises ``ProtocolError`` with the place and the reason; boxes thinner than
        one pixel are dropped.
        """
        answer = as_object(load_json(headers, body), "the answer")
        image = as_object(answer.get("image"), "image")
        check_sent_size(image.get("w"), image.get("h"), frame)
        found = [
            _found(value, f"detections[{i}]")
            for i, value in enumerate(as_list(answer.get("detections"), "detections"))
        ]
        meaning = _meaning(query)
        kept = [one for one in found if meaning(one.label) is not None]
        scores = np.array(
            [_class_scores(one, meaning, len(query.classes)) for one in kept],
            np.float32,
        )
        boxes = to_original([one.box for one in kept], "xyxy", frame)
        kind: ScoreKind = (
            "per_class" if all(one.per_class for one in found) else "label"
        )
        return finished(
            boxes,
            scores.reshape(len(kept), len(query.classes)),
            kind,
            _unmapped(found, query.labels),
        )

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        problem = error_object(body)
        return by_status(
            status, headers, short_text(problem.get("title"), problem.get("detail"))
        )


@dataclass(frozen=True, slots=True)
class _Found:
    """One box of the answer. ``scores``: by the server's names, the label's among them;
    ``per_class``: more than that was scored.
    """

    box: list[float]
    label: str
    scores: Mapping[str, float]
    per_class: bool


def _found(value: Any, place: str) -> _Found:
    one = as_object(value, place)
    label = as_text(one.get("label"), f"{place}.label")
    scores = {label: as_score(one.get("score"), f"{place}.score")}
    if "scores" in one:
        scores |= {
            name: as_score(score, f"{place}.scores")
            for name, score in as_object(one["scores"], f"{place}.scores").items()
        }
    return _Found(
        as_numbers(one.get("box"), 4, f"{place}.box"), label, scores, "scores" in one
    )


def _meaning(query: Query) -> Meaning:
    """By the label map or, without one, the names that were asked for: then any other
    is an error.
    """
    labels = query.labels
    if labels is not None:
        return lambda name: labels.find([name])
    columns = {name: (k, 1.0) for k, name in enumerate(query.classes)}

    def asked_for(name: str) -> tuple[int, float]:
        if name not in columns:
            malformed(
                f"label {name[:60]!r} was not asked for; if the server has names of its"
                " own, give a --cloud.label-map"
            )
        return columns[name]

    return asked_for


def _class_scores(
    one: _Found, meaning: Meaning, num_classes: int
) -> NDArray[np.float32]:
    """Scores [K]; of several names that mean the same class the best one counts."""
    row = np.zeros(num_classes, np.float32)
    for name, score in one.scores.items():
        place = meaning(name)
        if place is not None:
            column, weight = place
            row[column] = max(row[column], weight * score)
    return row


def _unmapped(found: Sequence[_Found], labels: LabelMap | None) -> tuple[str, ...]:
    """The names of the boxes that are dropped because the map has neither a class for
    them nor ignores them.
    """
    if labels is None:
        return ()
    return tuple(
        one.label
        for one in found
        if labels.find([one.label]) is None and not labels.ignores([one.label])
    )
