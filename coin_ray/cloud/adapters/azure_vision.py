"""Adapter of Azure AI Vision, Image Analysis 4.0: ``POST
/computervision/imageanalysis:analyze`` with the image file as the body.

The classes are Microsoft's own; ``Query.labels`` maps their names. Boxes are whole
pixels, x, y, width and height, of the image sent.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

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
from coin_ray.errors import CloudError, ImageRejected, Throttled

PATH = "/computervision/imageanalysis:analyze?features=Objects&api-version=2023-10-01"
WAIT = re.compile(r"(?:retry after|try again in) (\d+) second", re.IGNORECASE)
BAD_IMAGE = re.compile(
    r"image (size|format|dimension|is too|is not|data)|(input|size of the) image",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class AzureVisionAdapter:
    """Azure AI Vision's object detection. Every user has an endpoint of their own."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "azure-vision",
            open_vocabulary=False,
            per_class_scores=False,
            idempotent=False,
            auth=Auth("Ocp-Apim-Subscription-Key", ""),
            max_bytes=20_971_520,
            max_side=16_000,
            min_side=50,
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        """Build the request. ``Query.model`` is the service's model-version; the
        service has no score threshold.
        """
        path = PATH
        if query.model != "default":
            path += f"&model-version={quote(query.model, safe='')}"
        return PreparedRequest(path, image.data, "application/octet-stream")

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        """Parse a response. One without ``objectsResult`` is an error rather than an
        empty image: no detector ran.
        """
        response = expect_object(load_json(headers, body), "the response")
        size = expect_object(response.get("metadata"), "metadata")
        check_sent_size(size.get("width"), size.get("height"), frame)
        objects = expect_object(response.get("objectsResult"), "objectsResult")
        nodes = expect_list(objects.get("values"), "objectsResult.values")
        boxes = [_parse_box(node, f"values[{i}]") for i, node in enumerate(nodes)]
        return map_detections(boxes, "xywh", query, frame, "label")

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        error = error_object(body, "error")
        inner_code = error_object(body, "error", "innererror").get("code")
        detail = sanitize_text(error.get("code"), inner_code, error.get("message"))
        message = f"the service answered {status}: {detail}"
        if status == 429:
            return Throttled(message, _retry_seconds(headers, detail))
        names_image = sanitize_text(inner_code).startswith("InvalidImage")
        if status == 400 and (names_image or BAD_IMAGE.search(detail)):
            return ImageRejected(message)
        return error_for_status(status, headers, detail)


def _parse_box(node: Any, field: str) -> ParsedBox:
    json_object = expect_object(node, field)
    box = expect_object(json_object.get("boundingBox"), f"{field}.boundingBox")
    tags = [
        expect_object(tag, f"{field}.tags")
        for tag in expect_list(json_object.get("tags"), f"{field}.tags")
    ]
    if not tags:
        raise_malformed(f"{field} has no tag")
    scores = [
        expect_score(tag.get("confidence"), f"{field}.confidence") for tag in tags
    ]
    best_score = max(scores)
    best_tag = tags[scores.index(best_score)]
    xywh = [expect_number(box.get(key), f"{field}.boundingBox.{key}") for key in "xywh"]
    name = expect_text(best_tag.get("name"), f"{field}.name")
    return ParsedBox(xywh, [name], best_score)


def _retry_seconds(headers: Mapping[str, str], detail: str) -> float | None:
    """Return the seconds to wait: those of the header, else those in the text."""
    seconds = retry_after(headers)
    hint = WAIT.search(detail)
    if seconds is None and hint:
        return float(hint[1])
    return seconds
