"""Adapter of YOLO-World on Roboflow's inference server, hosted or
self-hosted: ``POST /yolo_world/infer``.

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
    ParsedBox,
    check_sent_size,
    error_object,
    expect_list,
    expect_number,
    expect_object,
    expect_score,
    expect_text,
    load_json,
    map_detections,
    sanitize_text,
)
from coin_ray.cloud.adapters.prompts import check_class_names
from coin_ray.cloud.protocol import (
    Auth,
    Capabilities,
    Frame,
    PreparedRequest,
    Query,
    RawDetections,
    error_for_status,
)
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import AuthError, BadRequest, CloudError, ImageRejected

DEFAULT_VERSION = "v2-l"
BAD_KEY = re.compile(r"api[ _]key", re.IGNORECASE)
BAD_IMAGE = re.compile(r"\bimages?\b|base64", re.IGNORECASE)


@dataclass(frozen=True)
class RoboflowAdapter:
    """YOLO-World behind Roboflow's inference server. ``key_in_body``: the key is sent
    in the body, for servers that do not read the header.
    """

    key_in_body: bool = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "roboflow",
            open_vocabulary=True,
            per_class_scores=False,
            idempotent=False,
            url="https://serverless.roboflow.com",
            auth=Auth(json_key="api_key") if self.key_in_body else Auth(),
            max_bytes=14_000_000,
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        """Build the request. ``Query.model`` is YOLO-World's version, for example
        ``v2-x``.
        """
        check_class_names(query.classes)
        version = DEFAULT_VERSION if query.model == "default" else query.model
        body = {
            "image": {"type": "base64", "value": base64.b64encode(image.data).decode()},
            "text": list(query.classes),
            "yolo_world_version_id": version,
            "confidence": float(query.score_min),
        }
        return PreparedRequest("/yolo_world/infer", json.dumps(body).encode())

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        response = expect_object(load_json(headers, body), "the response")
        size = expect_object(response.get("image"), "image")
        check_sent_size(size.get("width"), size.get("height"), frame)
        nodes = expect_list(response.get("predictions"), "predictions")
        boxes = [_parse_box(node, f"predictions[{i}]") for i, node in enumerate(nodes)]
        return map_detections(
            boxes, "cxcywh", query, frame, "label", expects_names=True
        )

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        return classify_roboflow_error(status, headers, body)


def classify_roboflow_error(
    status: int, headers: Mapping[str, str], body: bytes
) -> CloudError:
    """Classify an error. 410 and 501 are final: this server does not have the model (any
    more).
    """
    text = sanitize_text(error_object(body).get("message"))
    message = f"the service answered {status}: {text}"
    if status == 401:
        return AuthError(f"{message}; older servers need --cloud.secret-in body")
    if status == 400 and BAD_KEY.search(text):
        return AuthError(message)
    if status == 400 and BAD_IMAGE.search(text):
        return ImageRejected(message)
    if status in (410, 501):
        return BadRequest(
            f"{message}; this server has no such model: --cloud roboflow-sam3 asks SAM 3"
        )
    return error_for_status(status, headers, text)


def _parse_box(node: Any, field: str) -> ParsedBox:
    json_object = expect_object(node, field)
    box = [
        expect_number(json_object.get(key), f"{field}.{key}")
        for key in ("x", "y", "width", "height")
    ]
    name = expect_text(json_object.get("class"), f"{field}.class")
    score = expect_score(json_object.get("confidence"), f"{field}.confidence")
    return ParsedBox(box, [name], score)
