"""Adapter of a Hugging Face Inference Endpoint with the task
zero-shot-object-detection: ``POST /`` with JSON.

``cloud.url`` is the endpoint's own address. The model searches for each class
separately, so one box comes back once for each class that it may be, and a class that is
missing scored below the threshold. Boxes are pixels of the image sent, truncated to whole
numbers. An endpoint that has scaled to zero answers 503 for minutes while it starts: set
``cloud.deadline`` at least as long.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from coin_ray.cloud.adapters.parsing import (
    ParsedBox,
    error_object,
    expect_list,
    expect_number,
    expect_object,
    expect_score,
    expect_text,
    load_json,
    map_detections,
    sanitize_text,
    sort_detections,
)
from coin_ray.cloud.adapters.prompts import check_class_names
from coin_ray.cloud.protocol import (
    Capabilities,
    Frame,
    PreparedRequest,
    Query,
    RawDetections,
    error_for_status,
)
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import BadRequest, CloudError, ImageRejected, Transient

OUT_OF_MEMORY = re.compile(
    r"out of memory|\bOOM\b|CUDA|cuDNN|cuBLAS|allocate memory", re.IGNORECASE
)
BAD_IMAGE = re.compile(r"\bimages?\b|base64|truncated", re.IGNORECASE)


@dataclass(frozen=True)
class HfEndpointAdapter:
    """A zero-shot detector (OWLv2, OmDet, Grounding DINO) behind a Hugging Face
    Inference Endpoint.
    """

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "hf-endpoint", open_vocabulary=True, per_class_scores=True, idempotent=False
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        if query.model != "default":
            raise BadRequest(
                "an endpoint has one model, got"
                f" cloud.model={sanitize_text(query.model)[:60]!r}; leave it at default"
            )
        check_class_names(query.classes)
        parameters = {
            "candidate_labels": list(query.classes),
            "threshold": float(query.score_min),
        }
        body = {
            "inputs": base64.b64encode(image.data).decode(),
            "parameters": parameters,
        }
        return PreparedRequest("/", json.dumps(body).encode())

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        """Parse a response. Scores of the same box under several labels become one row;
        near boxes of different labels are not merged.
        """
        nodes = expect_list(load_json(headers, body), "the response")
        boxes = [_parse_box(node, f"element {i}") for i, node in enumerate(nodes)]
        raw = map_detections(
            boxes, "xyxy", query, frame, "label", expects_names=True, limit=None
        )
        return _merge_equal_boxes(raw)

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        """Classify an error by its text: the default server answers 400 to every
        problem, lack of memory included.
        """
        response = error_object(body)
        error = response.get("error")
        error_texts = error if isinstance(error, list) else [error]
        text = sanitize_text(*error_texts)
        message = f"the service answered {status}: {text}"
        if status in (400, 422) and OUT_OF_MEMORY.search(text):
            return Transient(message, may_have_billed=True)
        if status in (400, 422) and BAD_IMAGE.search(text):
            return ImageRejected(message)
        loading_seconds = _parse_seconds(response.get("estimated_time"))
        return error_for_status(status, headers, text, loading_seconds)


def _parse_box(node: Any, field: str) -> ParsedBox:
    json_object = expect_object(node, field)
    box = expect_object(json_object.get("box"), f"{field}.box")
    corners = [
        expect_number(box.get(key), f"{field}.box.{key}")
        for key in ("xmin", "ymin", "xmax", "ymax")
    ]
    label = expect_text(json_object.get("label"), f"{field}.label")
    score = expect_score(json_object.get("score"), f"{field}.score")
    return ParsedBox(corners, [label], score)


def _merge_equal_boxes(raw: RawDetections) -> RawDetections:
    boxes, rows = np.unique(raw.boxes, axis=0, return_inverse=True)
    scores = np.zeros((len(boxes), raw.class_scores.shape[1]), np.float32)
    np.maximum.at(scores, rows.reshape(-1), raw.class_scores)
    return sort_detections(boxes, scores, raw.score_kind, raw.unmapped, raw.counts)


def _parse_seconds(estimated_time: Any) -> float | None:
    """Return how long a model that is loading asks to wait."""
    is_number = isinstance(estimated_time, (int, float))
    if isinstance(estimated_time, bool) or not is_number or not estimated_time >= 0:
        return None
    return float(estimated_time)
