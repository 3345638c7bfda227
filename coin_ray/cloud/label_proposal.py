"""A label map to correct by hand, proposed from the names in paid answers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import yaml
from numpy.typing import NDArray

from coin_ray.class_names import class_name_variants, normalize_class_name
from coin_ray.cloud.label_map import LabelMap
from coin_ray.cloud.observed_names import ObservedName, ObservedNames

MIN_SIMILARITY = 0.8
MARGIN = 0.05
"""A guess by text similarity names a class that is this much nearer than the next one.
"""
GUESS_MARK = "#? "
Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Names [N] -> embeddings [N, D] of unit length."""
Guess = tuple[str, str]
"""A class, and the similarities that speak for it."""


def propose_label_map(
    observed: ObservedNames,
    classes: Sequence[str],
    service: str,
    embed: Embed | None = None,
    margin: float = MARGIN,
) -> str:
    """Return the YAML text of a label map. Names that match a class are mapped; guesses
    and all others are comments, for a person to decide.
    """
    map_lines: dict[str, str] = {}
    columns: dict[str, tuple[int, float]] = {}
    for observed_name, count in observed.names.most_common():
        if LabelMap(columns).find(observed_name.candidates) is not None:
            continue
        match = _match_class(observed_name, classes)
        if match is None:
            continue
        key, column, reason = match
        map_lines[key] = (
            f"  {_quote(key)}: {_quote(classes[column])}  # {reason}, {count:,} boxes"
        )
        columns[normalize_class_name(key)] = (column, 1.0)
    unmatched = _unmatched_names(observed, LabelMap(columns))
    names = [observed_name.name for observed_name, _ in unmatched]
    guesses = _guess_classes(names, classes, embed, margin)
    guess_lines, ignore_lines = [], []
    for (observed_name, count), guess in zip(unmatched, guesses, strict=True):
        key = _quote(observed_name.key)
        boxes = f"{count:,} boxes"
        if guess is None:
            ignore_lines.append(f"{GUESS_MARK}  - {key}  # {observed_name}: {boxes}")
            continue
        class_name, reason = guess
        guess_lines.append(
            f"{GUESS_MARK}  {key}: {_quote(class_name)}  # {observed_name}: {reason},"
            f" {boxes}"
        )
    mark = repr(GUESS_MARK.strip())
    lines = [
        (
            f"# Proposed from {observed.answers:,} answers. What follows {mark} was not"
            " matched by name and does not count as it stands:"
        ),
        (
            f"# remove {mark} where a guess is right, and under 'ignore' for names that"
            " mean none of the classes."
        ),
        f"service: {_quote(service)}",
        f"classes: [{', '.join(map(_quote, classes))}]",
        "map:",
        *map_lines.values(),
        *guess_lines,
        "ignore:",
        *ignore_lines,
    ]
    return "\n".join(lines) + "\n"


def _unmatched_names(
    observed: ObservedNames, label_map: LabelMap
) -> list[tuple[ObservedName, int]]:
    """Return names that the map does not know, and their boxes, most frequent first; of
    those with the same key only the most frequent.
    """
    unmatched: dict[str, tuple[ObservedName, int]] = {}
    for observed_name, count in observed.names.most_common():
        if label_map.find(observed_name.candidates) is None:
            key = normalize_class_name(observed_name.key)
            unmatched.setdefault(key, (observed_name, count))
    return list(unmatched.values())


def _match_class(
    observed_name: ObservedName, classes: Sequence[str]
) -> tuple[str, int, str] | None:
    """Return the key to map, the class index and how it matches: by the name itself,
    else by an alias or a parent that is a class by name.
    """
    columns = {normalize_class_name(name): k for k, name in enumerate(classes)}
    for name in (observed_name.name, *observed_name.related):
        for number, variant in enumerate(class_name_variants(name)):
            if variant not in columns:
                continue
            column = columns[variant]
            kind = "folded" if number == 0 else "plural"
            if name == classes[column]:
                kind = "exact"
            if name == observed_name.name:
                return observed_name.key, column, f"{observed_name}: {kind}"
            return name, column, f"{kind}, alias or parent of {observed_name}"
    return None


def _guess_classes(
    names: Sequence[str], classes: Sequence[str], embed: Embed | None, margin: float
) -> list[Guess | None]:
    """Return for each name the class whose text is nearest by ``margin``, and the
    similarities; None where none is.
    """
    if embed is None or not names:
        return [None] * len(names)
    similarities = embed(names) @ embed(classes).T
    return [_guess_class(row, classes, margin) for row in similarities]


def _guess_class(
    similarity: NDArray[np.float32], classes: Sequence[str], margin: float
) -> Guess | None:
    order = np.argsort(-similarity, kind="stable")
    best = float(similarity[order[0]])
    runner_up, runner_up_note = -1.0, ""
    if len(order) > 1:
        runner_up = float(similarity[order[1]])
        runner_up_note = f", next {classes[order[1]]} {runner_up:.2f}"
    if best < MIN_SIMILARITY or best - runner_up < margin:
        return None
    return classes[order[0]], f"similarity {best:.2f}{runner_up_note}"


def _quote(name: str) -> str:
    """Return a YAML scalar that is read as this text."""
    is_plain = re.fullmatch(r"[A-Za-z][\w-]*( [\w-]+)*", name) and name.isascii()
    if is_plain and yaml.safe_load(name) == name:
        return name
    quoted = yaml.safe_dump(name, default_style='"', allow_unicode=True, width=10**9)
    return str(quoted).strip()
