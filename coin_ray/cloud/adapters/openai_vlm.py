"""Adapter of vision language models behind any OpenAI-compatible API: ``POST
/chat/completions`` (vLLM, OpenRouter, DashScope, OpenAI).

``cloud.url`` is what OpenAI's own client calls base_url, version included:
``https://host/v1``. ``cloud.model`` is the model's name; without one the field is
omitted, which servers of a single model accept. Such models write no scores.

How a model writes boxes does not depend on the API, so ``cloud.coordinates`` must say
it: ``xyxy_1000`` (Qwen2-VL, Qwen3-VL), ``yxyx_1000`` (Gemini) or ``xyxy_pixels``
(Qwen2.5-VL). ``xyxy_pixels`` are pixels of the image as the model's server resized it;
the adapter reads them as pixels of the image sent. The two are equal only if the server
did not resize: both sides multiples of 28, and no more pixels than the server accepts.
Set ``cloud.max_side`` for that, by the images' aspect ratio: 1344 sends 16:9 as
1344 x 756, 1120 sends 4:3 as 1120 x 840, 1176 sends 3:2 as 1176 x 784. With other sides,
boxes are off by up to 14 pixels at the right and lower border.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from coin_ray.cloud.adapters.parsing import (
    JsonObject,
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
    XYXY_PIXELS,
    YXYX_1000,
    BoxNotation,
)
from coin_ray.cloud.protocol import (
    RETRY_AFTER_MAX,
    Capabilities,
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

Coordinates = Literal["xyxy_1000", "yxyx_1000", "xyxy_pixels"]
BOX_NOTATIONS: dict[Coordinates, BoxNotation] = {
    "xyxy_1000": XYXY_1000,
    "yxyx_1000": YXYX_1000,
    "xyxy_pixels": XYXY_PIXELS,
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
DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?")


@dataclass(frozen=True)
class OpenAiVlmAdapter:
    """A language model that writes boxes as ``coordinates`` says. They are part of the
    adapter's name, since they are part of the prompt.
    """

    coordinates: Coordinates

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            f"openai-vlm-{self.coordinates}",
            open_vocabulary=True,
            per_class_scores=False,
            idempotent=False,
            max_bytes=7_300_000,
            min_side=28,
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        prompt = BOX_NOTATIONS[self.coordinates].prompt(query.classes)
        if self.coordinates == "xyxy_pixels":
            size = f"{image.width} pixels wide and {image.height} pixels high"
            prompt += f" The image is {size}."
        encoded_image = base64.b64encode(image.data).decode()
        data_url = f"data:{image.media_type};base64,{encoded_image}"
        message_parts = [
            {"type": "image_url", "image_url": {"url": data_url}},
            {"type": "text", "text": prompt},
        ]
        body = {
            **({} if query.model == "default" else {"model": query.model}),
            "messages": [{"role": "user", "content": message_parts}],
            "temperature": 0,
        }
        return PreparedRequest("/chat/completions", json.dumps(body).encode())

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
        _check_finished(choice.get("finish_reason"), message.get("refusal"))
        text = expect_text(message.get("content"), "message.content")
        return BOX_NOTATIONS[self.coordinates].parse_detections(text, query, frame)

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


def _check_finished(finish_reason: Any, refusal: Any) -> None:
    has_refusal_text = isinstance(refusal, str) and refusal
    if finish_reason == "content_filter" or has_refusal_text:
        text = sanitize_text(refusal) or "content_filter"
        raise Refused(f"the model refused: {text}", may_have_billed=True)
    if finish_reason == "length":
        raise_malformed(
            "finish_reason is 'length', not stop: cut off at the server's limit of"
            " tokens; raise it, or ask for fewer classes"
        )
    if finish_reason != "stop":
        reason = sanitize_text(finish_reason)[:60]
        raise_malformed(f"finish_reason is {reason!r}, not stop")


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
    return min(max(reset_seconds), RETRY_AFTER_MAX) if reset_seconds else None


def _parse_duration(text: str) -> float | None:
    match = DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        return None
    parts = [float(part or 0) for part in match.groups()]
    hours, minutes, seconds, milliseconds = parts
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
