"""Adapter of Google's Gemini as a detector: ``POST
/v1beta/models/{model}:generateContent``.

Boxes are ``[ymin, xmin, ymax, xmax]`` in thousandths of the image's sides. The model
writes no scores, and none are asked for: it would make them up.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from coin_ray.cloud.adapters.google_vision import retry_delay
from coin_ray.cloud.adapters.parsing import (
    as_list,
    as_object,
    as_text,
    error_object,
    load_json,
    malformed,
    short_text,
)
from coin_ray.cloud.adapters.prompts import YXYX_1000
from coin_ray.cloud.protocol import (
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
    Refused,
    Throttled,
)

MODEL = "gemini-3.7-flash"
SCHEMA = {
    "type": "ARRAY",
    "items": {
        "type": "OBJECT",
        "properties": {
            YXYX_1000.key: {"type": "ARRAY", "items": {"type": "INTEGER"}},
            "label": {"type": "STRING"},
        },
        "required": [YXYX_1000.key, "label"],
    },
}
BLOCKED = (
    "SAFETY",
    "RECITATION",
    "LANGUAGE",
    "BLOCKLIST",
    "PROHIBITED_CONTENT",
    "SPII",
    "IMAGE_SAFETY",
    "IMAGE_PROHIBITED_CONTENT",
    "IMAGE_RECITATION",
)
"""What ``finishReason`` is where the answer is withheld."""
PER_DAY = re.compile(r"per[ _]?day", re.IGNORECASE)
USED_UP = re.compile(r"credits? (is|are) depleted", re.IGNORECASE)
BAD_KEY = re.compile(
    r"api key (not valid|not found|expired)|API_KEY_INVALID", re.IGNORECASE
)
BAD_IMAGE = re.compile(r"\bimages?\b|payload size", re.IGNORECASE)


@dataclass(frozen=True)
class GeminiAdapter:
    """Gemini behind Google's Generative Language API."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "gemini",
            open_vocabulary=True,
            per_class_scores=False,
            idempotent=False,
            url="https://generativelanguage.googleapis.com",
            auth=Auth("X-Goog-Api-Key", ""),
            max_bytes=14_000_000,
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        """``Query.model`` is the model's name, without ``models/``."""
        model = MODEL if query.model == "default" else query.model
        picture = {
            "inlineData": {
                "mimeType": image.media_type,
                "data": base64.b64encode(image.data).decode(),
            }
        }
        parts = [picture, {"text": YXYX_1000.prompt(query.classes)}]
        config = {
            "responseMimeType": "application/json",
            "responseSchema": SCHEMA,
            **_family(model),
        }
        body = {
            "contents": [{"role": "user", "parts": parts}],
            "generationConfig": config,
        }
        return PreparedRequest(
            f"/v1beta/models/{quote(model, safe='')}:generateContent",
            json.dumps(body).encode(),
        )

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        """Only a text that the model finished is read."""
        answer = as_object(load_json(headers, body), "the answer")
        feedback = as_object(answer.get("promptFeedback", {}), "promptFeedback")
        if "blockReason" in feedback:
            raise _refused(feedback["blockReason"], "blockReason")
        candidates = as_list(answer.get("candidates"), "candidates")
        if len(candidates) != 1:
            malformed(f"{len(candidates)} candidates instead of one")
        candidate = as_object(candidates[0], "candidates[0]")
        reason = as_text(candidate.get("finishReason"), "finishReason")
        if reason in BLOCKED:
            raise _refused(reason, "finishReason")
        if reason != "STOP":
            malformed(
                f"finishReason is {short_text(reason)[:60]!r}, not STOP"
                + (": cut off" if reason == "MAX_TOKENS" else "")
            )
        return YXYX_1000.detections(_text(candidate), query, frame)

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        """A limit per minute is called a quota as well; the details tell whether one
        per day is used up.
        """
        error = error_object(body).get("error")
        error = error if isinstance(error, dict) else {}
        text, details = short_text(error.get("message")), error.get("details")
        details = (
            [d for d in details if isinstance(d, dict)]
            if isinstance(details, list)
            else []
        )
        message = f"the service answered {status}: {text}"
        wait = retry_delay(details)
        if status == 429:
            header = retry_after(headers)
            used_up = USED_UP.search(text) or any(
                PER_DAY.search(name) for name in _violated(details)
            )
            return (
                QuotaExhausted(message)
                if used_up
                else Throttled(message, wait if header is None else header)
            )
        if status == 400 and BAD_KEY.search(
            short_text(text, *(d.get("reason") for d in details))
        ):
            return AuthError(message)
        if status == 400 and BAD_IMAGE.search(text):
            return ImageRejected(message)
        return by_status(status, headers, text, wait)


def _family(model: str) -> dict[str, Any]:
    """Little thinking, since it is paid for. Each generation refuses the settings of
    the others.
    """
    if model.startswith("gemini-2.5-flash"):
        return {"temperature": 0, "thinkingConfig": {"thinkingBudget": 0}}
    if model.startswith("gemini-2"):
        return {"temperature": 0}
    return (
        {"thinkingConfig": {"thinkingLevel": "low"}}
        if re.match(r"gemini-[3-9]", model)
        else {}
    )


def _refused(reason: Any, key: str) -> Refused:
    return Refused(
        f"the model's answer is withheld: {key} {short_text(reason)[:60]}",
        may_have_billed=True,
    )


def _text(candidate: dict[str, Any]) -> str:
    """The answer's parts, joined, without the model's thoughts."""
    values = as_list(
        as_object(candidate.get("content"), "content").get("parts"), "parts"
    )
    parts = [as_object(v, f"parts[{i}]") for i, v in enumerate(values)]
    return "".join(
        as_text(p.get("text"), "text") for p in parts if p.get("thought") is not True
    )


def _violated(details: list[dict[str, Any]]) -> list[str]:
    """Names of the quotas that a google.rpc.QuotaFailure lists."""
    violations = [
        v
        for d in details
        if isinstance(d.get("violations"), list)
        for v in d["violations"]
        if isinstance(v, dict)
    ]
    return [short_text(v.get("quotaId"), v.get("quotaMetric")) for v in violations]
