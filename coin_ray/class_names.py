"""Compare class names: case, hyphens, underscores and an English plural do not tell
names apart.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator


def is_same_class_name(name: str, other: str) -> bool:
    """Tell whether two names mean one class: "Traffic-Lights" and "traffic light"."""
    if normalize_class_name(name) in class_name_variants(other):
        return True
    return normalize_class_name(other) in class_name_variants(name)


def normalize_class_name(name: str) -> str:
    """Return the name in lower case, with single spaces instead of hyphens and
    underscores.
    """
    folded = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(folded.replace("_", " ").replace("-", " ").split())


def class_name_variants(name: str) -> Iterator[str]:
    """Yield the normalized name, then the name with its last word in the other number:
    "traffic light", "traffic lights".
    """
    normalized = normalize_class_name(name)
    yield normalized
    first_words, space, word = normalized.rpartition(" ")
    if len(word) >= 3 and word.isalpha():
        for variant in _other_number(word):
            yield first_words + space + variant


def _other_number(word: str) -> Iterator[str]:
    """Yield singulars or plurals of an English word by its ending; "glasses" are no
    glass.
    """
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
