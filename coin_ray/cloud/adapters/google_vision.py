"""Adapter of Google Cloud Vision, feature OBJECT_LOCALIZATION: ``POST
/v1/images:annotate``.

The classes are Google's own; ``Query.labels`` maps their ids (``/m/0k4j``) or English
names. Boxes are polygons in ratios of the image's sides. Responses are protobuf
messages as JSON, which omits zeros.
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
    expect_score,
    expect_text,
    load_json,
    map_detections,
    raise_malformed,
    sanitize_text,
)
from coin_ray.cloud.protocol import (
    Auth,
    Capabilities,
    Frame,
    PreparedRequest,
    Query,
    RawDetections,
    error_for_status,
    retry_after,
)
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import (
    AuthError,
    CloudError,
    ImageRejected,
    QuotaExhausted,
    Throttled,
    Transient,
)
from coin_ray.storage import JsonObject

RESULTS_MAX = 500
ERROR_BY_RPC_CODE: dict[int, type[CloudError]] = {
    2: Transient,
    3: ImageRejected,
    4: Transient,
    7: AuthError,
    8: Throttled,
    10: Transient,
    13: Transient,
    14: Transient,
    16: AuthError,
}
"""What the codes of google.rpc.Code mean for one image."""
SECONDS = re.compile(r"(\d+(?:\.\d+)?)s")
PER_DAY = re.compile(rb"per ?day", re.IGNORECASE)
BAD_KEY = re.compile(r"api key (not valid|expired)", re.IGNORECASE)
BAD_IMAGE = re.compile(r"image|payload size", re.IGNORECASE)


@dataclass(frozen=True)
class GoogleVisionAdapter:
    """Google Cloud Vision's object localisation, one image per request."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "google-vision",
            open_vocabulary=False,
            per_class_scores=False,
            idempotent=False,
            url="https://vision.googleapis.com",
            auth=Auth("X-Goog-Api-Key", ""),
            max_bytes=7_300_000,
            max_side=8000,
            min_side=64,
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        """Build the request. ``Query.model`` is the feature's model, for example
        ``builtin/latest``; the service has no score threshold.
        """
        feature = {"type": "OBJECT_LOCALIZATION", "maxResults": RESULTS_MAX}
        if query.model != "default":
            feature["model"] = query.model
        image_request = {
            "image": {"content": base64.b64encode(image.data).decode()},
            "features": [feature],
        }
        body = {"requests": [image_request]}
        return PreparedRequest("/v1/images:annotate", json.dumps(body).encode())

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        """Parse a response. ``{}`` for the one image means that it has no objects; an
        error for it is raised as the ``CloudError`` it stands for.
        """
        batch = expect_object(load_json(headers, body), "the response")
        responses = expect_list(batch.get("responses"), "responses")
        if len(responses) != 1:
            raise_malformed(f"{len(responses)} responses to one request")
        response = expect_object(responses[0], "responses[0]")
        if "error" in response:
            raise _image_error(expect_object(response["error"], "responses[0].error"))
        annotations = expect_list(
            response.get("localizedObjectAnnotations", []), "localizedObjectAnnotations"
        )
        boxes = [
            _parse_box(node, f"annotations[{i}]") for i, node in enumerate(annotations)
        ]
        return map_detections(boxes, "xyxy_ratio", query, frame, "label")

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        """Classify an error. The service also calls a limit per minute a quota; only one
        per day counts as used up.
        """
        error = error_object(body, "error")
        text = sanitize_text(error.get("message"))
        message = f"the service answered {status}: {text}"
        if status == 400 and BAD_KEY.search(text):
            return AuthError(message)
        if status == 403 and "billing" in text.lower():
            return QuotaExhausted(message)
        if status == 429 and PER_DAY.search(body):
            return QuotaExhausted(message)
        if status == 429:
            seconds = retry_after(headers)
            if seconds is None:
                seconds = parse_retry_delay(error.get("details"))
            return Throttled(message, seconds)
        if status == 400 and BAD_IMAGE.search(text):
            return ImageRejected(message)
        return error_for_status(status, headers, text)


def _parse_box(node: Any, field: str) -> ParsedBox:
    json_object = expect_object(node, field)
    names = [
        expect_text(json_object[key], f"{field}.{key}")
        for key in ("mid", "name")
        if key in json_object
    ]
    if not names:
        raise_malformed(f"{field} has neither mid nor name")
    polygon = expect_object(json_object.get("boundingPoly"), f"{field}.boundingPoly")
    vertices = expect_list(
        polygon.get("normalizedVertices"), f"{field}.normalizedVertices"
    )
    if len(vertices) != 4:
        raise_malformed(f"{field} has {len(vertices)} vertices, expected 4")
    corners = [expect_object(vertex, f"{field}.vertex") for vertex in vertices]
    x = [expect_number(corner.get("x", 0.0), f"{field}.x") for corner in corners]
    y = [expect_number(corner.get("y", 0.0), f"{field}.y") for corner in corners]
    score = expect_score(json_object.get("score", 0.0), f"{field}.score")
    return ParsedBox((min(x), min(y), max(x), max(y)), names, score)


def _image_error(error: JsonObject) -> CloudError:
    code = error.get("code")
    error_class = ERROR_BY_RPC_CODE.get(code) if isinstance(code, int) else None
    text = sanitize_text(error.get("message"))
    message = f"code {sanitize_text(str(code))} for the image: {text}"
    if error_class is None:
        raise_malformed(message)
    if error_class is Transient:
        return Transient(message, may_have_billed=True)
    return error_class(message)


def parse_retry_delay(details: Any) -> float | None:
    """Return the seconds that a google.rpc.RetryInfo in an error's details asks to
    wait.
    """
    for detail in details if isinstance(details, list) else ():
        if not isinstance(detail, dict):
            continue
        match = SECONDS.fullmatch(str(detail.get("retryDelay")))
        if match:
            return float(match[1])
    return None
