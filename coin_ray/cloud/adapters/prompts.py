"""What is asked of services that take any class names, and the strict reading of a
language model's text.

A model is asked for a JSON list ``[{"bbox_2d": [...], "label": ...}]``. Such a list in
full, with or without a code fence around it, is an answer; nothing else is, and a list
that was cut off is never repaired: the boxes it lacks would count as "no objects".
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from coin_ray.class_names import fold
from coin_ray.cloud.adapters.parsing import (
    BoxFormat,
    Found,
    as_list,
    as_numbers,
    as_object,
    as_text,
    detections,
    load_json,
    malformed,
    short_text,
)
from coin_ray.cloud.protocol import Frame, Query, RawDetections
from coin_ray.errors import BadRequest, Refused

OVERSHOOT_MAX = 0.2
"""Models write boxes that reach a little beyond the image. What lies further out, as a
share of the range, is in another unit."""
FENCE = "```"
REFUSAL = re.compile(
    r"\s*(i\Wm sorry|i am sorry|sorry\b|i can(not|\Wt)\b|i( am|\Wm) (unable|not able))",
    re.IGNORECASE,
)


def check_class_names(classes: tuple[str, ...], separators: str = "") -> None:
    """Raises ``BadRequest`` for names whose answers could not be told apart, and for
    none at all.

    ``separators``: characters that separate names in the service's prompt.
    """
    if not classes:
        raise BadRequest("there are no classes to ask for")
    without = (
        f" without {' and '.join(separators)}, which separate names in the prompt"
        if separators
        else ""
    )
    for name in classes:
        if (
            not name.strip()
            or not name.isprintable()
            or any(c in name for c in separators)
        ):
            raise BadRequest(
                f"the class name {short_text(name)[:60]!r} can't be asked for: expected"
                f" printable text{without}; rename the class"
            )
    if len({fold(name) for name in classes}) != len(classes):
        raise BadRequest(
            "two class names differ only in case, spaces, hyphens or underscores:"
            " answers could not be told apart"
        )


@dataclass(frozen=True, slots=True)
class BoxText:
    """How a model writes a box: the key it stands under, its numbers in words, and
    their format.
    """

    key: str
    order: str
    box_format: BoxFormat
    unit: str

    def prompt(self, classes: tuple[str, ...]) -> str:
        """Raises ``BadRequest`` for classes that can't be asked for."""
        check_class_names(classes)
        return (
            "Detect every instance of these classes in the image:"
            f" {json.dumps(list(classes), ensure_ascii=False)}. "
            f'Answer with a JSON list only, one object per instance: {{"{self.key}":'
            f' {self.order}, "label": "..."}}. '
            "The label is one of the classes, exactly as written above. Coordinates"
            f" are {self.unit}. Answer [] if there is none."
        )

    def detections(self, text: str, query: Query, frame: Frame) -> RawDetections:
        """The boxes in a model's whole text, without scores. Raises ``Refused``, and
        ``ProtocolError`` for all that is no such list.
        """
        if REFUSAL.match(text):
            raise Refused(
                f"the model refused: {short_text(text)}", may_have_billed=True
            )
        values = as_list(load_json({}, _without_fence(text)), "the model's text")
        return detections(
            [self._found(v, f"element {i}", frame) for i, v in enumerate(values)],
            self.box_format,
            query,
            frame,
            "none",
        )

    def _found(self, value: object, place: str, frame: Frame) -> Found:
        one = as_object(value, place)
        box = as_numbers(one.get(self.key), 4, f"{place}.{self.key}")
        for number, side in zip(
            box,
            frame.sent * 2 if self.box_format == "xyxy" else (1000,) * 4,
            strict=True,
        ):
            if not -OVERSHOOT_MAX * side <= number <= (1 + OVERSHOOT_MAX) * side:
                malformed(
                    f"{place}.{self.key} has {number:g}, far outside 0..{side}: are"
                    f" these coordinates {self.unit}?"
                )
        return Found(box, [as_text(one.get("label"), f"{place}.label")], 1.0)


XYXY_1000 = BoxText(
    "bbox_2d",
    "[x1, y1, x2, y2]",
    "xyxy_1000",
    "thousandths of the image's width and height, 0 to 1000",
)
YXYX_1000 = BoxText(
    "box_2d",
    "[ymin, xmin, ymax, xmax]",
    "yxyx_1000",
    "thousandths of the image's height and width, 0 to 1000",
)
XYXY_PIXELS = BoxText("bbox_2d", "[x1, y1, x2, y2]", "xyxy", "pixels of the image")


def _without_fence(text: str) -> str:
    text = text.strip()
    if (
        not text.startswith(FENCE)
        or not text.endswith(FENCE)
        or len(text) < 2 * len(FENCE)
    ):
        return text
    inner = text[len(FENCE) : -len(FENCE)]
    return inner[4:] if inner[:4].lower() == "json" else inner
