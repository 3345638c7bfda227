"""Adapter of Moondream's detector: ``POST /detect`` below ``https://api.moondream.ai/v1``.

A call is about one class. Boxes are shares of the image's sides, without scores.
``Query.model`` is the model's name.
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
    error_object,
    expect_list,
    expect_number,
    expect_object,
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
from coin_ray.errors import BadRequest, CloudError, ImageRejected

BAD_IMAGE = re.compile(r"\bimages?\b|image_url|base64", re.IGNORECASE)
SIDES = ("x_min", "y_min", "x_max", "y_max")


@dataclass(frozen=True)
class MoondreamAdapter:
    """Moondream behind its own API, or a server of one's own."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "moondream",
            open_vocabulary=True,
            per_class_scores=False,
            idempotent=False,
            url="https://api.moondream.ai/v1",
            auth=Auth("X-Moondream-Auth", ""),
            max_bytes=7_300_000,
            phrases_per_call=1,
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        check_class_names(query.classes)
        if len(query.classes) > 1:
            raise BadRequest(
                f"moondream is asked for one class a call, got {len(query.classes)}"
            )
        encoded_image = base64.b64encode(image.data).decode()
        body = {
            "image_url": f"data:{image.media_type};base64,{encoded_image}",
            "object": query.classes[0],
        }
        if query.model != "default":
            body["model"] = query.model
        return PreparedRequest("/detect", json.dumps(body).encode())

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        response = expect_object(load_json(headers, body), "the response")
        nodes = expect_list(response.get("objects"), "objects")
        boxes = [
            _parse_box(node, query.classes[0], f"objects[{number}]")
            for number, node in enumerate(nodes)
        ]
        return map_detections(boxes, "xyxy_ratio", query, frame, "none")

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        response = error_object(body)
        error = response.get("error")
        nested = error.get("message") if isinstance(error, dict) else error
        text = sanitize_text(nested, response.get("detail"), response.get("message"))
        if status in (400, 422) and BAD_IMAGE.search(text):
            return ImageRejected(f"the service answered {status}: {text}")
        return error_for_status(status, headers, text)


def _parse_box(node: Any, name: str, field: str) -> ParsedBox:
    json_object = expect_object(node, field)
    box = [expect_number(json_object.get(side), f"{field}.{side}") for side in SIDES]
    return ParsedBox(box, [name], 1.0)
