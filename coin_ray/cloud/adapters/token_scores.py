"""Scores of the labels that a language model wrote, from the probabilities of their
tokens.

A model writes one label after another. At each token of a label the server names the
probabilities of a few alternatives; those that begin another class's name are that
class's share. What the alternatives lack stays without a class.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from coin_ray.class_names import normalize_class_name

LABEL_VALUE = re.compile(
    rb'"(?:label|class|category|name|class_name|description)"\s*:\s*"((?:[^"\\]|\\.)*)"'
)


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """A token of the text, its natural log probability, and the alternatives that the
    server named, the token itself usually among them.
    """

    token: bytes
    logprob: float
    alternatives: tuple[tuple[bytes, float], ...] = ()


def score_label_tokens(
    tokens: Sequence[TokenChoice], labels: Sequence[str], names: Sequence[str]
) -> list[tuple[float, dict[str, float]]] | None:
    """Return the score in 0..1 of each label that the model wrote, and those of other
    ``names`` that it might have written instead.

    ``labels``: as they were read, in their order; None if the tokens do not show them.
    """
    text = b"".join(choice.token for choice in tokens)
    matches = list(LABEL_VALUE.finditer(text))[-len(labels) :] if labels else []
    if [_unescape(match.group(1)) for match in matches] != list(labels):
        return None
    starts = [0]
    for choice in tokens:
        starts.append(starts[-1] + len(choice.token))
    by_normalized_name = {normalize_class_name(name): name for name in names}
    scores = []
    for match, label in zip(matches, labels, strict=True):
        begin, end = match.span(1)
        first = bisect_right(starts, begin) - 1
        last = bisect_left(starts, end)
        own_score, others = _walk_label(
            tokens[first:last],
            [start - begin for start in starts[first:last]],
            match.group(1),
            by_normalized_name,
        )
        same_name = by_normalized_name.get(normalize_class_name(label), label)
        own_score += others.pop(same_name, 0.0)
        scores.append((min(1.0, own_score), others))
    return scores


def _walk_label(
    tokens: Sequence[TokenChoice],
    offsets: Sequence[int],
    label: bytes,
    names: Mapping[str, str],
) -> tuple[float, dict[str, float]]:
    """Return the probability of the label's tokens, and those of other names.
    ``offsets``: where each token begins in the label, negative before it.
    """
    probability = 1.0
    others: dict[str, float] = {}
    for choice, offset in zip(tokens, offsets, strict=True):
        lead = choice.token[: max(0, -offset)]
        prefix = label[: max(0, offset)]
        for alternative, logprob in choice.alternatives:
            if alternative == choice.token or not alternative.startswith(lead):
                continue
            matching = _matching_names(prefix + alternative[len(lead) :], names)
            for name in matching:
                share = probability * math.exp(min(0.0, logprob)) / len(matching)
                others[name] = min(1.0, others.get(name, 0.0) + share)
        probability *= math.exp(min(0.0, choice.logprob))
    return probability, others


def _matching_names(candidate: bytes, names: Mapping[str, str]) -> list[str]:
    """Return the names that begin so; those equal to it if it has a closing quote."""
    text, quote, _ = candidate.partition(b'"')
    beginning = normalize_class_name(text.decode(errors="ignore"))
    if not beginning:
        return []
    if quote:
        return [names[beginning]] if beginning in names else []
    return [names[name] for name in names if name.startswith(beginning)]


def _unescape(written: bytes) -> str:
    try:
        return str(json.loads(b'"' + written + b'"'))
    except ValueError:
        return written.decode(errors="replace")
