"""Adapter of Google's Gemini as a detector: ``POST
/v1beta/models/{model}:generateContent``.

Boxes are ``[ymin, xmin, ymax, xmax]`` in thousandths of the image's sides. The model
writes no scores, and the prompt asks for none: it would make them up. With
``ModelOptions.label_scores`` logprobs those of a label are the probabilities of its
tokens.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from coin_ray.cloud.adapters.google_vision import parse_retry_delay
from coin_ray.cloud.adapters.model_options import (
    TOP_LOGPROBS,
    ModelOptions,
    box_schema,
)
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
from coin_ray.cloud.adapters.token_scores import TokenChoice
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

DEFAULT_MODEL = "gemini-3.8-flash"
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
    "mediaResolution": re.compile(r"media[ _]?resolution", re.I),
    "responseLogprobs": re.compile(r"log[ _]?probs", re.I),
    "responseSchema": re.compile(
        r"response[ _]?(json[ _]?)?schema|too many states", re.I
    ),
}
"""Fields of a request that a generation of models may refuse, and the words of it."""
BAD_IMAGE = re.compile(r"\bimages?\b|payload size", re.IGNORECASE)


@dataclass(frozen=True)
class GeminiAdapter:
    """Gemini behind Google's Generative Language API."""

    options: ModelOptions = field(default_factory=ModelOptions)
    """``max_tokens``: thoughts included."""

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
            reads_descriptions=True,
            key_settings=self.options.key_settings,
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
            {"text": YXYX_1000.prompt(query.classes, query.descriptions)},
        ]
        generation_config = self._generation_config(model, query)
        body = {
            "contents": [{"role": "user", "parts": parts}],
            "generationConfig": generation_config,
        }
        return PreparedRequest(
            f"/v1beta/models/{quote(model, safe='')}:generateContent",
            json.dumps(body).encode(),
        )

    def _generation_config(self, model: str, query: Query) -> JsonObject:
        """Return the settings of the answer, without those that were refused."""
        options = self.options
        config: JsonObject = {"responseMimeType": "application/json"}
        if options.json_schema:
            config["responseSchema"] = _list_schema(query)
        config |= _sampling_settings(model, options.reasoning_effort)
        if options.max_tokens is not None:
            config["maxOutputTokens"] = options.max_tokens
        if options.detail != "default":
            resolution = f"MEDIA_RESOLUTION_{options.detail.upper()}"
            config["mediaResolution"] = resolution
        if options.asks_logprobs and "responseLogprobs" not in query.refused_fields:
            config |= {"responseLogprobs": True, "logprobs": TOP_LOGPROBS}
        for refused_field in query.refused_fields:
            config.pop(refused_field, None)
        return config

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
        tokens = []
        if self.options.asks_logprobs:
            tokens = _token_choices(candidate.get("logprobsResult"))
        return YXYX_1000.parse_detections(_answer_text(candidate), query, frame, tokens)

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


def _list_schema(query: Query) -> JsonObject:
    """Return the schema of the list of boxes in the service's own types."""
    box = box_schema(YXYX_1000.key, YXYX_1000.box_format, query.classes)
    del box["additionalProperties"]
    return _with_upper_types({"type": "array", "items": box})


def _with_upper_types(schema: JsonObject) -> JsonObject:
    """Return a JSON schema whose types are written in capitals."""
    converted: JsonObject = {}
    for key, node in schema.items():
        if key == "type":
            converted[key] = str(node).upper()
        elif key == "properties":
            converted[key] = {
                name: _with_upper_types(child) for name, child in node.items()
            }
        elif key == "items":
            converted[key] = _with_upper_types(node)
        else:
            converted[key] = node
    return converted


def _sampling_settings(model: str, effort: str) -> JsonObject:
    """Return settings that keep thinking short, since it is paid for, or as long as
    ``effort`` says. Each generation of models rejects the settings of the others.
    """
    if effort != "default":
        return {"thinkingConfig": {"thinkingLevel": effort}}
    if model.startswith("gemini-2.5-flash"):
        return {"temperature": 0, "thinkingConfig": {"thinkingBudget": 0}}
    if model.startswith("gemini-2"):
        return {"temperature": 0}
    if re.match(r"gemini-[3-9]", model):
        return {"thinkingConfig": {"thinkingLevel": "low"}}
    return {}


def _token_choices(logprobs: Any) -> list[TokenChoice]:
    """Return the tokens of the answer; none where the service does not name them."""
    result = logprobs if isinstance(logprobs, dict) else {}
    chosen, top = result.get("chosenCandidates"), result.get("topCandidates")
    if not isinstance(chosen, list):
        return []
    steps = (
        top if isinstance(top, list) and len(top) == len(chosen) else [{}] * len(chosen)
    )
    choices = []
    for node, step in zip(chosen, steps, strict=True):
        token = _parse_token(node)
        if token is None:
            return []
        nodes = step.get("candidates") if isinstance(step, dict) else None
        alternatives = []
        for other in nodes if isinstance(nodes, list) else []:
            alternative = _parse_token(other)
            if alternative is not None:
                alternatives.append(alternative)
        choices.append(TokenChoice(*token, tuple(alternatives)))
    return choices


def _parse_token(node: Any) -> tuple[bytes, float] | None:
    if not isinstance(node, dict) or not isinstance(node.get("token"), str):
        return None
    logprob = node.get("logProbability", 0)  # proto3 leaves a zero out
    if isinstance(logprob, bool) or not isinstance(logprob, (int, float)):
        return None
    try:
        return node["token"].encode(errors="replace"), float(logprob)
    except OverflowError:
        return None


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
