"""Read the entries of a large JSON file one at a time: neither its text nor its objects
are in memory as a whole.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from json.scanner import make_scanner
from typing import IO, Any

from coin_ray import storage
from coin_ray.errors import InputError

CHUNK_BYTES = 1 << 20
ENTRY_CHARACTERS = 1 << 14
"""More is read before less than this is left, which is longer than nearly any entry."""
NUMBER_JOINT = len("e+")
skip_space = re.compile(r"[ \t\n\r]*").match


def iterate_json(
    uri: str, description: str, list_keys: frozenset[str]
) -> Iterator[tuple[str, int, Any]]:
    """Yield (key, position, entry) for each entry of the lists ``list_keys`` of a JSON
    object, then (key, -1, None) at the list's end; its other values are checked and
    passed over.

    Raises InputError naming file and line for text that is not a JSON object or has a
    key twice.
    """
    with storage.open_reader(uri) as stream:
        window = _Window(stream)
        try:
            window.read_more()
            yield from _iterate_object(window, uri, description, list_keys)
        except UnicodeDecodeError as error:
            raise InputError(
                f"{uri} is not {description}: not text in UTF-8: {error}"
            ) from None
        except json.JSONDecodeError as error:
            line, column = window.locate(error)
            raise InputError(
                f"{uri} is not {description}: {error.msg} in line {line}, column"
                f" {column}"
            ) from None
        except RecursionError:
            raise InputError(f"{uri} is not {description}: nested too deeply") from None


class _Window:
    """The part of a JSON text that is read: ``text`` from position ``at`` on."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream = stream
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.scan_once = make_scanner(json.JSONDecoder())  # type: ignore[arg-type]
        self.text, self.at, self.is_whole = "", 0, False
        self.lines = self.columns = 0

    def read_more(self) -> None:
        """Drop the text before ``at``, and read a chunk, or as much as is left."""
        dropped, self.text = self.text[: self.at], self.text[self.at :]
        newlines = dropped.count("\n")
        self.lines += newlines
        if newlines:
            self.columns = 0
        self.columns += len(dropped) - (dropped.rfind("\n") + 1)
        raw = self.stream.read(max(CHUNK_BYTES, len(self.text)))
        self.is_whole = not raw
        self.text += self.decode(raw, self.is_whole)
        self.at = 0

    def locate(self, error: json.JSONDecodeError) -> tuple[int, int]:
        """Return line and column of an error in ``text``, both from 1."""
        columns = self.columns if error.lineno == 1 else 0
        return self.lines + error.lineno, columns + error.colno

    def peek(self) -> str:
        """Return the next character that is no blank; empty at the end of the file."""
        while True:
            match = skip_space(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or self.is_whole:
                return self.text[self.at : self.at + 1]
            self.read_more()

    def expect(self, mark: str) -> None:
        """Pass over ``mark``. Raises JSONDecodeError for anything else."""
        if self.peek() != mark:
            raise json.JSONDecodeError(f"expected {mark!r}", self.text, self.at)
        self.at += 1

    def read_value(self) -> Any:
        """Read a value of any kind."""
        self.peek()
        while True:
            try:
                value, end = self.scan_once(self.text, self.at)
            except StopIteration as error:
                if self.is_whole:
                    message = "expected a value"
                    raise json.JSONDecodeError(
                        message, self.text, error.value
                    ) from None
            except json.JSONDecodeError:
                if self.is_whole:
                    raise
            else:
                # a number near the end of the text may go on: 1, 1.5, 1e+5
                if end + NUMBER_JOINT < len(self.text) or self.is_whole:
                    self.at = end
                    return value
            self.read_more()

    def pass_comma(self, end: str) -> None:
        """Pass over the comma before another entry; stop before the mark ``end``."""
        if self.peek() == end:
            return
        self.expect(",")
        if self.peek() == end:
            raise json.JSONDecodeError("expected another entry", self.text, self.at)


def _iterate_object(
    window: _Window, uri: str, description: str, list_keys: frozenset[str]
) -> Iterator[tuple[str, int, Any]]:
    if window.peek() != "{":
        raise InputError(f"{uri} is not {description}: expected an object at its start")
    window.at += 1
    keys: set[str] = set()
    while window.peek() != "}":
        key = window.read_value()
        if not isinstance(key, str):
            raise json.JSONDecodeError("expected a key", window.text, window.at)
        if key in keys:
            raise InputError(f"{uri} is not {description}: it has {key!r} twice")
        keys.add(key)
        window.expect(":")
        if key in list_keys and window.peek() == "[":
            yield from _iterate_list(window, key)
            yield key, -1, None
        else:
            value = window.read_value()
            if key in list_keys:
                kind = type(value).__name__
                raise InputError(
                    f"{uri} is not {description}: {key}: expected a list, got {kind}"
                )
        window.pass_comma("}")
    window.at += 1
    if window.peek():
        message = "expected the end of the file"
        raise json.JSONDecodeError(message, window.text, window.at)


def _iterate_list(window: _Window, key: str) -> Iterator[tuple[str, int, Any]]:
    """Yield the entries of the list that begins at the window's position."""
    window.at += 1
    position = 0
    while window.peek() != "]":
        for entry in _iterate_objects(window):
            yield key, position, entry
            position += 1
        yield key, position, window.read_value()
        position += 1
        window.pass_comma("]")
    window.at += 1


def _iterate_objects(window: _Window) -> Iterator[Any]:
    """Yield the objects at the window's position, up to one that is not followed by
    another object in the usual way, or is near the end of the text: the quick way.
    """
    text, at, scan = window.text, window.at, window.scan_once
    if len(text) - at < ENTRY_CHARACTERS and not window.is_whole:
        window.read_more()
        text, at = window.text, 0
    last = len(text) - ENTRY_CHARACTERS
    while at < last:
        try:
            entry, end = scan(text, at)
        except (json.JSONDecodeError, StopIteration):
            return
        if text[end : end + 2] == ",{":
            at = end + 1
        elif text[end : end + 3] in (", {", ",\n{"):
            at = end + 2
        else:
            return
        window.at = at
        yield entry
