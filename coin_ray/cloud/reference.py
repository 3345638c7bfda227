"""Adapter of the reference wire format: ``POST /v1/detect`` with JSON in and out (docs/cloud.md).

request  ``{"image": {"b64": ...}, "classes": [...], "threshold": 0.05, "model": "default", "return": "probs"}``
answer   ``{"image": {"w": 640, "h": 480}, "detections": [{"box": [x0, y0, x1, y1], "label": "car", "score": 0.71,
"scores": {"car": 0.71, "bus": 0.08}}]}``; boxes in pixels of the image sent, ``scores`` may be left out.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coin_ray.cloud.parsing import (
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
from coin_ray.cloud.protocol import Capabilities, Frame, PreparedRequest, Query, RawDetections, by_status
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import BadRequest, CloudError

SIDE_MAX = 65_535
"""The server is the user's own: how large an image it gets is up to ``cloud.max_side``."""


@dataclass(frozen=True)
class ReferenceAdapter:
    """The reference wire format as an ``Adapter``."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "reference", open_vocabulary=True, per_class_scores=True, idempotent=True, health_path="/health", max_side=SIDE_MAX
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        if len(set(query.classes)) < len(query.classes):
            raise BadRequest("a class name is given twice: answers could not be told apart")
        body = {
            "image": {"b64": base64.b64encode(image.data).decode(), "media_type": image.media_type},
            "classes": list(query.classes),
            "threshold": query.score_min,
            "model": query.model,
            "return": "probs",
        }
        return PreparedRequest("/v1/detect", json.dumps(body).encode())

    def decode(self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame) -> RawDetections:
        """Raises ``ProtocolError`` with the place and the reason; boxes thinner than one pixel are dropped."""
        answer = as_object(load_json(headers, body), "the answer")
        image = as_object(answer.get("image"), "image")
        check_sent_size(image.get("w"), image.get("h"), frame)
        elements = [as_object(e, f"detections[{i}]") for i, e in enumerate(as_list(answer.get("detections"), "detections"))]
        columns = {name: k for k, name in enumerate(query.classes)}
        boxes = [as_numbers(e.get("box"), 4, f"detections[{i}].box") for i, e in enumerate(elements)]
        scores = np.array([_class_scores(e, i, columns) for i, e in enumerate(elements)], np.float32).reshape(len(elements), len(columns))
        per_class = all("scores" in e for e in elements)
        return finished(to_original(boxes, "xyxy", frame), scores, "per_class" if per_class else "label")

    def classify_error(self, status: int, headers: Mapping[str, str], body: bytes) -> CloudError:
        problem = error_object(body)
        return by_status(status, headers, short_text(problem.get("title"), problem.get("detail")))


def _class_scores(element: dict[str, Any], index: int, columns: dict[str, int]) -> NDArray[np.float32]:
    """Scores [K] of one box: its ``scores`` map, and its ``score`` in the label's column if the map leaves that out."""
    place = f"detections[{index}]."
    named = {as_text(element.get("label"), f"{place}label"): as_score(element.get("score"), f"{place}score")}
    named |= as_object(element["scores"], f"{place}scores") if "scores" in element else {}
    row = np.zeros(len(columns), np.float32)
    for name, value in named.items():
        if name not in columns:
            malformed(f"{place}label {name[:60]!r} was not asked for")
        row[columns[name]] = as_score(value, f"{place}scores")
    return row
