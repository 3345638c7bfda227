"""Prompts for services that accept any class names, and strict parsing of the text that
a language model answers with.

A model is asked for a JSON list ``[{"bbox_2d": [...], "label": ...}]``. Only such a list
in full, with or without a code fence around it, is accepted. A list that was cut off is
never repaired: the boxes it lacks would count as "no objects".
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from coin_ray.class_names import normalize_class_name
from coin_ray.cloud.adapters.parsing import (
    BoxFormat,
    ParsedBox,
    expect_list,
    expect_numbers,
    expect_object,
    expect_text,
    load_json,
    map_detections,
    raise_malformed,
    sanitize_text,
)
from coin_ray.cloud.protocol import Frame, Query, RawDetections
from coin_ray.errors import BadRequest, Refused

OVERSHOOT_MAX = 0.2
"""Models write boxes that reach a little beyond the image. A coordinate further out, as
a share of the range, is in another unit."""
FENCE = "```"
REFUSAL = re.compile(
    r"\s*(i\Wm sorry|i am sorry|sorry\b|i can(not|\Wt)\b|i( am|\Wm) (unable|not able))",
    re.IGNORECASE,
)


def check_class_names(classes: tuple[str, ...], separators: str = "") -> None:
    """Raise ``BadRequest`` for an empty list of classes, and for names that a response
    could not tell apart.

    ``separators``: characters that separate names in the service's prompt.
    """
    if not classes:
        raise BadRequest("there are no classes to ask for")
    for name in classes:
        has_separator = any(separator in name for separator in separators)
        if not name.strip() or not name.isprintable() or has_separator:
            expected = "printable text"
            if separators:
                listed = " and ".join(separators)
                expected += f" without {listed}, which separate names in the prompt"
            raise BadRequest(
                f"the class name {sanitize_text(name)[:60]!r} cannot be asked for:"
                f" expected {expected}; rename the class"
            )
    if len({normalize_class_name(name) for name in classes}) != len(classes):
        raise BadRequest(
            "two class names differ only in case, spaces, hyphens or underscores;"
            " responses could not tell them apart"
        )


@dataclass(frozen=True, slots=True)
class BoxNotation:
    """How a model writes a box.

    ``key``: the JSON key of its numbers; ``order``: what the numbers are, as the prompt
    says it; ``unit``: their unit, in words.
    """

    key: str
    order: str
    box_format: BoxFormat
    unit: str

    def prompt(self, classes: tuple[str, ...]) -> str:
        """Write the prompt for these classes. Raises ``BadRequest`` for classes that
        cannot be asked for.
        """
        check_class_names(classes)
        return (
            "Detect every instance of these classes in the image:"
            f" {json.dumps(list(classes), ensure_ascii=False)}. "
            f'Answer with a JSON list only, one object per instance: {{"{self.key}":'
            f' {self.order}, "label": "..."}}. '
            "The label is one of the classes, exactly as written above. Coordinates"
            f" are {self.unit}. Answer [] if there is none."
        )

    def parse_detections(self, text: str, query: Query, frame: Frame) -> RawDetections:
        """Parse the boxes in a model's whole text, without scores.

        Raises ``Refused`` if the model declines, and ``ProtocolError`` for any text that
        is not a list of boxes.
        """
        if REFUSAL.match(text):
            raise Refused(
                f"the model refused: {sanitize_text(text)}", may_have_billed=True
            )
        nodes = expect_list(load_json({}, _remove_fence(text)), "the model's text")
        boxes = [
            self._parse_box(node, f"element {i}", frame) for i, node in enumerate(nodes)
        ]
        return map_detections(boxes, self.box_format, query, frame, "none")

    def _parse_box(self, node: object, field: str, frame: Frame) -> ParsedBox:
        json_object = expect_object(node, field)
        box = expect_numbers(json_object.get(self.key), 4, f"{field}.{self.key}")
        in_pixels = self.box_format == "xyxy"
        sides = frame.sent * 2 if in_pixels else (1000,) * 4
        for coordinate, side in zip(box, sides, strict=True):
            if not -OVERSHOOT_MAX * side <= coordinate <= (1 + OVERSHOOT_MAX) * side:
                raise_malformed(
                    f"{field}.{self.key} has {coordinate:g}, far outside 0..{side}: are"
                    f" these coordinates {self.unit}?"
                )
        label = expect_text(json_object.get("label"), f"{field}.label")
        return ParsedBox(box, [label], 1.0)


XYXY_1000 = BoxNotation(
    "bbox_2d",
    "[x1, y1, x2, y2]",
    "xyxy_1000",
    "thousandths of the image's width and height, 0 to 1000",
)
YXYX_1000 = BoxNotation(
    "box_2d",
    "[ymin, xmin, ymax, xmax]",
    "yxyx_1000",
    "thousandths of the image's height and width, 0 to 1000",
)
XYXY_PIXELS = BoxNotation("bbox_2d", "[x1, y1, x2, y2]", "xyxy", "pixels of the image")


def _remove_fence(text: str) -> str:
    text = text.strip()
    is_fenced = text.startswith(FENCE) and text.endswith(FENCE)
    if not is_fenced or len(text) < 2 * len(FENCE):
        return text
    fenced_text = text[len(FENCE) : -len(FENCE)]
    if fenced_text[:4].lower() == "json":
        return fenced_text[4:]
    return fenced_text
