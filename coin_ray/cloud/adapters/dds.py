"""Adapter of DeepDataSpace's API, version 2: DINO-X and Grounding DINO 1.5 and 1.6.

``POST /v2/task/.../detection`` creates a task for the image; ``GET
/v2/task_status/{uuid}`` is polled until the task has ended. Responses are ``{"code": 0,
"msg": ..., "data": ...}``; any other code is an error, whatever the HTTP status. Boxes
are xyxy pixels of the image sent.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from coin_ray.cloud.adapters.parsing import (
    ParsedBox,
    error_object,
    expect_list,
    expect_number,
    expect_numbers,
    expect_object,
    expect_score,
    expect_text,
    load_json,
    map_detections,
    raise_malformed,
    sanitize_text,
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

POLL_SECONDS = 1.0
MERGE_IOU = 0.8
BUSY_CODE = 202001
SEPARATORS = ".?"
"""Characters that end a phrase of the prompt."""
TASK_ID = re.compile(r"[0-9A-Za-z-]{1,64}")
BAD_IMAGE = re.compile(r"\b(image|picture|photo|decode|resolution)", re.IGNORECASE)
BAD_TOKEN = re.compile(
    r"unauthori[sz]ed|\btoken\b.*\b(invalid|expired|missing|not)\b"
    r"|\b(invalid|expired|missing|no) token\b",
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
        """Build the request that creates a task. Its prompt joins the class names by
        full stops.
        """
        check_class_names(query.classes, SEPARATORS)
        if self.family == "dino-x":
            path, default_model = "dinox", "DINO-X-1.0"
        else:
            path, default_model = "grounding_dino", "GroundingDino-1.6-Pro"
        encoded_image = base64.b64encode(image.data).decode()
        body = {
            "model": default_model if query.model == "default" else query.model,
            "image": f"data:{image.media_type};base64,{encoded_image}",
            "prompt": {"type": "text", "text": ".".join(query.classes)},
            "targets": ["bbox"],
            "bbox_threshold": float(query.score_min),
            "iou_threshold": MERGE_IOU,
        }
        return PreparedRequest(f"/v2/task/{path}/detection", json.dumps(body).encode())

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections | Pending:
        """Parse the response to the request that creates a task, or to a poll of it. A
        phrase of merged class names is unmapped unless the label map has it.
        """
        task = self.decode_task(headers, body)
        if isinstance(task, Pending):
            return task
        return map_detections(
            _parse_boxes(task), "xyxy", query, frame, "label", expects_names=True
        )

    def decode_task(
        self, headers: Mapping[str, str], body: bytes
    ) -> JsonObject | Pending:
        """Return the result of a task that has ended well, or how to poll it."""
        response = expect_object(load_json(headers, body), "the response")
        if expect_number(response.get("code"), "code") != 0:
            _raise_response_error(response, headers)
        task = expect_object(response.get("data"), "data")
        status = (
            expect_text(task["status"], "data.status") if "status" in task else None
        )
        if status == "success":
            return expect_object(task.get("result"), "data.result")
        if status == "failed":
            _raise_task_failed(sanitize_text(task.get("error")))
        if status not in ("waiting", "running", None):
            raise_malformed(f"unknown task state {sanitize_text(status)[:60]!r}")
        if status is None or "task_uuid" in task:
            task_id = expect_text(task.get("task_uuid"), "data.task_uuid")
            return Pending(_poll_request(task_id), POLL_SECONDS)
        return Pending(None, POLL_SECONDS)

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        response = error_object(body)
        error = _error_from_message(response, headers) if status < 500 else None
        return error or error_for_status(status, headers, _message(response))


def _poll_request(task_id: str) -> PreparedRequest:
    if not TASK_ID.fullmatch(task_id):
        raise_malformed("data.task_uuid is not an id")
    return PreparedRequest(f"/v2/task_status/{task_id}", method="GET")


def _parse_boxes(task_result: JsonObject) -> list[ParsedBox]:
    nodes = expect_list(task_result.get("objects"), "data.result.objects")
    return [_parse_box(node, f"objects[{i}]") for i, node in enumerate(nodes)]


def _parse_box(node: Any, field: str) -> ParsedBox:
    json_object = expect_object(node, field)
    return ParsedBox(
        expect_numbers(json_object.get("bbox"), 4, f"{field}.bbox"),
        [expect_text(json_object.get("category"), f"{field}.category")],
        expect_score(json_object.get("score"), f"{field}.score"),
    )


def _raise_task_failed(reason: str) -> NoReturn:
    message = f"the task failed: {reason or 'no reason given'}"
    if BAD_IMAGE.search(reason):
        raise ImageRejected(message, may_have_billed=True)
    raise Transient(message, may_have_billed=True)


def _message(response: JsonObject) -> str:
    errors = response.get("errors")
    error_texts = errors if isinstance(errors, list) else []
    return sanitize_text(response.get("msg"), *error_texts)


def _error_from_message(
    response: JsonObject, headers: Mapping[str, str]
) -> CloudError | None:
    """Choose the error by the words of the message: the service does not document its
    codes.
    """
    text = _message(response)
    code = sanitize_text(str(response.get("code")))
    message = f"the service answered code {code}: {text}"
    if "out of quota" in text.lower():
        return QuotaExhausted(message)
    if "rate limit" in text.lower() or response.get("code") == BUSY_CODE:
        return Throttled(message, retry_after(headers))
    if BAD_TOKEN.search(text):
        return AuthError(message)
    return ImageRejected(message) if BAD_IMAGE.search(text) else None


def _raise_response_error(response: JsonObject, headers: Mapping[str, str]) -> NoReturn:
    error = _error_from_message(response, headers)
    if error is None:
        code = sanitize_text(str(response["code"]))
        raise_malformed(f"unknown code {code}: {_message(response)}")
    raise error
