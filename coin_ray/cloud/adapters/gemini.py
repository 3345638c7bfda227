"""Adapter of Google's Gemini as a detector: ``POST
/v1beta/models/{model}:generateContent``.

Boxes are ``[ymin, xmin, ymax, xmax]`` in thousandths of the image's sides. The model
writes no scores, and the prompt asks for none: it would make them up.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from coin_ray.cloud.adapters.google_vision import parse_retry_delay
from coin_ray.cloud.adapters.parsing import (
    error_object,
    expect_list,
    expect_object,
    expect_text,
    load_json,
    raise_malformed,
    sanitize_text,
)
from coin_ray.cloud.adapters.prompts import YXYX_1000
from coin_ray.cloud.protocol import (
    Auth,
    Capabilities,
    FieldRefused,
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
    Refused,
    Throttled,
)
from coin_ray.storage import JsonObject

DEFAULT_MODEL = "gemini-3.7-flash"
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
BLOCKED_REASONS = (
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
"""Values of ``finishReason`` for a response that is withheld."""
PER_DAY = re.compile(r"per[ _]?day", re.IGNORECASE)
USED_UP = re.compile(r"credits? (is|are) depleted", re.IGNORECASE)
BAD_KEY = re.compile(
    r"api key (not valid|not found|expired)|API_KEY_INVALID", re.IGNORECASE
)
OPTIONAL_FIELDS = {
    "thinkingConfig": re.compile(
        r"thinking[ _]?(config|level|budget)|thinking is not", re.I
    ),
    "temperature": re.compile(r"\btemperature\b", re.I),
}
"""Fields of a request that a generation of models may refuse, and the words of it."""
BAD_IMAGE = re.compile(r"\bimages?\b|payload size", re.IGNORECASE)


@dataclass(frozen=True)
class GeminiAdapter:
    """Gemini behind Google's Generative Language API."""

    max_tokens: int | None = None
    """Tokens that an answer may have, thoughts included; None: the service's default."""

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
        """Build the request. ``Query.model`` is the model's name, without ``models/``."""
        model = DEFAULT_MODEL if query.model == "default" else query.model
        inline_image = {
            "mimeType": image.media_type,
            "data": base64.b64encode(image.data).decode(),
        }
        parts = [
            {"inlineData": inline_image},
            {"text": YXYX_1000.prompt(query.classes)},
        ]
        generation_config = {
            "responseMimeType": "application/json",
            "responseSchema": SCHEMA,
            **_sampling_settings(model),
        }
        if self.max_tokens is not None:
            generation_config["maxOutputTokens"] = self.max_tokens
        for refused_field in query.refused_fields:
            generation_config.pop(refused_field, None)
        body = {
            "contents": [{"role": "user", "parts": parts}],
            "generationConfig": generation_config,
        }
        return PreparedRequest(
            f"/v1beta/models/{quote(model, safe='')}:generateContent",
            json.dumps(body).encode(),
        )

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        """Parse a response, and only a text that the model finished."""
        response = expect_object(load_json(headers, body), "the response")
        feedback = expect_object(response.get("promptFeedback", {}), "promptFeedback")
        if "blockReason" in feedback:
            raise _refusal_error(feedback["blockReason"], "blockReason")
        candidates = expect_list(response.get("candidates"), "candidates")
        if len(candidates) != 1:
            raise_malformed(f"{len(candidates)} candidates, expected one")
        candidate = expect_object(candidates[0], "candidates[0]")
        reason = expect_text(candidate.get("finishReason"), "finishReason")
        if reason in BLOCKED_REASONS:
            raise _refusal_error(reason, "finishReason")
        if reason != "STOP":
            hint = ""
            if reason == "MAX_TOKENS":
                hint = ": cut off; raise cloud.max_tokens, or ask for fewer classes"
            raise_malformed(
                f"finishReason is {sanitize_text(reason)[:60]!r}, not STOP{hint}"
            )
        return YXYX_1000.parse_detections(_answer_text(candidate), query, frame)

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        """Classify an error. The service also calls a limit per minute a quota; the
        details say whether one per day is used up.
        """
        error = error_object(body, "error")
        text = sanitize_text(error.get("message"))
        details = _error_details(error)
        message = f"the service answered {status}: {text}"
        delay_seconds = parse_retry_delay(details)
        if status == 429:
            per_day = any(PER_DAY.search(name) for name in _violated_quotas(details))
            if per_day or USED_UP.search(text):
                return QuotaExhausted(message)
            header_seconds = retry_after(headers)
            if header_seconds is None:
                return Throttled(message, delay_seconds)
            return Throttled(message, header_seconds)
        reasons = sanitize_text(text, *(detail.get("reason") for detail in details))
        if status == 400 and BAD_KEY.search(reasons):
            return AuthError(message)
        if status == 400:
            for field, pattern in OPTIONAL_FIELDS.items():
                if pattern.search(text):
                    return FieldRefused(message, field)
        if status == 400 and BAD_IMAGE.search(text):
            return ImageRejected(message)
        return error_for_status(status, headers, text, delay_seconds)


def _sampling_settings(model: str) -> JsonObject:
    """Return settings that keep thinking short, since it is paid for. Each generation of
    models rejects the settings of the others.
    """
    if model.startswith("gemini-2.5-flash"):
        return {"temperature": 0, "thinkingConfig": {"thinkingBudget": 0}}
    if model.startswith("gemini-2"):
        return {"temperature": 0}
    if re.match(r"gemini-[3-9]", model):
        return {"thinkingConfig": {"thinkingLevel": "low"}}
    return {}


def _refusal_error(reason: Any, key: str) -> Refused:
    return Refused(
        f"the model's answer is withheld: {key} {sanitize_text(reason)[:60]}",
        may_have_billed=True,
    )


def _answer_text(candidate: JsonObject) -> str:
    """Return the answer's parts, concatenated, without the model's thoughts."""
    answer = expect_object(candidate.get("content"), "content")
    nodes = expect_list(answer.get("parts"), "parts")
    parts = [expect_object(node, f"parts[{i}]") for i, node in enumerate(nodes)]
    return "".join(
        expect_text(part.get("text"), "text")
        for part in parts
        if part.get("thought") is not True
    )


def _error_details(error: JsonObject) -> list[JsonObject]:
    details = error.get("details")
    if not isinstance(details, list):
        return []
    return [detail for detail in details if isinstance(detail, dict)]


def _violated_quotas(details: list[JsonObject]) -> list[str]:
    """Return the names of the quotas that a google.rpc.QuotaFailure lists."""
    names = []
    for detail in details:
        violations = detail.get("violations")
        for violation in violations if isinstance(violations, list) else []:
            if isinstance(violation, dict):
                quota_id, metric = (
                    violation.get("quotaId"),
                    violation.get("quotaMetric"),
                )
                names.append(sanitize_text(quota_id, metric))
    return names
