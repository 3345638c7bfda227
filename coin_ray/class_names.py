"""When two names mean one class: case, hyphens, underscores and an English plural do
not count.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator


def is_same_class_name(one: str, other: str) -> bool:
    """Whether the names differ only in that: "Traffic-Lights" and "traffic light"."""
    return normalize_class_name(one) in class_name_variants(
        other
    ) or normalize_class_name(other) in class_name_variants(one)


def normalize_class_name(name: str) -> str:
    """Case, spaces, hyphens and underscores don't tell names apart."""
    return " ".join(
        unicodedata.normalize("NFKC", name)
        .casefold()
        .replace("_", " ")
        .replace("-", " ")
        .split()
    )


def class_name_variants(name: str) -> Iterator[str]:
    """The folded name, then the name with its last word in the other number: "traffic
    light", "traffic lights".
    """
    folded = normalize_class_name(name)
    yield folded
    rest, space, word = folded.rpartition(" ")
    if len(word) >= 3 and word.isalpha():
        yield from (rest + space + other for other in _other_number(word))


def _other_number(word: str) -> Iterator[str]:
    """Singulars or plurals of an English word by its ending; "glasses" are no glass."""
    if word.endswith(("sses", "ss", "is")):
        return
    if word.endswith("us"):
        yield word + "es"
        return
    if not word.endswith("s"):
        yield word + "s"
        if word.endswith(("ch", "sh", "x", "z")):
            yield word + "es"
        if word.endswith("y"):
            yield word[:-1] + "ies"
        return
    yield word[:-1]
    if word.endswith("ies"):
        yield word[:-3] + "y"
    if word.endswith(("ches", "shes", "xes", "zes", "uses")):
        yield word[:-2]
