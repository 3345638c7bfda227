"""Adapter of YOLO-World on Roboflow's servers, hosted or one's own: ``POST
/yolo_world/infer``.

Boxes are centre, width and height in pixels of the image sent.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coin_ray.cloud.adapters.parsing import (
    Found,
    as_list,
    as_number,
    as_object,
    as_score,
    as_text,
    check_sent_size,
    detections,
    error_object,
    load_json,
    short_text,
)
from coin_ray.cloud.adapters.prompts import check_class_names
from coin_ray.cloud.protocol import (
    Capabilities,
    Frame,
    PreparedRequest,
    Query,
    RawDetections,
    by_status,
)
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import AuthError, BadRequest, CloudError, ImageRejected

VERSION = "v2-l"
BAD_KEY = re.compile(r"api[ _]key", re.IGNORECASE)
BAD_IMAGE = re.compile(r"\bimages?\b|base64", re.IGNORECASE)


@dataclass(frozen=True)
class RoboflowAdapter:
    """YOLO-World behind Roboflow's inference server."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "roboflow",
            open_vocabulary=True,
            per_class_scores=False,
            idempotent=False,
            url="https://serverless.roboflow.com",
            max_bytes=14_000_000,
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        """``Query.model`` is YOLO-World's version, for example ``v2-x``."""
        check_class_names(query.classes)
        body = {
            "image": {"type": "base64", "value": base64.b64encode(image.data).decode()},
            "text": list(query.classes),
            "yolo_world_version_id": (
                VERSION if query.model == "default" else query.model
            ),
            "confidence": float(query.score_min),
        }
        return PreparedRequest("/yolo_world/infer", json.dumps(body).encode())

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        answer = as_object(load_json(headers, body), "the answer")
        size = as_object(answer.get("image"), "image")
        check_sent_size(size.get("width"), size.get("height"), frame)
        found = [
            _found(v, f"predictions[{i}]")
            for i, v in enumerate(as_list(answer.get("predictions"), "predictions"))
        ]
        return detections(found, "cxcywh", query, frame, "label")

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        """501: this server does not have the model, now or later."""
        text = short_text(error_object(body).get("message"))
        message = f"the service answered {status}: {text}"
        if status == 400 and BAD_KEY.search(text):
            return AuthError(message)
        if status == 400 and BAD_IMAGE.search(text):
            return ImageRejected(message)
        return (
            BadRequest(message) if status == 501 else by_status(status, headers, text)
        )


def _found(value: Any, place: str) -> Found:
    one = as_object(value, place)
    box = [
        as_number(one.get(key), f"{place}.{key}")
        for key in ("x", "y", "width", "height")
    ]
    return Found(
        box,
        [as_text(one.get("class"), f"{place}.class")],
        as_score(one.get("confidence"), f"{place}.confidence"),
    )
