"""Adapter of DeepDataSpace's API, version 2: DINO-X and Grounding DINO 1.5 and 1.6.

``POST /v2/task/.../detection`` takes the image on as a task, ``GET
/v2/task_status/{uuid}`` is asked until it has ended. Answers are ``{"code": 0, "msg":
..., "data": ...}``; any other code is an error, whatever the HTTP status. Boxes are
xyxy pixels of the image sent.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from coin_ray.cloud.adapters.parsing import (
    Found,
    as_list,
    as_number,
    as_numbers,
    as_object,
    as_score,
    as_text,
    detections,
    error_object,
    load_json,
    malformed,
    short_text,
)
from coin_ray.cloud.adapters.prompts import check_class_names
from coin_ray.cloud.protocol import (
    Auth,
    Capabilities,
    Frame,
    Pending,
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

POLL_SECONDS = 1.0
MERGE_IOU = 0.8
BUSY = 202001
SEPARATORS = ".?"
"""Characters that end a phrase of the prompt."""
TASK = re.compile(r"[0-9A-Za-z-]{1,64}")
ABOUT_THE_IMAGE = re.compile(
    r"\b(image|picture|photo|decode|resolution)", re.IGNORECASE
)
BAD_TOKEN = re.compile(
    r"unauthori[sz]ed|\btoken\b.*\b(invalid|expired|missing|not)\b|\b(invalid|expired|missing|no)"
    r" token\b",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class DdsAdapter:
    """DINO-X, or Grounding DINO, behind DeepDataSpace's API version 2."""

    family: Literal["dino-x", "grounding-dino"]

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            self.family,
            open_vocabulary=True,
            per_class_scores=False,
            idempotent=True,
            url="https://api.deepdataspace.com",
            auth=Auth("Token", ""),
            max_side=1536,
            asynchronous=True,
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        """Class names become one prompt, joined by full stops."""
        check_class_names(query.classes, SEPARATORS)
        path, model = (
            ("dinox", "DINO-X-1.0")
            if self.family == "dino-x"
            else ("grounding_dino", "GroundingDino-1.6-Pro")
        )
        body = {
            "model": model if query.model == "default" else query.model,
            "image": (
                f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"
            ),
            "prompt": {"type": "text", "text": ".".join(query.classes)},
            "targets": ["bbox"],
            "bbox_threshold": float(query.score_min),
            "iou_threshold": MERGE_IOU,
        }
        return PreparedRequest(f"/v2/task/{path}/detection", json.dumps(body).encode())

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections | Pending:
        """The answer to the task's POST or to a poll. A phrase of merged class names is
        unmapped unless the label map has it.
        """
        answer = as_object(load_json(headers, body), "the answer")
        if as_number(answer.get("code"), "code") != 0:
            _not_ok(answer, headers)
        data = as_object(answer.get("data"), "data")
        status = as_text(data["status"], "data.status") if "status" in data else None
        if status == "success":
            return detections(_objects(data), "xyxy", query, frame, "label")
        if status == "failed":
            _failed(short_text(data.get("error")))
        if status not in ("waiting", "running", None):
            malformed(f"unknown task state {short_text(status)[:60]!r}")
        if status is None or "task_uuid" in data:
            return Pending(
                _poll(as_text(data.get("task_uuid"), "data.task_uuid")), POLL_SECONDS
            )
        return Pending(None, POLL_SECONDS)

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        answer = error_object(body)
        known = _by_message(answer, headers) if status < 500 else None
        return known or by_status(status, headers, _message(answer))


def _poll(task: str) -> PreparedRequest:
    if not TASK.fullmatch(task):
        malformed("data.task_uuid is not an id")
    return PreparedRequest(f"/v2/task_status/{task}", method="GET")


def _objects(data: dict[str, Any]) -> list[Found]:
    found = []
    for i, value in enumerate(
        as_list(
            as_object(data.get("result"), "data.result").get("objects"),
            "data.result.objects",
        )
    ):
        place = f"objects[{i}]"
        one = as_object(value, place)
        box = as_numbers(one.get("bbox"), 4, f"{place}.bbox")
        found.append(
            Found(
                box,
                [as_text(one.get("category"), f"{place}.category")],
                as_score(one.get("score"), f"{place}.score"),
            )
        )
    return found


def _failed(reason: str) -> NoReturn:
    message = f"the task failed: {reason or 'no reason given'}"
    if ABOUT_THE_IMAGE.search(reason):
        raise ImageRejected(message, may_have_billed=True)
    raise Transient(message, may_have_billed=True)


def _message(answer: dict[str, Any]) -> str:
    errors = answer.get("errors")
    return short_text(answer.get("msg"), *(errors if isinstance(errors, list) else ()))


def _by_message(
    answer: dict[str, Any], headers: Mapping[str, str]
) -> CloudError | None:
    """The service's codes are not documented, so its words decide."""
    text = _message(answer)
    message, lower = (
        f"the service answered code {short_text(str(answer.get('code')))}: {text}",
        text.lower(),
    )
    if "out of quota" in lower:
        return QuotaExhausted(message)
    if "rate limit" in lower or answer.get("code") == BUSY:
        return Throttled(message, retry_after(headers))
    if BAD_TOKEN.search(text):
        return AuthError(message)
    return ImageRejected(message) if ABOUT_THE_IMAGE.search(text) else None


def _not_ok(answer: dict[str, Any], headers: Mapping[str, str]) -> NoReturn:
    error = _by_message(answer, headers)
    if error is None:
        malformed(f"unknown code {short_text(str(answer['code']))}: {_message(answer)}")
    raise error
