"""Write names from settings, as those of classes, so that MLflow takes them.

A character that MLflow refuses becomes ``_U`` and its hexadecimal code and ``_``:
"50% sale" is "50_U25_ sale". Names that MLflow takes stay as they are, different names
stay different, and ``parse_mlflow_name`` gives the name back.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
from typing import Literal

MlflowKind = Literal["figure", "model", "alias"]
LEGAL = {"figure": r"[\w.\- /:]", "model": r"[^/:\x00-\x1f\x7f]", "alias": r"[\w\-]"}
"""Characters that MLflow takes in names of metrics and parameters, of registered models
and of their aliases."""
LONGEST = 250
"""Characters of a name that MLflow takes."""
DIGEST_LENGTH = 16
EMPTY = "_U110000_"
"""Stands for a name without characters: the code is of no character."""
ESCAPE = re.compile(r"_U([0-9A-F]+)_")
LOOKS_ESCAPED = re.compile(r"_(?=U[0-9A-F])")


def mlflow_name(name: str, kind: MlflowKind = "figure") -> str:
    """Return the name as MLflow takes it.

    A name that is longer than ``LONGEST`` is cut and ends in its digest: it stays
    different from others, and can't be given back.
    """
    escaped = LOOKS_ESCAPED.sub(_escape("_"), name)
    legal = re.compile(LEGAL[kind])
    escaped = "".join(c if legal.fullmatch(c) else _escape(c) for c in escaped)
    if not _is_path(escaped):
        # MLflow takes no name that is another one as a path, as a//b or ../a
        escaped = escaped.replace("/", _escape("/"))
    if escaped.startswith("..") or escaped == ".":
        escaped = _escape(".") + escaped[1:]
    if not escaped.strip():
        escaped = escaped.replace(" ", _escape(" ")) or EMPTY
    if len(escaped) > LONGEST:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
        escaped = f"{escaped[: LONGEST - DIGEST_LENGTH - 1]}_{digest[:DIGEST_LENGTH]}"
        if not _is_path(escaped):
            escaped = digest
    return escaped


def parse_mlflow_name(text: str) -> str:
    """Return the name that ``mlflow_name`` wrote as ``text``."""
    return "" if text == EMPTY else ESCAPE.sub(lambda m: chr(int(m[1], 16)), text)


def _escape(character: str) -> str:
    return f"_U{ord(character):X}_"


def _is_path(name: str) -> bool:
    return posixpath.normpath(name) == name and not name.startswith(("..", "/"))
