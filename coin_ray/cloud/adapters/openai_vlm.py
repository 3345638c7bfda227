"""Adapter of vision language models behind any OpenAI-compatible API: ``POST
/chat/completions`` (vLLM, OpenRouter, DashScope, OpenAI).

``cloud.url`` is what OpenAI's own client calls base_url, version included:
``https://host/v1``. ``cloud.model`` is the model's name; without one the field is
omitted, which servers of a single model accept.

How a model writes boxes does not depend on the API. ``model_families`` knows it for many
models, ``cloud.coordinates`` says it for others. Pixels are those of the image as the
model's server resized it: for a family of the table images are sent no larger than its
servers take, and boxes are read in the image that it resizes to. With
``cloud.coordinates xyxy_pixels`` they are read as pixels of the image sent: choose
``cloud.max_side`` so that the server does not resize.

Such models write no scores; with ``ModelOptions.label_scores`` logprobs those of a label
are the probabilities of its tokens, where the server names them.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from coin_ray.cloud.adapters.model_families import (
    UNKNOWN_FAMILY,
    Coordinates,
    ModelFamily,
)
from coin_ray.cloud.adapters.model_options import (
    TOP_LOGPROBS,
    ModelOptions,
    box_schema,
    list_schema,
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
from coin_ray.cloud.adapters.prompts import (
    XYXY_1000,
    XYXY_PERCENT,
    XYXY_PIXELS,
    XYXY_RATIO,
    YXYX_1000,
    BoxNotation,
)
from coin_ray.cloud.adapters.token_scores import TokenChoice
from coin_ray.cloud.protocol import (
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
    BadRequest,
    CloudError,
    ImageRejected,
    QuotaExhausted,
    Refused,
    Throttled,
)
from coin_ray.storage import JsonObject

BOX_NOTATIONS: dict[Coordinates, BoxNotation] = {
    "xyxy_1000": XYXY_1000,
    "yxyx_1000": YXYX_1000,
    "xyxy_pixels": XYXY_PIXELS,
    "xyxy_ratio": XYXY_RATIO,
    "xyxy_percent": XYXY_PERCENT,
}
USED_UP = re.compile(
    r"insufficient_(quota|balance|credit)|exceeded_current_quota|billing", re.IGNORECASE
)
BAD_KEY = re.compile(
    r"api[ _]key.*(not valid|invalid|incorrect|expired)"
    r"|(invalid|incorrect|expired)[ _]api[ _]key",
    re.IGNORECASE,
)
UNSAFE = re.compile(
    r"content_filter|content_policy|content management policy|data_?inspection"
    r"|moderation|flagged",
    re.IGNORECASE,
)
NO_IMAGE_SUPPORT = re.compile(
    r"image_url|\bnot support|\bonly supported|multimodal", re.IGNORECASE
)
"""The model or its server takes no images at all."""
BAD_IMAGE = re.compile(r"image|context.length|input tokens", re.IGNORECASE)
TOKENS_KEYS = ("max_tokens", "max_completion_tokens")
OPTIONAL_FIELDS = (
    "temperature",
    *TOKENS_KEYS,
    "response_format",
    "top_logprobs",
    "logprobs",
)
"""Fields of a request that some models refuse."""
UNSUPPORTED_CODES = (
    "unsupported_parameter",
    "unsupported_value",
    "unknown_parameter",
    "invalid_json_schema",
)
UNSUPPORTED = re.compile(
    r"not support|unsupported|does not accept|not (permitted|allowed|accepted)|unknown"
    r"|unrecogni[sz]ed|unexpected|extra|deprecated|only the default|only be set|fixed"
    r"|strictly positive|cannot be (set|specified)",
    re.IGNORECASE,
)
REASON_KEYS = ("finish_reason", "native_finish_reason", "stop_reason", "done_reason")
FINISHED_REASONS = (
    "stop",
    "eos",
    "eos_token",
    "stop_sequence",
    "end_turn",
    "end_of_text",
    "end",
    "complete",
    "completed",
    "finished",
)
CUT_OFF_REASONS = (
    "length",
    "max_tokens",
    "max_length",
    "max_output_tokens",
    "max_new_tokens",
    "max_completion_tokens",
    "model_length",
    "model_context_window_exceeded",
    "token_limit",
    "incomplete",
)
REFUSED_REASONS = (
    "content_filter",
    "content_filtered",
    "refusal",
    "safety",
    "recitation",
    "blocklist",
    "prohibited_content",
    "spii",
    "image_safety",
    "guardrail_intervened",
)
"""Values of a finish_reason, in lower case: OpenAI, Anthropic, Gemini, Mistral, Hugging
Face, Cohere and Bedrock."""
TEXT_PARTS, THOUGHT_PARTS = (
    ("text", "output_text"),
    ("thinking", "reasoning", "redacted_thinking"),
)
"""Values of ``type`` of a message's parts."""
DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?")


@dataclass(frozen=True)
class OpenAiVlmAdapter:
    """A language model that writes boxes as ``coordinates`` says. They are part of the
    adapter's name, since they are part of the prompt.
    """

    coordinates: Coordinates
    options: ModelOptions = field(default_factory=ModelOptions)
    family: ModelFamily = UNKNOWN_FAMILY

    @property
    def capabilities(self) -> Capabilities:
        key_settings = self.options.key_settings
        if self._reads_resized_pixels:
            key_settings += (("side_multiple", str(self.family.side_multiple)),)
        return Capabilities(
            f"openai-vlm-{self.coordinates}",
            open_vocabulary=True,
            per_class_scores=False,
            idempotent=False,
            max_bytes=7_300_000,
            min_side=28,
            max_side=self.family.max_side,
            max_pixels=self.family.max_pixels,
            reads_descriptions=True,
            key_settings=key_settings,
        )

    @property
    def _reads_resized_pixels(self) -> bool:
        return self.coordinates == "xyxy_pixels" and self.family.side_multiple > 1

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        prompt = BOX_NOTATIONS[self.coordinates].prompt(
            query.classes, query.descriptions
        )
        if self.coordinates == "xyxy_pixels":
            width, height = self.family.resized((image.width, image.height))
            prompt += f" The image is {width} pixels wide and {height} pixels high."
        encoded_image = base64.b64encode(image.data).decode()
        image_url = {"url": f"data:{image.media_type};base64,{encoded_image}"}
        if self.options.detail != "default":
            image_url["detail"] = self.options.detail
        message_parts = [
            {"type": "image_url", "image_url": image_url},
            {"type": "text", "text": prompt},
        ]
        body = {
            **({} if query.model == "default" else {"model": query.model}),
            "messages": [{"role": "user", "content": message_parts}],
            **self._optional_fields(query),
        }
        if self.options.reasoning_effort != "default":
            body["reasoning_effort"] = self.options.reasoning_effort
        return PreparedRequest("/chat/completions", json.dumps(body).encode())

    def _optional_fields(self, query: Query) -> JsonObject:
        """Return the fields that some models refuse, without those that were refused.
        The number of tokens has an old and a new name.
        """
        refused_fields = query.refused_fields | self.family.refused_fields
        optional_fields: JsonObject = {"temperature": 0}
        if self.options.json_schema:
            notation = BOX_NOTATIONS[self.coordinates]
            box = box_schema(notation.key, notation.box_format, query.classes)
            schema = {"name": "boxes", "strict": True, "schema": list_schema(box)}
            optional_fields["response_format"] = {
                "type": "json_schema",
                "json_schema": schema,
            }
        if self.options.asks_logprobs and "logprobs" not in refused_fields:
            optional_fields |= {"logprobs": True, "top_logprobs": TOP_LOGPROBS}
        if self.options.max_tokens is not None:
            tokens_key = next(
                (key for key in TOKENS_KEYS if key not in refused_fields), None
            )
            if tokens_key is None:
                raise BadRequest(
                    f"the service refuses {' and '.join(TOKENS_KEYS)}: leave"
                    " cloud.max_tokens out"
                )
            optional_fields[tokens_key] = self.options.max_tokens
        return {
            key: setting
            for key, setting in optional_fields.items()
            if key not in refused_fields
        }

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        """Parse a response, and only a text that the model finished. Some gateways put
        errors into responses of status 200.
        """
        response = expect_object(load_json(headers, body), "the response")
        self._check_no_error(response)
        choices = expect_list(response.get("choices"), "choices")
        if len(choices) != 1:
            raise_malformed(f"{len(choices)} choices, expected one")
        choice = expect_object(choices[0], "choices[0]")
        self._check_no_error(choice)
        message = expect_object(choice.get("message"), "message")
        _check_finished(choice, message.get("refusal"))
        text = _content_text(message.get("content"))
        logprobs = choice.get("logprobs") if self.options.asks_logprobs else None
        if self._reads_resized_pixels:
            frame = self.family.resized_frame(frame)
        notation = BOX_NOTATIONS[self.coordinates]
        return notation.parse_detections(text, query, frame, _token_choices(logprobs))

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        """Classify an error. A rate limit may call itself a quota; only some codes say
        that a quota is used up for good.
        """
        codes, text = _error_codes_and_text(body)
        detail = sanitize_text(codes, text)
        message = f"the service answered {status}: {detail}"
        if status == 429 and USED_UP.search(codes):
            return QuotaExhausted(message)
        if status == 429:
            return Throttled(message, _retry_seconds(headers))
        if status == 404:
            return BadRequest(
                f"{message}; check cloud.model, and that cloud.url includes the version,"
                " like https://host/v1"
            )
        if status in (400, 403, 422) and UNSAFE.search(detail):
            return Refused(message)
        if status in (400, 422):
            refused_field = find_refused_field(body, OPTIONAL_FIELDS)
            if refused_field is not None:
                return FieldRefused(message, refused_field)
            return _bad_request_error(message, detail)
        return error_for_status(status, headers, detail)

    def _check_no_error(self, part: JsonObject) -> None:
        if part.get("error") is None:
            return
        error = expect_object(part["error"], "error")
        code = error.get("code")
        if not isinstance(code, int) or not 400 <= code < 600:
            text = sanitize_text(code, error.get("message"))
            raise_malformed(f"an error instead of an answer: {text}")
        raise self.classify_error(code, {}, json.dumps({"error": error}).encode())


def _check_finished(choice: JsonObject, refusal: Any) -> None:
    """Raise unless the model ended its answer by itself. Servers name the reason in words
    of their own, gateways add the one of the server behind them.
    """
    reasons = [choice.get(key) for key in REASON_KEYS]
    names = [reason.lower() for reason in reasons if isinstance(reason, str)]
    has_refusal_text = isinstance(refusal, str) and refusal
    if has_refusal_text or any(name in REFUSED_REASONS for name in names):
        text = sanitize_text(refusal) or sanitize_text(*reasons)
        raise Refused(f"the model refused: {text}", may_have_billed=True)
    cut_off = [name for name in names if name in CUT_OFF_REASONS]
    if cut_off:
        raise_malformed(
            f"finish_reason is {cut_off[0]!r}, not stop: cut off at the server's limit of"
            " tokens; raise it by cloud.max_tokens, or ask for fewer classes"
        )
    reason = sanitize_text(choice.get("finish_reason"))[:60]
    if reason.lower() not in FINISHED_REASONS:
        raise_malformed(f"finish_reason is {reason!r}, not stop")


def _content_text(content: Any) -> str:
    """Return the text of a message's content: a string, or a list of parts, of which
    those that hold the model's thoughts are left out.
    """
    if isinstance(content, str):
        return content
    texts = []
    for number, node in enumerate(expect_list(content, "message.content")):
        part = expect_object(node, f"content[{number}]")
        kind = expect_text(part.get("type"), f"content[{number}].type")
        if kind == "refusal":
            text = sanitize_text(part.get("refusal"))
            raise Refused(f"the model refused: {text}", may_have_billed=True)
        if kind in TEXT_PARTS:
            texts.append(expect_text(part.get("text"), f"content[{number}].text"))
        elif kind not in THOUGHT_PARTS:
            raise_malformed(f"content[{number}] is a {sanitize_text(kind)[:40]!r} part")
    if not texts:
        raise_malformed("message.content has no text")
    return "".join(texts)


def _token_choices(logprobs: Any) -> list[TokenChoice]:
    """Return the tokens of the answer; none where the server does not name them, or not
    in OpenAI's form.
    """
    nodes = logprobs.get("content") if isinstance(logprobs, dict) else None
    choices = []
    for node in nodes if isinstance(nodes, list) else []:
        token = _parse_token(node)
        if token is None:
            return []
        others = node.get("top_logprobs")
        alternatives = []
        for other in others if isinstance(others, list) else []:
            alternative = _parse_token(other)
            if alternative is not None:
                alternatives.append(alternative)
        choices.append(TokenChoice(*token, tuple(alternatives)))
    return choices


def _parse_token(node: Any) -> tuple[bytes, float] | None:
    """Return a token's bytes and its log probability. A character may be divided among
    tokens: only the list of bytes is exact.
    """
    if not isinstance(node, dict) or not isinstance(node.get("token"), str):
        return None
    logprob = node.get("logprob")
    if isinstance(logprob, bool) or not isinstance(logprob, (int, float)):
        return None
    token = node["token"].encode(errors="replace")
    if isinstance(node.get("bytes"), list):
        with suppress(TypeError, ValueError):
            token = bytes(node["bytes"])
    try:
        return token, float(logprob)
    except OverflowError:
        return None


def find_refused_field(body: bytes, names: Sequence[str]) -> str | None:
    """Return which of these fields of a request an error body refuses, if any."""
    response = error_object(body)
    error = response.get("error", response)
    if not isinstance(error, dict):
        error = {"message": error}
    param = re.split(r"[.\[]", str(error.get("param")))[0]
    if param in names and error.get("code") in UNSUPPORTED_CODES:
        return param
    for text in _error_texts(error):
        named = [name for name in names if re.search(rf"\b{name}\b", text)]
        if named and UNSUPPORTED.search(text):
            # the field that may replace it is named after it
            return min(named, key=text.index)
    return None


def _error_texts(error: JsonObject) -> list[str]:
    """Return the texts of an error: its message, or one for each of its details."""
    texts = [sanitize_text(error.get("message"))]
    details = error.get("detail")
    for detail in details if isinstance(details, list) else [details]:
        if isinstance(detail, dict):
            location = detail.get("loc")
            path = location if isinstance(location, list) else []
            texts.append(sanitize_text(*path, detail.get("msg")))
        else:
            texts.append(sanitize_text(detail))
    return texts


def _error_codes_and_text(body: bytes) -> tuple[str, str]:
    """Return the codes and the text of an error body: ``{"error": {...}}``, ``{"error":
    text}``, or the same without that envelope.
    """
    response = error_object(body)
    error = response.get("error", response)
    if not isinstance(error, dict):
        return "", sanitize_text(error)
    codes = sanitize_text(error.get("code"), error.get("type"))
    return codes, sanitize_text(error.get("message"), error.get("detail"))


def _bad_request_error(message: str, detail: str) -> CloudError:
    if BAD_KEY.search(detail):
        return AuthError(message)
    if BAD_IMAGE.search(detail) and not NO_IMAGE_SUPPORT.search(detail):
        return ImageRejected(message)
    return BadRequest(message)


def _retry_seconds(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of Retry-After, or else the longest time until a used-up limit
    is reset (``6m0s``).
    """
    header_seconds = retry_after(headers)
    if header_seconds is not None:
        return header_seconds
    reset_seconds = []
    for limit in ("requests", "tokens"):
        remaining = headers.get(f"x-ratelimit-remaining-{limit}", "").strip()
        seconds = _parse_duration(headers.get(f"x-ratelimit-reset-{limit}", ""))
        if remaining == "0" and seconds is not None:
            reset_seconds.append(seconds)
    return max(reset_seconds) if reset_seconds else None


def _parse_duration(text: str) -> float | None:
    match = DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        return None
    parts = [float(part or 0) for part in match.groups()]
    hours, minutes, seconds, milliseconds = parts
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
