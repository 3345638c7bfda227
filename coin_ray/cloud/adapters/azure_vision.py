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
    malformed,
    short_text,
)
from coin_ray.cloud.protocol import (
    RETRY_AFTER_MAX,
    Auth,
    Capabilities,
    Frame,
    PreparedRequest,
    Query,
    RawDetections,
    by_status,
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
        """``Query.model`` is the service's model-version. The service knows no
        threshold.
        """
        version = (
            ""
            if query.model == "default"
            else f"&model-version={quote(query.model, safe='')}"
        )
        return PreparedRequest(PATH + version, image.data, "application/octet-stream")

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        """Without ``objectsResult`` nothing was looked for, so that is no empty answer."""
        answer = as_object(load_json(headers, body), "the answer")
        size = as_object(answer.get("metadata"), "metadata")
        check_sent_size(size.get("width"), size.get("height"), frame)
        values = as_list(
            as_object(answer.get("objectsResult"), "objectsResult").get("values"),
            "objectsResult.values",
        )
        return detections(
            [_found(v, f"values[{i}]") for i, v in enumerate(values)],
            "xywh",
            query,
            frame,
            "label",
        )

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        error = error_object(body).get("error")
        error = error if isinstance(error, dict) else {}
        inner = error.get("innererror")
        inner = inner if isinstance(inner, dict) else {}
        detail = short_text(error.get("code"), inner.get("code"), error.get("message"))
        message = f"the service answered {status}: {detail}"
        if status == 429:
            hint, wait = WAIT.search(detail), retry_after(headers)
            return Throttled(
                message,
                min(float(hint[1]), RETRY_AFTER_MAX) if hint and wait is None else wait,
            )
        if status == 400 and (
            short_text(inner.get("code")).startswith("InvalidImage")
            or BAD_IMAGE.search(detail)
        ):
            return ImageRejected(message)
        return by_status(status, headers, detail)


def _found(value: Any, place: str) -> Found:
    one = as_object(value, place)
    box = as_object(one.get("boundingBox"), f"{place}.boundingBox")
    tags = [
        as_object(t, f"{place}.tags") for t in as_list(one.get("tags"), f"{place}.tags")
    ]
    if not tags:
        malformed(f"{place} has no tag")
    best = max(tags, key=lambda t: as_score(t.get("confidence"), f"{place}.confidence"))
    sides = [as_number(box.get(key), f"{place}.boundingBox.{key}") for key in "xywh"]
    return Found(
        sides,
        [as_text(best.get("name"), f"{place}.name")],
        as_score(best.get("confidence"), f"{place}.confidence"),
    )
