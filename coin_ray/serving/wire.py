"""The server's side of the reference wire format (docs/cloud.md): what a request must
look like, and what responses look like.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypedDict

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError
from starlette.responses import JSONResponse

from coin_ray.data.canonical import stored_size
from coin_ray.errors import InputError
from coin_ray.predictors.scored_boxes import Floats

BODY_MAX = 64 * 2**20
CLASSES_MAX = 4096
CLASS_NAME_MAX = 1000
REASON_MAX = 300
REASONS_MAX = 3
FROM_URL_ALPHABET = str.maketrans("-_", "+/")
PROBLEM_JSON = "application/problem+json"
NOT_REFERENCE_FORMAT = "the request is not in the reference format"


class HttpProblem(Exception):
    """A response in ``application/problem+json`` (RFC 9457)."""

    def __init__(
        self, status: int, title: str, detail: str = "", **headers: str
    ) -> None:
        super().__init__(title)
        self.status = status
        problem = {
            "status": status,
            "title": title,
            "detail": detail.encode(errors="replace").decode(),
        }
        dashed = {name.replace("_", "-"): text for name, text in headers.items()}
        self.response = JSONResponse(problem, status, dashed, media_type=PROBLEM_JSON)


class ProblemDetails(BaseModel):
    """What went wrong, with what to do about it in ``detail``."""

    status: int
    title: str
    detail: str


class EncodedImage(BaseModel):
    """``b64``: the bytes of an image file in base64."""

    b64: Annotated[StrictStr, Field(min_length=1)]
    media_type: StrictStr | None = None


class DetectRequest(BaseModel):
    """One image and the classes to detect. ``model`` and ``return`` are accepted and not
    used.
    """

    model_config = ConfigDict(hide_input_in_errors=True)

    image: EncodedImage
    classes: Annotated[
        list[Annotated[StrictStr, Field(min_length=1, max_length=CLASS_NAME_MAX)]],
        Field(min_length=1, max_length=CLASSES_MAX),
    ]
    threshold: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] = (
        0.0
    )
    model: StrictStr | None = "default"
    return_format: Annotated[StrictStr | None, Field(alias="return")] = "probs"


class ImageSize(BaseModel):
    """Pixels of the upright image, the frame of the boxes."""

    w: int
    h: int


class Detection(BaseModel):
    """``box``: x0, y0, x1, y1 in pixels; ``scores``: of each requested class."""

    box: Annotated[list[float], Field(min_length=4, max_length=4)]
    label: str
    score: float
    scores: dict[str, float]


class DetectResponse(BaseModel):
    """Objects in one image, best first. ``usage``: milliseconds."""

    model: str
    image: ImageSize
    detections: list[Detection]
    usage: dict[str, float]


class Health(BaseModel):
    """``live``: it answers; ``ready``: the detector has not failed on each of the last
    images.
    """

    status: str
    live: bool
    ready: bool
    model: str
    classes: list[str]
    queue: int
    queue_max: int
    cloud: str | None


class DetectionJson(TypedDict):
    """``Detection`` before it is serialised."""

    box: list[float]
    label: str
    score: float
    scores: dict[str, float]


class ImageSizeJson(TypedDict):
    w: int
    h: int


class DetectResponseJson(TypedDict):
    """``DetectResponse`` before it is serialised."""

    model: str
    image: ImageSizeJson
    detections: list[DetectionJson]
    usage: dict[str, float]


@dataclass(frozen=True)
class ParsedRequest:
    """One parsed call; ``size``: width and height in the file's header; ``image_id``:
    sha256 of the file.
    """

    image_bytes: bytes = field(repr=False)
    size: tuple[int, int]
    image_id: str
    classes: tuple[str, ...]
    threshold: float
    key: str


def parse_request(body: bytes, key: str, pixels_max: int) -> ParsedRequest:
    """Parse a body. Raises ``HttpProblem`` 400 for what is not in the reference format,
    413 and 415 for an image that can't be used.
    """
    try:
        call = DetectRequest.model_validate_json(body)
    except ValidationError as error:
        raise HttpProblem(
            400, NOT_REFERENCE_FORMAT, _validation_reasons(error)
        ) from None
    if len(set(call.classes)) < len(call.classes):
        detail = "the scores of both could not be told apart"
        raise HttpProblem(400, "a class name is given twice", detail)
    try:
        image_bytes = decode_base64(call.image.b64)
        width, height = stored_size(image_bytes)
    except (ValueError, InputError) as error:
        raise unusable_image(error) from None
    if width * height > pixels_max:
        raise HttpProblem(
            413,
            "the image is too large",
            f"it has {width} x {height} pixels; this server takes {pixels_max:,}: make"
            " it smaller",
        )
    return ParsedRequest(
        image_bytes,
        (width, height),
        hashlib.sha256(image_bytes).hexdigest(),
        tuple(call.classes),
        call.threshold,
        key,
    )


def decode_base64(text: str) -> bytes:
    """Decode base64 as people send it: also in lines, as a ``data:`` URL, or in the
    alphabet for URLs. Raises ``InputError`` naming what does not belong there.
    """
    header, comma, data = text.partition(",")
    if header.lstrip()[:5].lower() == "data:" and comma:
        if not header.rstrip().lower().endswith(";base64"):
            raise InputError(
                "image.b64 is a data: URL without ;base64, expected base64 of an image"
                " file"
            )
        text = data
    compact = "".join(text.split()).translate(FROM_URL_ALPHABET)
    try:
        return base64.b64decode(compact, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(
            "image.b64 is not base64 of an image file: expected A-Z a-z 0-9 + / and = at"
            f" the end, blanks and line breaks are allowed ({error})"
        ) from None


def unusable_image(error: Exception) -> HttpProblem:
    """Return the problem 415 with the error's message."""
    return HttpProblem(415, "not a usable image", str(error))


def _validation_reasons(error: ValidationError) -> str:
    """Return the first wrong fields and why, without what they contained."""
    errors = error.errors(include_input=False, include_url=False, include_context=False)
    reasons = []
    for details in errors[:REASONS_MAX]:
        path = ".".join(map(str, details["loc"])) or "body"
        reasons.append(f"{path}: {details['msg']}")
    return "; ".join(reasons)[:REASON_MAX]


def detections_as_json(
    boxes: Floats, scores: Floats, classes: Sequence[str]
) -> list[DetectionJson]:
    """Return boxes [N, 4] and scores [N, K] as the format's ``detections``."""
    return [
        _detection_as_json(box, class_scores, classes)
        for box, class_scores in zip(boxes, scores, strict=True)
    ]


def _detection_as_json(
    box: Floats, class_scores: Floats, classes: Sequence[str]
) -> DetectionJson:
    rounded = [round(float(score), 6) for score in class_scores]
    best = int(np.argmax(class_scores))
    return {
        "box": [round(float(coordinate), 3) for coordinate in box],
        "label": classes[best],
        "score": rounded[best],
        "scores": dict(zip(classes, rounded, strict=True)),
    }


def image_id_of_request(body: bytes) -> str:
    """Return the sha256 of the image in a request, or an empty string."""
    try:
        encoded = DetectRequest.model_validate_json(body).image.b64
        return hashlib.sha256(decode_base64(encoded)).hexdigest()
    except ValueError:
        return ""


def openapi_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return OpenAPI's description of the problems that a route can answer with."""
    schema = {"schema": ProblemDetails.model_json_schema()}
    return {
        status: {
            "description": PROBLEM_DESCRIPTIONS[status],
            "content": {PROBLEM_JSON: schema},
        }
        for status in statuses
    }


PROBLEM_DESCRIPTIONS = {
    400: "not in the reference format, or classes that the model can't be asked about",
    401: "wrong or missing token",
    404: "not here",
    403: "asked for by another site's page",
    408: "the request took too long to arrive",
    413: "the request or its image is too large",
    415: "not a usable image",
    422: "classes that the model does not know",
    429: "too many calls; Retry-After says when to come again",
    500: "the detector failed",
    503: (
        "busy, not ready, or the cloud can't be asked; Retry-After says when to come"
        " again"
    ),
}
