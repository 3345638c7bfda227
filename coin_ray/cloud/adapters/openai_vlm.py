"""Adapter of language models that see, behind any API like OpenAI's: ``POST
/chat/completions`` (vLLM, OpenRouter, DashScope, OpenAI).

``cloud.url`` is what OpenAI's own client calls base_url, version included:
``https://host/v1``. ``cloud.model`` is the model's name; without one it is left out,
which servers of a single model accept. Such models write no scores.

How a model writes boxes does not depend on the API, so ``cloud.coordinates`` must say
it: ``xyxy_1000`` (Qwen2-VL, Qwen3-VL), ``yxyx_1000`` (Gemini) or ``xyxy_pixels``
(Qwen2.5-VL). The last are pixels of the image as the model's server resized it, and are
read as pixels of the image sent. The two are the same only if the server had nothing to
resize: both sides multiples of 28, and no more pixels than the server takes. Set
``cloud.max_side`` for that, by the images' shape: 1344 sends 16:9 as 1344 x 756, 1120
sends 4:3 as 1120 x 840, 1176 sends 3:2 as 1176 x 784. With other sides, boxes are off
by up to 14 pixels at the far end.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

from coin_ray.cloud.adapters.parsing import (
    as_list,
    as_object,
    as_text,
    error_object,
    load_json,
    malformed,
    short_text,
)
from coin_ray.cloud.adapters.prompts import XYXY_1000, XYXY_PIXELS, YXYX_1000, BoxText
from coin_ray.cloud.protocol import (
    RETRY_AFTER_MAX,
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
    BadRequest,
    CloudError,
    ImageRejected,
    QuotaExhausted,
    Refused,
    Throttled,
)

Coordinates = Literal["xyxy_1000", "yxyx_1000", "xyxy_pixels"]
BOX_TEXTS: dict[Coordinates, BoxText] = {
    "xyxy_1000": XYXY_1000,
    "yxyx_1000": YXYX_1000,
    "xyxy_pixels": XYXY_PIXELS,
}
USED_UP = re.compile(
    r"insufficient_(quota|balance|credit)|exceeded_current_quota|billing", re.IGNORECASE
)
BAD_KEY = re.compile(
    r"api[ _]key.*(not valid|invalid|incorrect|expired)|(invalid|incorrect|expired)["
    r" _]api[ _]key",
    re.IGNORECASE,
)
UNSAFE = re.compile(
    r"content_filter|content_policy|content management"
    r" policy|data_?inspection|moderation|flagged",
    re.IGNORECASE,
)
NO_EYES = re.compile(
    r"image_url|\bnot support|\bonly supported|multimodal", re.IGNORECASE
)
"""The model or its server takes no images at all."""
BAD_IMAGE = re.compile(r"image|context.length|input tokens", re.IGNORECASE)
DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+(?:\.\d+)?)s)?(?:(\d+)ms)?")


@dataclass(frozen=True)
class OpenAiVlmAdapter:
    """A language model that writes boxes as ``coordinates`` says. They are part of its
    name, since they are part of the question.
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
        prompt = BOX_TEXTS[self.coordinates].prompt(query.classes)
        if self.coordinates == "xyxy_pixels":
            prompt += (
                f" The image is {image.width} pixels wide and {image.height} pixels"
                " high."
            )
        picture = {
            "url": (
                f"data:{image.media_type};base64,{base64.b64encode(image.data).decode()}"
            )
        }
        content = [
            {"type": "image_url", "image_url": picture},
            {"type": "text", "text": prompt},
        ]
        model = {} if query.model == "default" else {"model": query.model}
        body = {
            **model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
        }
        return PreparedRequest("/chat/completions", json.dumps(body).encode())

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        """Only a text that the model finished is read. Some gateways put errors into
        answers of status 200.
        """
        answer = as_object(load_json(headers, body), "the answer")
        self._check_no_error(answer)
        choices = as_list(answer.get("choices"), "choices")
        if len(choices) != 1:
            malformed(f"{len(choices)} choices instead of one")
        choice = as_object(choices[0], "choices[0]")
        self._check_no_error(choice)
        message = as_object(choice.get("message"), "message")
        _check_finished(choice.get("finish_reason"), message.get("refusal"))
        return BOX_TEXTS[self.coordinates].detections(
            as_text(message.get("content"), "message.content"), query, frame
        )

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        """A rate limit may call itself a quota; only some codes say that it is used up
        for good.
        """
        codes, text = _problem(body)
        detail = short_text(codes, text)
        message = f"the service answered {status}: {detail}"
        if status == 429:
            return (
                QuotaExhausted(message)
                if USED_UP.search(codes)
                else Throttled(message, _wait(headers))
            )
        if status == 404:
            return BadRequest(
                f"{message}; check cloud.model, and that cloud.url holds the version,"
                " like https://host/v1"
            )
        if status in (400, 403, 422) and UNSAFE.search(detail):
            return Refused(message)
        return (
            _of_bad_request(detail)(message)
            if status in (400, 422)
            else by_status(status, headers, detail)
        )

    def _check_no_error(self, part: dict[str, Any]) -> None:
        if part.get("error") is None:
            return
        error = as_object(part["error"], "error")
        code = error.get("code")
        if not isinstance(code, int) or not 400 <= code < 600:
            malformed(
                "an error instead of an answer:"
                f" {short_text(code, error.get('message'))}"
            )
        raise self.classify_error(code, {}, json.dumps({"error": error}).encode())


def _check_finished(reason: Any, refusal: Any) -> None:
    if reason == "content_filter" or (isinstance(refusal, str) and refusal):
        _refuse(short_text(refusal) or "content_filter")
    if reason != "stop":
        hint = (
            ": cut off at the server's limit of tokens; raise it, or ask for fewer"
            " classes"
            if reason == "length"
            else ""
        )
        malformed(f"finish_reason is {short_text(reason)[:60]!r}, not stop{hint}")


def _refuse(why: str) -> NoReturn:
    raise Refused(f"the model refused: {why}", may_have_billed=True)


def _problem(body: bytes) -> tuple[str, str]:
    """Codes and text of an error body: ``{"error": {...}}``, ``{"error": text}``, or
    without that envelope.
    """
    answer = error_object(body)
    error = answer.get("error", answer)
    if not isinstance(error, dict):
        return "", short_text(error)
    return short_text(error.get("code"), error.get("type")), short_text(
        error.get("message"), error.get("detail")
    )


def _of_bad_request(detail: str) -> type[CloudError]:
    if BAD_KEY.search(detail):
        return AuthError
    return (
        ImageRejected
        if BAD_IMAGE.search(detail) and not NO_EYES.search(detail)
        else BadRequest
    )


def _wait(headers: Mapping[str, str]) -> float | None:
    """Retry-After, or else the longest time until a limit that has nothing left is
    reset (``6m0s``).
    """
    wait = retry_after(headers)
    if wait is not None:
        return wait
    empty = (
        kind
        for kind in ("requests", "tokens")
        if headers.get(f"x-ratelimit-remaining-{kind}", "").strip() == "0"
    )
    waits = [
        s
        for kind in empty
        if (s := _duration(headers.get(f"x-ratelimit-reset-{kind}", ""))) is not None
    ]
    return min(max(waits), RETRY_AFTER_MAX) if waits else None


def _duration(text: str) -> float | None:
    match = DURATION.fullmatch(text.strip())
    if match is None or not any(match.groups()):
        return None
    hours, minutes, seconds, milliseconds = (
        float(part or 0) for part in match.groups()
    )
    return hours * 3600 + minutes * 60 + seconds + milliseconds / 1000
