"""The names that the answers in a journal give to boxes, whatever service they came
from.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from coin_ray.cloud.adapters.parsing import sanitize_text
from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.journal.keys import TASK

NAME_KEYS = ("label", "category", "class", "name", "Name")
BOX_KEYS = (
    "box",
    "bbox",
    "bbox_2d",
    "box_2d",
    "boundingBox",
    "boundingPoly",
    "BoundingBox",
)
CENTRE_KEYS = {"x", "y", "width", "height"}
CODE_FENCE = re.compile(r"^\s*```(?:json)?\s*|\s*```\s*$")


@dataclass(frozen=True, slots=True)
class ObservedName:
    """The name that an answer gives to a box. ``related``: aliases, then parents."""

    name: str
    vendor_id: str = ""
    related: tuple[str, ...] = ()

    @property
    def candidates(self) -> tuple[str, ...]:
        names = (self.name, *self.related)
        return (self.vendor_id, *names) if self.vendor_id else names

    @property
    def key(self) -> str:
        """The key of this name in a label map."""
        return self.vendor_id or self.name

    def __str__(self) -> str:
        name = sanitize_text(self.name)
        return f"{name} ({sanitize_text(self.vendor_id)})" if self.vendor_id else name


@dataclass(frozen=True, slots=True)
class ObservedNames:
    """Names in a journal's raw answers, by how many boxes have them."""

    names: Counter[ObservedName]
    answers: int
    unreadable: int
    """Answers that are no JSON."""


def count_observed_names(journal: Journal) -> ObservedNames:
    """Count the names that a journal's raw answers give to boxes."""
    names: Counter[ObservedName] = Counter()
    answers = unreadable = 0
    for key in journal.keys():  # noqa: SIM118
        record = None if key.endswith(TASK) else journal.get(key)
        if record is None:
            continue
        answers += 1
        try:
            names.update(_iterate_named_boxes(json.loads(record.body)))
        except (ValueError, RecursionError):
            unreadable += 1
    return ObservedNames(names, answers, unreadable)


def _iterate_named_boxes(node: Any) -> Iterator[ObservedName]:
    """Yield the name of each box. A box is any JSON object that has a name and a box;
    language models put theirs as text into a string.
    """
    if isinstance(node, list):
        for child in node:
            yield from _iterate_named_boxes(child)
    elif isinstance(node, str):
        if "box" in node:
            yield from _iterate_named_boxes(_parse_json_text(node))
    elif isinstance(node, dict):
        box_count = _count_boxes(node)
        name = _find_name(node)
        if box_count and name:
            yield from [name] * box_count
        else:
            for child in node.values():
                yield from _iterate_named_boxes(child)


def _parse_json_text(text: str) -> Any:
    try:
        return json.loads(CODE_FENCE.sub("", text))
    except ValueError:
        return None


def _count_boxes(node: dict[str, Any]) -> int:
    if "Instances" in node:
        instances = node["Instances"]
        return len(instances) if isinstance(instances, list) else 0
    has_box = any(key in node for key in BOX_KEYS) or "Geometry" in node
    return int(has_box or node.keys() >= CENTRE_KEYS)


def _find_name(node: dict[str, Any]) -> ObservedName | None:
    tags = node.get("tags")
    if isinstance(tags, list) and tags and isinstance(tags[0], dict):
        return _find_name(tags[0])
    names = [node[key] for key in NAME_KEYS if isinstance(node.get(key), str)]
    vendor_id = node["mid"] if isinstance(node.get("mid"), str) else ""
    if not names and not vendor_id:
        return None
    related = []
    for key in ("Aliases", "Parents"):
        for relative in node.get(key) or []:
            name = relative.get("Name") if isinstance(relative, dict) else None
            if isinstance(name, str):
                related.append(name)
    return ObservedName(names[0] if names else vendor_id, vendor_id, tuple(related))
