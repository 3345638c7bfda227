"""How families of vision language models write boxes, and how their servers resize
images.

The table is a start, never trusted: ``parsing.check_box_units`` checks every answer
against the unit, ``box_extent`` all answers together. Models that are not in it need
``cloud.coordinates``.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Literal

from coin_ray.cloud.protocol import Frame

Coordinates = Literal[
    "xyxy_1000", "yxyx_1000", "xyxy_pixels", "xyxy_ratio", "xyxy_percent"
]
SIDE_MAX = 4096


@dataclass(frozen=True)
class ModelFamily:
    """One family of models. ``coordinates`` None: unknown."""

    name: str
    pattern: re.Pattern[str]
    coordinates: Coordinates | None = None
    max_side: int = SIDE_MAX
    """Longest side in pixels that the server does not make smaller."""
    max_pixels: int | None = None
    """Most pixels that the server does not make fewer."""
    side_multiple: int = 1
    """The server resizes both sides to multiples of this many pixels; boxes in pixels
    are in that image."""
    refused_fields: frozenset[str] = frozenset()
    """Fields of a request that are known to be refused, so that none is refused."""

    def resized(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return (width, height) in pixels of an image of that size after the server
        has resized it.
        """
        multiple = self.side_multiple
        width, height = (
            max(multiple, round(side / multiple) * multiple) for side in size
        )
        if self.max_pixels is None or width * height <= self.max_pixels:
            return width, height
        factor = math.sqrt(self.max_pixels / (size[0] * size[1]))
        width, height = (
            max(multiple, math.floor(side * factor / multiple) * multiple)
            for side in size
        )
        return width, height

    def resized_frame(self, frame: Frame) -> Frame:
        """Return the frame whose sent image is the one that the server resized."""
        sent = self.resized(frame.sent)
        if sent == frame.sent:
            return frame
        visible_size = None
        if frame.visible_size is not None:
            visible_size = (
                frame.visible_size[0] * sent[0] / frame.sent[0],
                frame.visible_size[1] * sent[1] / frame.sent[1],
            )
        return replace(frame, sent=sent, visible_size=visible_size)


REASONING = frozenset({"temperature", "max_tokens"})
"""OpenAI's reasoning models accept the default temperature only, and
``max_completion_tokens``."""
UNKNOWN_FAMILY = ModelFamily("unknown", re.compile(""))
FAMILIES = (
    ModelFamily(
        "Qwen2.5-VL",
        re.compile(r"qwen-?2\.5-?vl"),
        "xyxy_pixels",
        max_pixels=1_003_520,  # DashScope's default of 1280 tokens of 28 x 28
        side_multiple=28,
    ),
    ModelFamily(
        "Qwen-VL", re.compile(r"qwen-?(2-?vl|[3-9]|vl-(max|plus))"), "xyxy_1000"
    ),
    ModelFamily("Gemini", re.compile(r"gemini"), "yxyx_1000"),
    ModelFamily(
        "GPT-5 and 5.1",
        re.compile(r"gpt-5(\.1)?(?!\.?\d)"),
        "xyxy_ratio",
        max_side=2048,
        refused_fields=REASONING,
    ),
    ModelFamily(
        "GPT-5.2 and later",
        re.compile(r"gpt-([6-9]|5\.)"),
        "xyxy_pixels",
        max_side=2048,
        refused_fields=REASONING,
    ),
    ModelFamily("o-series", re.compile(r"^o[134](-|$)"), refused_fields=REASONING),
    ModelFamily(
        "Claude",
        re.compile(r"claude"),
        "xyxy_pixels",
        max_side=1568,
        max_pixels=1_150_000,
    ),
    ModelFamily("Grok", re.compile(r"grok-[4-9]"), "xyxy_percent"),
    ModelFamily("GLM-V", re.compile(r"glm-[45](\.\d)?v"), "xyxy_1000"),
    ModelFamily("Perceptron", re.compile(r"perceptron|isaac"), "xyxy_1000"),
)
"""The first family whose pattern is in a model's name counts."""


def find_family(model: str) -> ModelFamily:
    """Return the family of a model by its name, also with the maker before it:
    ``Qwen/Qwen3-VL-8B-Instruct``; ``UNKNOWN_FAMILY`` if the table has none.
    """
    name = model.lower().rpartition("/")[2]
    for family in FAMILIES:
        if family.pattern.search(name):
            return family
    return UNKNOWN_FAMILY
