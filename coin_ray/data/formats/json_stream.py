"""Read the entries of a large JSON file one at a time: its text is in memory, its
objects are not.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Generator, Iterator
from json.scanner import make_scanner
from typing import Any

from coin_ray import storage
from coin_ray.errors import InputError

SPACE = " \t\n\r"
skip_space = re.compile(f"[{SPACE}]*").match


def iterate_json(
    uri: str, description: str, list_keys: frozenset[str]
) -> Iterator[tuple[str, int, Any]]:
    """Yield (key, position, entry) for each entry of the lists ``list_keys`` of a JSON
    object, then (key, -1, None) at the list's end; its other values are checked and
    passed over.

    Raises InputError naming file and line for text that is not a JSON object or has a
    key twice.
    """
    try:
        text = storage.read_bytes(uri).removeprefix(codecs.BOM_UTF8).decode()
    except UnicodeDecodeError as error:
        raise InputError(
            f"{uri} is not {description}: not text in UTF-8: {error}"
        ) from None
    try:
        yield from _iterate_object(text, uri, description, list_keys)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{uri} is not {description}: {error.msg} in line {error.lineno}, column"
            f" {error.colno}"
        ) from None
    except RecursionError:
        raise InputError(f"{uri} is not {description}: nested too deeply") from None


def _iterate_object(
    text: str, uri: str, description: str, list_keys: frozenset[str]
) -> Iterator[tuple[str, int, Any]]:
    at = _next_position(text, 0)
    if text[at : at + 1] != "{":
        raise InputError(f"{uri} is not {description}: expected an object at its start")
    keys: set[str] = set()
    at = _next_position(text, at + 1)
    while text[at : at + 1] != "}":
        key, at = _scan(text, at)
        if not isinstance(key, str):
            raise json.JSONDecodeError("expected a key", text, at)
        if key in keys:
            raise InputError(f"{uri} is not {description}: it has {key!r} twice")
        keys.add(key)
        at = _next_position(text, at)
        _expect(text, at, ":")
        at = _next_position(text, at + 1)
        if key in list_keys and text[at : at + 1] == "[":
            at = yield from _iterate_list(text, at, key)
            yield key, -1, None
        else:
            value, at = _scan(text, at)
            if key in list_keys:
                kind = type(value).__name__
                raise InputError(
                    f"{uri} is not {description}: {key}: expected a list, got {kind}"
                )
        at = _after_entry(text, at, "}")
    end = _next_position(text, at + 1)
    if end < len(text):
        raise json.JSONDecodeError("expected the end of the file", text, end)


def _iterate_list(
    text: str, at: int, key: str
) -> Generator[tuple[str, int, Any], None, int]:
    """Yield the entries of the list that starts at ``at``; return where it ends."""
    scan = make_scanner(json.JSONDecoder())  # type: ignore[arg-type]
    at = _next_position(text, at + 1)
    position = 0
    try:
        while text[at] != "]":
            entry, at = scan(text, at)
            yield key, position, entry
            position += 1
            if text[at] == "," and text[at + 1] == "{":  # the usual case, by speed
                at += 1
            elif text[at] == "," and text[at + 1] == " " and text[at + 2] == "{":
                at += 2
            else:
                at = _after_entry(text, at, "]")
    except (StopIteration, IndexError):
        raise json.JSONDecodeError("expected a value", text, at) from None
    return at + 1


def _scan(text: str, at: int) -> tuple[Any, int]:
    return json.JSONDecoder().raw_decode(text, at)


def _next_position(text: str, at: int) -> int:
    match = skip_space(text, at)
    return match.end() if match else at


def _expect(text: str, at: int, mark: str) -> None:
    if text[at : at + 1] != mark:
        raise json.JSONDecodeError(f"expected {mark!r}", text, at)


def _after_entry(text: str, at: int, end: str) -> int:
    """Return the position of the next entry, or of the mark ``end``."""
    at = _next_position(text, at)
    if text[at : at + 1] == end:
        return at
    _expect(text, at, ",")
    at = _next_position(text, at + 1)
    if text[at : at + 1] == end:
        raise json.JSONDecodeError("expected another entry", text, at)
    return at
