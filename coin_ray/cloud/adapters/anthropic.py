"""Adapter of Anthropic's Claude as a detector: ``POST /v1/messages``.

Boxes are pixels of the image as the service resizes it: it is sent no larger than the
service takes without resizing. The model writes no scores, and the service names no
probabilities of tokens. ``Query.model`` is the model's name.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime

from coin_ray.cloud.adapters.model_families import find_family
from coin_ray.cloud.adapters.model_options import (
    ModelOptions,
    box_schema,
    list_schema,
)
from coin_ray.cloud.adapters.openai_vlm import (
    BAD_IMAGE,
    CUT_OFF_REASONS,
    find_refused_field,
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
from coin_ray.cloud.adapters.prompts import XYXY_PIXELS
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
    BadRequest,
    CloudError,
    ImageRejected,
    QuotaExhausted,
    Refused,
    Throttled,
)
from coin_ray.storage import JsonObject

DEFAULT_MODEL = "claude-sonnet-5-5"
DEFAULT_TOKENS = 8192
API_VERSION = "2023-06-01"
OVERLOADED = 529
FAMILY = find_family("claude")
FINISHED_REASONS = ("end_turn", "stop_sequence")
THOUGHT_BLOCKS = ("thinking", "redacted_thinking")
USED_UP = re.compile(r"credit balance|billing", re.IGNORECASE)
LIMITS = ("requests", "tokens", "input-tokens", "output-tokens")
"""Names in the headers ``anthropic-ratelimit-LIMIT-remaining`` and ``-reset``."""


@dataclass(frozen=True)
class AnthropicAdapter:
    """Claude behind Anthropic's own API."""

    options: ModelOptions = field(default_factory=ModelOptions)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "anthropic",
            open_vocabulary=True,
            per_class_scores=False,
            idempotent=False,
            url="https://api.anthropic.com",
            auth=Auth("X-Api-Key", ""),
            max_bytes=3_700_000,
            max_side=FAMILY.max_side,
            max_pixels=FAMILY.max_pixels,
            reads_descriptions=True,
            key_settings=self.options.key_settings,
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        prompt = XYXY_PIXELS.prompt(query.classes, query.descriptions)
        prompt += (
            f" The image is {image.width} pixels wide and {image.height} pixels high."
        )
        source = {
            "type": "base64",
            "media_type": image.media_type,
            "data": base64.b64encode(image.data).decode(),
        }
        blocks = [{"type": "image", "source": source}, {"type": "text", "text": prompt}]
        body: JsonObject = {
            "model": DEFAULT_MODEL if query.model == "default" else query.model,
            "max_tokens": self.options.max_tokens or DEFAULT_TOKENS,
            "messages": [{"role": "user", "content": blocks}],
        }
        output_config = self._output_config(query)
        if output_config:
            body["output_config"] = output_config
        return PreparedRequest(
            "/v1/messages",
            json.dumps(body).encode(),
            headers={"anthropic-version": API_VERSION},
        )

    def _output_config(self, query: Query) -> JsonObject:
        """Return how the answer is written. Its schema knows no bounds of numbers or
        lengths of lists.
        """
        output_config: JsonObject = {}
        if self.options.reasoning_effort != "default":
            output_config["effort"] = self.options.reasoning_effort
        if self.options.json_schema and "format" not in query.refused_fields:
            box = box_schema(XYXY_PIXELS.key, XYXY_PIXELS.box_format, query.classes)
            for bound in ("minItems", "maxItems"):
                del box["properties"][XYXY_PIXELS.key][bound]
            schema = list_schema(box)
            output_config["format"] = {"type": "json_schema", "schema": schema}
        return output_config

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        """Parse a response, and only a text that the model finished."""
        response = expect_object(load_json(headers, body), "the response")
        if response.get("type") == "error":
            raise self.classify_error(500, headers, body)
        reason = expect_text(response.get("stop_reason"), "stop_reason")
        if reason == "refusal":
            raise Refused("the model refused", may_have_billed=True)
        if reason in CUT_OFF_REASONS:
            raise_malformed(
                f"stop_reason is {reason!r}: cut off; raise cloud.max_tokens, or ask"
                " for fewer classes"
            )
        if reason not in FINISHED_REASONS:
            raise_malformed(f"stop_reason is {sanitize_text(reason)[:60]!r}")
        texts = []
        for number, node in enumerate(expect_list(response.get("content"), "content")):
            block = expect_object(node, f"content[{number}]")
            kind = expect_text(block.get("type"), f"content[{number}].type")
            if kind == "text":
                texts.append(expect_text(block.get("text"), f"content[{number}].text"))
            elif kind not in THOUGHT_BLOCKS:
                raise_malformed(
                    f"content[{number}] is a {sanitize_text(kind)[:40]!r} block"
                )
        if not texts:
            raise_malformed("content has no text")
        return XYXY_PIXELS.parse_detections("".join(texts), query, frame)

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        """Classify an error. An overloaded service (529) has not answered, so nothing is
        billed.
        """
        error = error_object(body, "error")
        kind = sanitize_text(error.get("type"))
        text = sanitize_text(kind, error.get("message"))
        message = f"the service answered {status}: {text}"
        if status in (400, 402, 403) and USED_UP.search(text):
            return QuotaExhausted(message)
        if status == 429 or status == OVERLOADED or kind == "overloaded_error":
            return Throttled(message, _reset_seconds(headers))
        if status == 400:
            if find_refused_field(body, ("output_config", "output_format")):
                return FieldRefused(message, "format")
            if BAD_IMAGE.search(text):
                return ImageRejected(message)
            return BadRequest(message)
        return error_for_status(status, headers, text)


def _reset_seconds(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of Retry-After, or else until the last of the used-up limits is
    reset, by the service's clock.
    """
    header_seconds = retry_after(headers)
    if header_seconds is not None:
        return header_seconds
    waits = []
    for limit in LIMITS:
        prefix = f"anthropic-ratelimit-{limit}"
        if headers.get(f"{prefix}-remaining", "").strip() != "0":
            continue
        try:
            reset = datetime.fromisoformat(headers.get(f"{prefix}-reset", ""))
            now = parsedate_to_datetime(headers.get("date", ""))
            waits.append(max(0.0, (reset - now).total_seconds()))
        except (ValueError, TypeError):
            continue
    return max(waits) if waits else None
