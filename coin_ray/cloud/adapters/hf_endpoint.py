"""Adapter of a Hugging Face Inference Endpoint with the task
zero-shot-object-detection: ``POST /`` with JSON.

``cloud.url`` is the endpoint's own address. The model looks for each class by itself,
so one box comes back once for each class that it may be, and a class that is missing
scored below the threshold. Boxes are pixels of the image sent, cut to whole numbers. An
endpoint that has scaled to zero answers 503 while it starts, for minutes: give
``cloud.deadline`` as much.
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
    Found,
    as_list,
    as_number,
    as_object,
    as_score,
    as_text,
    detections,
    error_object,
    finished,
    load_json,
    short_text,
)
from coin_ray.cloud.adapters.prompts import check_class_names
from coin_ray.cloud.protocol import (
    RETRY_AFTER_MAX,
    Capabilities,
    Frame,
    PreparedRequest,
    Query,
    RawDetections,
    by_status,
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
                "an endpoint has one model; got"
                f" cloud.model={short_text(query.model)[:60]!r}, leave it at default"
            )
        check_class_names(query.classes)
        parameters = {
            "candidate_labels": list(query.classes),
            "threshold": float(query.score_min),
        }
        return PreparedRequest(
            "/",
            json.dumps(
                {
                    "inputs": base64.b64encode(image.data).decode(),
                    "parameters": parameters,
                }
            ).encode(),
        )

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        """Scores of the same box under several labels come as one row. Near boxes of
        different labels are left apart.
        """
        values = as_list(load_json(headers, body), "the answer")
        return _grouped(
            detections(
                [_found(v, f"element {i}") for i, v in enumerate(values)],
                "xyxy",
                query,
                frame,
                "label",
            )
        )

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        """The default server answers 400 for whatever goes wrong, also for lack of
        memory.
        """
        answer = error_object(body)
        error = answer.get("error")
        text = short_text(*error) if isinstance(error, list) else short_text(error)
        if status in (400, 422) and OUT_OF_MEMORY.search(text):
            return Transient(
                f"the service answered {status}: {text}", may_have_billed=True
            )
        if status in (400, 422) and BAD_IMAGE.search(text):
            return ImageRejected(f"the service answered {status}: {text}")
        return by_status(status, headers, text, _seconds(answer.get("estimated_time")))


def _found(value: Any, place: str) -> Found:
    one = as_object(value, place)
    box = as_object(one.get("box"), f"{place}.box")
    corners = [
        as_number(box.get(key), f"{place}.box.{key}")
        for key in ("xmin", "ymin", "xmax", "ymax")
    ]
    return Found(
        corners,
        [as_text(one.get("label"), f"{place}.label")],
        as_score(one.get("score"), f"{place}.score"),
    )


def _grouped(raw: RawDetections) -> RawDetections:
    boxes, rows = np.unique(raw.boxes, axis=0, return_inverse=True)
    scores = np.zeros((len(boxes), raw.class_scores.shape[1]), np.float32)
    np.maximum.at(scores, rows.reshape(-1), raw.class_scores)
    return finished(boxes, scores, raw.score_kind, raw.unmapped)


def _seconds(value: Any) -> float | None:
    """What a model that is loading says it needs."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        return None
    return float(min(value, RETRY_AFTER_MAX))
