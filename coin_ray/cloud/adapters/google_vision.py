"""Adapter of Google Cloud Vision, feature OBJECT_LOCALIZATION: ``POST
/v1/images:annotate``.

The classes are Google's own; ``Query.labels`` maps their ids (``/m/0k4j``) or English
names. Boxes are polygons in ratios of the image's sides. Answers are protobuf messages
as JSON, in which zeros are left out.
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
from coin_ray.errors import (
    AuthError,
    CloudError,
    ImageRejected,
    QuotaExhausted,
    Throttled,
    Transient,
)

RESULTS_MAX = 500
BY_CODE: dict[int, type[CloudError]] = {
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
        """``Query.model`` is the feature's model, for example ``builtin/latest``. The
        service knows no threshold.
        """
        feature = {"type": "OBJECT_LOCALIZATION", "maxResults": RESULTS_MAX}
        if query.model != "default":
            feature["model"] = query.model
        one = {
            "image": {"content": base64.b64encode(image.data).decode()},
            "features": [feature],
        }
        return PreparedRequest(
            "/v1/images:annotate", json.dumps({"requests": [one]}).encode()
        )

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        """``{}`` for the one image says that nothing was found; an error for it is
        raised as what it stands for.
        """
        responses = as_list(
            as_object(load_json(headers, body), "the answer").get("responses"),
            "responses",
        )
        if len(responses) != 1:
            malformed(f"{len(responses)} responses to one request")
        response = as_object(responses[0], "responses[0]")
        if "error" in response:
            raise _image_error(as_object(response["error"], "responses[0].error"))
        found = as_list(
            response.get("localizedObjectAnnotations", []), "localizedObjectAnnotations"
        )
        return detections(
            [_found(f, f"annotations[{i}]") for i, f in enumerate(found)],
            "xyxy_ratio",
            query,
            frame,
            "label",
        )

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        """A limit per minute is called a quota as well; only one per day is used up for
        good.
        """
        error = error_object(body).get("error")
        error = error if isinstance(error, dict) else {}
        text = short_text(error.get("message"))
        message, lower = f"the service answered {status}: {text}", text.lower()
        if status == 400 and (
            "api key not valid" in lower or "api key expired" in lower
        ):
            return AuthError(message)
        if status == 403 and "billing" in lower:
            return QuotaExhausted(message)
        if status == 429 and not PER_DAY.search(body):
            wait = retry_after(headers)
            return Throttled(
                message, wait if wait is not None else retry_delay(error.get("details"))
            )
        if status == 400 and ("image" in lower or "payload size" in lower):
            return ImageRejected(message)
        return (
            QuotaExhausted(message)
            if status == 429
            else by_status(status, headers, text)
        )


def _found(value: Any, place: str) -> Found:
    one = as_object(value, place)
    names = [
        as_text(one[key], f"{place}.{key}") for key in ("mid", "name") if key in one
    ]
    if not names:
        malformed(f"{place} has neither mid nor name")
    polygon = as_object(one.get("boundingPoly"), f"{place}.boundingPoly")
    vertices = as_list(polygon.get("normalizedVertices"), f"{place}.normalizedVertices")
    if len(vertices) != 4:
        malformed(f"{place} has {len(vertices)} vertices, not 4")
    corners = [as_object(v, f"{place}.vertex") for v in vertices]
    x = [as_number(c.get("x", 0.0), f"{place}.x") for c in corners]
    y = [as_number(c.get("y", 0.0), f"{place}.y") for c in corners]
    return Found(
        (min(x), min(y), max(x), max(y)),
        names,
        as_score(one.get("score", 0.0), f"{place}.score"),
    )


def _image_error(error: dict[str, Any]) -> CloudError:
    code = error.get("code")
    kind = BY_CODE.get(code) if isinstance(code, int) else None
    message = (
        f"code {short_text(str(code))} for the image:"
        f" {short_text(error.get('message'))}"
    )
    if kind is None:
        malformed(message)
    return (
        Transient(message, may_have_billed=True) if kind is Transient else kind(message)
    )


def retry_delay(details: Any) -> float | None:
    """Seconds that a google.rpc.RetryInfo among an error's details asks to wait, at
    most 120.
    """
    for detail in details if isinstance(details, list) else ():
        match = (
            SECONDS.fullmatch(str(detail.get("retryDelay")))
            if isinstance(detail, dict)
            else None
        )
        if match:
            return min(float(match[1]), RETRY_AFTER_MAX)
    return None
