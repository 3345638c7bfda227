"""Prompts for services that accept any class names, and the boxes in the text that a
language model answers with.

A model is asked for a JSON list ``[{"bbox_2d": [...], "label": ...}]``.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

from coin_ray.class_names import normalize_class_name
from coin_ray.cloud.adapters.model_text import BOX_KEYS, read_box_objects
from coin_ray.cloud.adapters.parsing import (
    BoxFormat,
    ParsedBox,
    expect_numbers,
    expect_text,
    map_detections,
    raise_malformed,
    sanitize_text,
)
from coin_ray.cloud.adapters.token_scores import TokenChoice, score_label_tokens
from coin_ray.cloud.protocol import Frame, Query, RawDetections
from coin_ray.errors import BadRequest
from coin_ray.storage import JsonObject

LABEL_KEYS = ("label", "class", "category", "name", "class_name", "description")
"""Keys of a box's label, that of the prompt first."""


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

    def prompt(
        self,
        classes: tuple[str, ...],
        descriptions: Sequence[tuple[str, str]] = (),
    ) -> str:
        """Write the prompt for these classes; ``descriptions``: of some of them. Raises
        ``BadRequest`` for classes that cannot be asked for.
        """
        check_class_names(classes)
        meanings = "".join(
            f" {json.dumps(name, ensure_ascii=False)} means: {description.strip()}"
            for name, description in descriptions
            if name in classes
        )
        return self._list_prompt(classes) + meanings

    def _list_prompt(self, classes: tuple[str, ...]) -> str:
        return (
            "Detect every instance of these classes in the image:"
            f" {json.dumps(list(classes), ensure_ascii=False)}. "
            f'Answer with a JSON list only, one object per instance: {{"{self.key}":'
            f' {self.order}, "label": "..."}}. '
            "The label is one of the classes, exactly as written above. Coordinates"
            f" are {self.unit}. Answer [] if there is none."
        )

    def parse_detections(
        self,
        text: str,
        query: Query,
        frame: Frame,
        tokens: Sequence[TokenChoice] = (),
    ) -> RawDetections:
        """Parse the boxes in a model's text. Their scores are the probabilities of their
        labels' ``tokens``; without those they have none.

        Raises ``Refused`` if the model declines, ``UnusableBoxes`` for boxes in another
        unit, and ``ProtocolError`` for any text in which one whole list of boxes is not
        certain.
        """
        return self.map_objects(read_box_objects(text), query, frame, tokens)

    def map_objects(
        self,
        json_objects: Sequence[JsonObject],
        query: Query,
        frame: Frame,
        tokens: Sequence[TokenChoice] = (),
    ) -> RawDetections:
        """Map the elements of a model's list to the classes; as ``parse_detections``."""
        elements = [
            self._parse_boxes(json_object, f"element {number}")
            for number, json_object in enumerate(json_objects)
        ]
        written = [boxes[0].names[0] for boxes in elements]
        scores = score_label_tokens(tokens, written, query.classes) if tokens else None
        boxes: list[ParsedBox] = []
        for number, element in enumerate(elements):
            for box in element:
                if scores is not None:
                    score, other_scores = scores[number]
                    box = replace(box, score=score, other_scores=other_scores)
                boxes.append(box)
        return map_detections(
            boxes,
            self.box_format,
            query,
            frame,
            "none" if scores is None else "label",
            expects_names=True,
            whole_numbers=self.box_format not in ("xyxy_ratio", "xyxy_percent"),
        )

    def _parse_boxes(self, json_object: JsonObject, field: str) -> list[ParsedBox]:
        """Return the box of an element, or its boxes if it has a list of them. The box is
        expected under ``key``; models that were asked for it use others.
        """
        key = self.key if self.key in json_object else _only_box_key(json_object, field)
        node = json_object[key]
        is_list_of_boxes = isinstance(node, list) and len(node) > 0
        if is_list_of_boxes:
            is_list_of_boxes = all(isinstance(child, list) for child in node)
        boxes = node if is_list_of_boxes else [node]
        label = expect_text(_label(json_object), f"{field}.label")
        return [
            ParsedBox(expect_numbers(box, 4, f"{field}.{key}"), [label], 1.0)
            for box in boxes
        ]


def _only_box_key(json_object: JsonObject, field: str) -> str:
    keys = [key for key in BOX_KEYS if key in json_object]
    if len(keys) != 1:
        raise_malformed(f"{field} has {len(keys)} boxes, expected one")
    return keys[0]


def _label(json_object: JsonObject) -> object:
    """Return the label of an element under the first of ``LABEL_KEYS`` that it has."""
    for key in LABEL_KEYS:
        if key in json_object:
            return json_object[key]
    return None


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
XYXY_RATIO = BoxNotation(
    "bbox_2d",
    "[x1, y1, x2, y2]",
    "xyxy_ratio",
    "shares of the image's width and height, 0 to 1, with four decimals",
)
XYXY_PERCENT = BoxNotation(
    "bbox_2d",
    "[x1, y1, x2, y2]",
    "xyxy_percent",
    "percent of the image's width and height, 0 to 100, with one decimal",
)
XYXY_PIXELS = BoxNotation("bbox_2d", "[x1, y1, x2, y2]", "xyxy", "pixels of the image")
