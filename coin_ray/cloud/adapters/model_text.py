"""Reading of the list of boxes in the text that a language model answers with.

Models wrap a list in code fences, thoughts, special tokens, words or objects, and write
it as JSON lines. Whatever is whole is read. A list that was cut off is never repaired:
the boxes it lacks would count as "no objects". An empty list is only believed where it
stands alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coin_ray.cloud.adapters.parsing import (
    raise_malformed,
    reject_constant,
    reject_duplicate_keys,
    sanitize_text,
)
from coin_ray.errors import Refused
from coin_ray.storage import JsonObject

BOX_KEYS = ("bbox_2d", "box_2d", "bbox", "box")
LIST_KEYS = (
    "annotations",
    "bboxes",
    "boxes",
    "data",
    "detections",
    "instances",
    "items",
    "objects",
    "output",
    "predictions",
    "results",
)
"""Keys of an object under which an empty list means that there are no objects."""
NESTING_MAX = 4
"""Objects and lists around the list of boxes."""
BRACKETS_MAX = 50
"""Brackets in a model's words that begin no JSON value."""
FENCE = "```"
THOUGHTS = r"(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning|reflection|analysis)"
THOUGHTS_END = re.compile(
    rf"</{THOUGHTS}>|\[/THINK\]|\u25c1/think\u25b7"
    r"|<\|channel\|>final[^<]*<\|message\|>",
    re.IGNORECASE,
)
THOUGHTS_START = re.compile(
    rf"<{THOUGHTS}>|\[THINK\]|\u25c1think\u25b7|<\|channel\|>(?!final)", re.IGNORECASE
)
MARK_PAIRS = (("<|begin_of_box|>", "<|end_of_box|>"), ("<answer>", "</answer>"))
"""Marks around a list; a missing second one means that the text was cut off."""
SPECIAL_TOKEN = re.compile(r"<\|[^<>|]{1,40}\|>|</?answer>", re.IGNORECASE)
REFUSAL = re.compile(
    r"\s*(i\Wm sorry|i am sorry|sorry\b|i can(not|\Wt)\b|i( am|\Wm) (unable|not able))",
    re.IGNORECASE,
)
UNCERTAINTY = re.compile(
    r"\b(sorry|unable|cannot|can\Wt|could(n\Wt| not)|not able|impossible|unclear)\b",
    re.IGNORECASE,
)
"""Words beside an empty list that make it no statement about the image."""
WORD = re.compile(r"[^\W\d_]{3,}")
OPENING_BRACKET = re.compile(r"[\[{]")
JSON_BEGINNING = re.compile(r'\[\s*(?:[\[{"]|$)|\{\s*(?:"|$)')
SEPARATOR = re.compile(r"[\s,;]*")

DECODER = json.JSONDecoder(
    object_pairs_hook=reject_duplicate_keys, parse_constant=reject_constant
)


@dataclass(frozen=True, slots=True)
class JsonValue:
    """A JSON object or list in a text, and where it stands."""

    node: Any
    start: int
    end: int


def read_box_objects(text: str) -> list[JsonObject]:
    """Return the objects of a model's list, each with one of ``BOX_KEYS``; none if the
    model says that there are none.

    Raises ``Refused`` if the model declines, and ``ProtocolError`` for any text in which
    one whole list is not certain.
    """
    answer = _remove_marks(_remove_thoughts(text))
    if REFUSAL.match(answer):
        raise Refused(
            f"the model refused: {sanitize_text(answer)}", may_have_billed=True
        )
    json_values = [
        json_value
        for json_value in _find_json_values(answer)
        if not _is_list_of_scalars(json_value.node)
    ]
    if not json_values:
        raise_malformed(
            f"the model's text of length {len(answer)} has no list of boxes"
        )
    _check_fences(answer, json_values[0].start)
    lists = [unwrap_boxes(json_value.node) for json_value in json_values]
    if any(not boxes for boxes in lists):
        _check_only_empty_list(answer, json_values)
        return []
    _check_ending(answer, json_values[-1])
    if all(boxes == lists[0] for boxes in lists):
        return lists[0]
    if not _are_adjacent(answer, json_values):
        raise_malformed(
            f"the model's text has {len(lists)} lists with words between them, expected"
            " one"
        )
    return [box for boxes in lists for box in boxes]


def _remove_thoughts(text: str) -> str:
    """Return what follows the model's thoughts. Raises ``ProtocolError`` if they do not
    end.
    """
    answer_start = 0
    for thoughts_end in THOUGHTS_END.finditer(text):
        answer_start = thoughts_end.end()
    answer = text[answer_start:]
    if THOUGHTS_START.search(answer):
        raise_malformed("the model's text ends in its thoughts: cut off")
    return answer


def _remove_marks(text: str) -> str:
    """Remove special tokens. Raises ``ProtocolError`` if a list's mark has no end."""
    for begin, end in MARK_PAIRS:
        if begin in text and end not in text.rpartition(begin)[2]:
            raise_malformed(f"the model's text has {begin} without {end}: cut off")
    return SPECIAL_TOKEN.sub("", text)


def _find_json_values(text: str) -> list[JsonValue]:
    """Return the outermost JSON objects and lists in a text. Raises ``ProtocolError``
    for one that is broken or cut off.
    """
    json_values: list[JsonValue] = []
    position = brackets = 0
    while (bracket := OPENING_BRACKET.search(text, position)) is not None:
        start = bracket.start()
        try:
            node, position = DECODER.raw_decode(text, start)
        except RecursionError:
            raise_malformed("nested too deeply")
        except ValueError:
            brackets += 1
            if JSON_BEGINNING.match(text, start) or brackets > BRACKETS_MAX:
                raise_malformed(
                    f"broken or truncated JSON in the model's text of length {len(text)}"
                )
            position = start + 1
        else:
            json_values.append(JsonValue(node, start, position))
    return json_values


def _is_list_of_scalars(node: Any) -> bool:
    """Return whether this is a list like [100, 250] in a model's words."""
    is_list = isinstance(node, list) and len(node) > 0
    return is_list and not any(isinstance(child, (list, dict)) for child in node)


def _check_fences(text: str, list_start: int) -> None:
    """Raise ``ProtocolError`` for a code fence that is opened before the list and never
    closed. One that is only closed does not mean that something is missing.
    """
    has_open_fence = text.count(FENCE, 0, list_start) % 2 == 1
    if has_open_fence and FENCE not in text[list_start:]:
        raise_malformed("the model's text has a code fence without an end: cut off")


def unwrap_boxes(node: Any, depth: int = 0) -> list[JsonObject]:
    """Return the objects with a box inside a JSON value: a list of them, one of them, or
    either inside other lists and objects. Raises ``ProtocolError`` for anything else.
    """
    if depth > NESTING_MAX:
        raise_malformed("the model's list is nested too deeply")
    if isinstance(node, list):
        return _unwrap_list(node, depth)
    if not isinstance(node, dict):
        raise_malformed(f"the model's list holds {type(node).__name__}, expected boxes")
    if any(key in node for key in BOX_KEYS):
        return [node]
    return _unwrap_object(node, depth)


def _unwrap_list(nodes: list[Any], depth: int) -> list[JsonObject]:
    if not nodes and depth == 0:
        return []
    if len(nodes) == 1 and nodes[0]:
        return unwrap_boxes(nodes[0], depth + 1)
    for number, node in enumerate(nodes):
        if not isinstance(node, dict) or not any(key in node for key in BOX_KEYS):
            raise_malformed(
                f"element {number} of the model's list has no box: expected one of"
                f" {', '.join(BOX_KEYS)}"
            )
    if not nodes:
        raise_malformed("the model's list holds an empty list")
    return nodes


def _unwrap_object(node: JsonObject, depth: int) -> list[JsonObject]:
    if node.get("error"):
        raise_malformed(f"the model wrote an error: {sanitize_text(node['error'])}")
    members: JsonObject = {}
    for container in (dict, list):
        kind_members = {k: v for k, v in node.items() if isinstance(v, container)}
        members = kind_members or members
    if len(members) != 1:
        raise_malformed(
            f"the model's object has {len(members)} lists, expected a box or one list"
        )
    ((key, child),) = members.items()
    if child:
        return unwrap_boxes(child, depth + 1)
    if key.lower() not in LIST_KEYS or not isinstance(child, list):
        raise_malformed(f"the model's object has an empty {sanitize_text(key)[:40]!r}")
    return []


def _check_only_empty_list(text: str, json_values: Sequence[JsonValue]) -> None:
    """Raise ``ProtocolError`` unless the text has one list, which is empty, alone or in a
    paragraph or fence of its own, and no words that take it back.
    """
    if len(json_values) != 1:
        raise_malformed(f"the model's text has {len(json_values)} lists, one is empty")
    before, after = text[: json_values[0].start], text[json_values[0].end :]
    words = re.sub(r"```(?:json)?", "", f"{before}{after}", flags=re.IGNORECASE).strip()
    if not words:
        return
    is_apart = _ends_paragraph(before) and _begins_paragraph(after)
    if not is_apart or not WORD.search(words) or UNCERTAINTY.search(words):
        raise_malformed("the model's empty list has words around it")


def _ends_paragraph(text: str) -> bool:
    """Return whether a paragraph or a code fence may begin after this text."""
    words = text.rstrip()
    gap = text[len(words) :]
    has_fence = words[-len("```json") :].lower().endswith((FENCE, "```json"))
    return not words or has_fence or gap.count("\n") >= 2


def _begins_paragraph(text: str) -> bool:
    """Return whether a paragraph or a code fence may end before this text."""
    words = text.lstrip()
    gap = text[: len(text) - len(words)]
    return not words or words.startswith(FENCE) or gap.count("\n") >= 2


def _check_ending(text: str, json_value: JsonValue) -> None:
    """Raise ``ProtocolError`` if a list goes on, or ends, after the last value."""
    if text[json_value.end :].lstrip().startswith((",", ";", "]", "}")):
        raise_malformed("the model's list has no beginning, or no end: cut off")


def _are_adjacent(text: str, json_values: Sequence[JsonValue]) -> bool:
    """Return whether there is nothing but separators between the values, as in JSON
    lines.
    """
    ends = [json_value.end for json_value in json_values]
    starts = [json_value.start for json_value in json_values]
    gaps = [text[end:start] for end, start in zip(ends, starts[1:], strict=False)]
    return all(SEPARATOR.fullmatch(gap) for gap in gaps)
