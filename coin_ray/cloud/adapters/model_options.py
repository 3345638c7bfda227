"""What requests to language models have in common: settings, and the JSON schema of the
list of boxes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from coin_ray.cloud.adapters.parsing import UNIT_MAXIMA, BoxFormat
from coin_ray.config import Cloud
from coin_ray.storage import JsonObject

Detail = Literal["default", "low", "medium", "high", "original"]
ReasoningEffort = Literal[
    "default", "none", "minimal", "low", "medium", "high", "xhigh", "max"
]
LabelScores = Literal["none", "logprobs", "agreement"]
TOP_LOGPROBS = 5
"""Alternatives of a token that are asked for."""
LIST_KEY = "detections"
"""Key of the list of boxes, where a schema must be an object."""


@dataclass(frozen=True)
class ModelOptions:
    """Settings of a request to a language model (``coin_ray.config.Cloud``)."""

    max_tokens: int | None = None
    json_schema: bool = True
    detail: Detail = "default"
    reasoning_effort: ReasoningEffort = "default"
    label_scores: LabelScores = "none"

    @classmethod
    def from_config(cls, cloud: Cloud) -> ModelOptions:
        return cls(
            cloud.max_tokens,
            cloud.json_schema,
            cloud.detail,
            cloud.reasoning_effort,
            cloud.label_scores,
        )

    @property
    def asks_logprobs(self) -> bool:
        return self.label_scores == "logprobs"

    @property
    def key_settings(self) -> tuple[tuple[str, str], ...]:
        """Return the settings that change answers, for the journal's key."""
        settings: list[tuple[str, str]] = []
        if self.detail != "default":
            settings.append(("detail", self.detail))
        if self.reasoning_effort != "default":
            settings.append(("reasoning_effort", self.reasoning_effort))
        if self.asks_logprobs:
            settings.append(("label_scores", self.label_scores))
        return tuple(settings)


def box_schema(key: str, box_format: BoxFormat, classes: Sequence[str]) -> JsonObject:
    """Return the JSON schema of one box: its four numbers under ``key``, and one of the
    classes.
    """
    has_decimals = box_format in ("xyxy_ratio", "xyxy_percent")
    coordinate: JsonObject = {"type": "number" if has_decimals else "integer"}
    if box_format in UNIT_MAXIMA:
        coordinate |= {"minimum": 0, "maximum": UNIT_MAXIMA[box_format]}
    box = {"type": "array", "items": coordinate, "minItems": 4, "maxItems": 4}
    label = {"type": "string", "enum": list(classes)}
    return {
        "type": "object",
        "properties": {key: box, "label": label},
        "required": [key, "label"],
        "additionalProperties": False,
    }


def list_schema(box: JsonObject) -> JsonObject:
    """Return the JSON schema of an object with the list of boxes."""
    return {
        "type": "object",
        "properties": {LIST_KEY: {"type": "array", "items": box}},
        "required": [LIST_KEY],
        "additionalProperties": False,
    }
