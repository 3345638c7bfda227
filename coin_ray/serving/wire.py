"""The server's side of the reference wire format (docs/cloud.md): what a call must look
like, and what answers look like.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictStr, ValidationError
from starlette.responses import JSONResponse

from coin_ray.data.canonical import stored_size
from coin_ray.errors import InputError
from coin_ray.predictors.onnx_detectors import Floats

BODY_MAX = 64 * 2**20
CLASSES_MAX = 4096
NAME_MAX = 1000
REASON_MAX = 300
PROBLEM = "application/problem+json"


class Problem(Exception):
    """An answer in ``application/problem+json``."""

    def __init__(
        self, status: int, title: str, detail: str = "", **headers: str
    ) -> None:
        super().__init__(title)
        self.status = status
        content = {
            "status": status,
            "title": title,
            "detail": detail.encode(errors="replace").decode(),
        }
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        self.response = JSONResponse(content, status, names, media_type=PROBLEM)


class ProblemAnswer(BaseModel):
    """What went wrong, with what to do about it in ``detail``."""

    status: int
    title: str
    detail: str


class SentImage(BaseModel):
    """``b64``: the bytes of an image file in base64."""

    b64: Annotated[StrictStr, Field(min_length=1)]
    media_type: StrictStr | None = None


class DetectCall(BaseModel):
    """One question. ``model`` and ``return`` are accepted and not used."""

    model_config = ConfigDict(hide_input_in_errors=True)

    image: SentImage
    classes: Annotated[
        list[Annotated[StrictStr, Field(min_length=1, max_length=NAME_MAX)]],
        Field(min_length=1, max_length=CLASSES_MAX),
    ]
    threshold: Annotated[float, Field(strict=True, ge=0, le=1, allow_inf_nan=False)] = (
        0.0
    )
    model: StrictStr | None = "default"
    wanted: Annotated[StrictStr | None, Field(alias="return")] = "probs"


class ImageSize(BaseModel):
    """Pixels of the upright image, the frame of the boxes."""

    w: int
    h: int


class Detection(BaseModel):
    """``box``: x0, y0, x1, y1 in pixels; ``scores``: of each class that was asked
    about.
    """

    box: Annotated[list[float], Field(min_length=4, max_length=4)]
    label: str
    score: float
    scores: dict[str, float]


class DetectAnswer(BaseModel):
    """Objects in one image, best first. ``usage``: milliseconds."""

    model: str
    image: ImageSize
    detections: list[Detection]
    usage: dict[str, float]


class Health(BaseModel):
    """``live``: it answers; ``ready``: the detector has not failed in each of the last
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


@dataclass(frozen=True)
class Question:
    """One parsed call; ``size``: as the file's header has it; ``image_id``: sha256 of
    the file.
    """

    data: bytes = field(repr=False)
    size: tuple[int, int]
    image_id: str
    classes: tuple[str, ...]
    threshold: float
    key: str


def parse(body: bytes, key: str, pixels_max: int) -> Question:
    """Raises ``Problem`` 400 for what is not in the reference format, 413 and 415 for
    an image that can't be used.
    """
    try:
        call = DetectCall.model_validate_json(body)
    except ValidationError as error:
        raise Problem(
            400, "the request is not in the reference format", _reason(error)
        ) from None
    if len(set(call.classes)) < len(call.classes):
        raise Problem(
            400,
            "a class name is given twice",
            "the scores of both could not be told apart",
        )
    try:
        data = base64.b64decode(call.image.b64, validate=True)
        width, height = stored_size(data)
    except (binascii.Error, ValueError, InputError) as error:
        raise Problem(415, "not a usable image", str(error)) from None
    if width * height > pixels_max:
        raise Problem(
            413,
            "the image is too large",
            f"it has {width} x {height} pixels; this server takes {pixels_max:,}: make"
            " it smaller",
        )
    return Question(
        data,
        (width, height),
        hashlib.sha256(data).hexdigest(),
        tuple(call.classes),
        call.threshold,
        key,
    )


def _reason(error: ValidationError) -> str:
    """The first places that are wrong, without what stood there."""
    found = error.errors(include_input=False, include_url=False, include_context=False)
    return "; ".join(
        f"{'.'.join(map(str, one['loc'])) or 'body'}: {one['msg']}" for one in found[:3]
    )[:REASON_MAX]


def elements(
    boxes: Floats, scores: Floats, classes: Sequence[str]
) -> list[dict[str, Any]]:
    """Boxes [N, 4] and scores [N, K] as the format's ``detections``."""
    made = []
    for box, row in zip(boxes, scores, strict=True):
        best = int(np.argmax(row))
        named = {
            name: round(float(score), 6)
            for name, score in zip(classes, row, strict=True)
        }
        made.append(
            {
                "box": [round(float(v), 3) for v in box],
                "label": classes[best],
                "score": named[classes[best]],
                "scores": named,
            }
        )
    return made


def sent_image_id(body: bytes) -> str:
    """sha256 of the image in a request, or an empty string."""
    try:
        return hashlib.sha256(
            base64.b64decode(DetectCall.model_validate_json(body).image.b64)
        ).hexdigest()
    except ValueError:
        return ""


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI's word on the problems a route can answer with."""
    schema = {"schema": ProblemAnswer.model_json_schema()}
    return {
        status: {"description": REASONS[status], "content": {PROBLEM: schema}}
        for status in statuses
    }


REASONS = {
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
