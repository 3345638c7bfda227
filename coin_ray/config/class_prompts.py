"""Classes as people mean them: how a class is asked for, beside its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from coin_ray.class_names import normalize_class_name
from coin_ray.config.fields import check_fraction, require
from coin_ray.errors import ConfigError

KEYS = ("ask", "description", "not", "score_min")
"""Keys of one class in a file of classes."""


@dataclass(frozen=True)
class ClassPrompt:
    """How one class is asked for."""

    name: str
    """The class; one of the run's."""
    ask: tuple[str, ...] = ()
    """Phrases that mean the class, in the words of a service. Empty: the name."""
    description: str = ""
    """A sentence for services that read one (language models)."""
    negatives: tuple[str, ...] = ()
    """Phrases that do not mean the class but look like it: they are asked for too, and
    a box that fits one of them better is dropped."""

    def __post_init__(self) -> None:
        for phrase in (*self.ask, *self.negatives):
            require(
                bool(phrase.strip()) and phrase.isprintable(),
                f"a phrase of class {self.name} must be one line of text; got"
                f" {phrase!r}",
            )

    @property
    def phrases(self) -> tuple[str, ...]:
        """Return the phrases to ask by."""
        return self.ask or (self.name,)


def check_class_prompts(prompts: Sequence[ClassPrompt], classes: Sequence[str]) -> None:
    """Raise ConfigError for prompts of other classes, and for a phrase that means two
    things.
    """
    names = [prompt.name for prompt in prompts]
    unknown = [name for name in names if name not in classes]
    require(
        not unknown,
        f"class_prompts are for {', '.join(unknown)}, but the classes are"
        f" {', '.join(classes)}",
    )
    require(len(set(names)) == len(names), "class_prompts name a class twice")
    owners: dict[str, str] = {}
    for name in classes:
        own_phrases = {normalize_class_name(phrase) for phrase in (name,)}
        for prompt in prompts:
            if prompt.name == name:
                own_phrases |= set(map(normalize_class_name, prompt.phrases))
        for phrase in own_phrases:
            require(
                phrase not in owners,
                f"{phrase!r} means both {owners.get(phrase)} and {name}: a phrase must"
                " mean one class",
            )
            owners[phrase] = name
    for prompt in prompts:
        for negative in prompt.negatives:
            owner = owners.get(normalize_class_name(negative))
            require(
                owner is None,
                f"the negative {negative!r} of class {prompt.name} is how class {owner}"
                " is asked for: every box of it would be dropped; remove it from 'not'"
                " (a class of its own needs no negative)",
            )


def parse_class_prompts(
    settings: Any, origin: str
) -> tuple[tuple[str, ...], tuple[ClassPrompt, ...], tuple[float | None, ...]]:
    """Return the classes, the prompts of those that have any, and the least score of
    each class (empty if none has one) from ``NAME: {ask, description, not, score_min}``.

    Raises ConfigError naming ``origin``, the class and what was expected.
    """
    if isinstance(settings, list):
        settings = dict.fromkeys(settings)
    if not isinstance(settings, Mapping) or not settings:
        raise ConfigError(
            f"{origin}: expected classes as NAME: {{ask: [...], not: [...]}}, got"
            f" {type(settings).__name__}"
        )
    prompts, thresholds = [], []
    for name, details in settings.items():
        if not isinstance(name, str):
            raise ConfigError(
                f"{origin}: the class {name!r} is no text: write it in quotes"
            )
        where = f"{origin}: class {name}"
        fields = {} if details is None else details
        if not isinstance(fields, Mapping):
            raise ConfigError(f"{where}: expected {', '.join(KEYS)}, got {fields!r}")
        unknown = [key for key in fields if key not in KEYS]
        if unknown:
            raise ConfigError(
                f"{where} has the unknown key {unknown[0]!r}; expected {', '.join(KEYS)}"
            )
        prompt = ClassPrompt(
            name,
            _parse_phrases(fields.get("ask"), f"{where}: ask"),
            str(fields.get("description") or ""),
            _parse_phrases(fields.get("not"), f"{where}: not"),
        )
        if prompt != ClassPrompt(name):
            prompts.append(prompt)
        thresholds.append(_parse_score(fields.get("score_min"), where))
    has_threshold = any(threshold is not None for threshold in thresholds)
    class_score_min = tuple(thresholds) if has_threshold else ()
    return tuple(settings), tuple(prompts), class_score_min


def _parse_phrases(node: Any, where: str) -> tuple[str, ...]:
    phrases = [node] if isinstance(node, str) else node or []
    if not isinstance(phrases, list) or not all(isinstance(p, str) for p in phrases):
        raise ConfigError(f"{where} must be a list of phrases; got {node!r}")
    return tuple(phrases)


def _parse_score(node: Any, where: str) -> float | None:
    if node is None:
        return None
    if isinstance(node, bool) or not isinstance(node, (int, float)):
        raise ConfigError(f"{where}: score_min must be a number in 0..1; got {node!r}")
    check_fraction(f"{where}: score_min", float(node))
    return float(node)
