"""From a service's own names to the classes of the run. Reading answers only: changing
a map costs no call.

    service: google-vision
    map:
      /m/0k4j: car                        # an id the service gives, or a name
      Van: {class: car, weight: 0.7}
    ignore: [Wheel, License plate]
    precision: {car: 0.8}                 # how often the label is right, for services
    that give no score
    confusion: {car: {truck: 0.3, background: 0.7}}   # what a "car" that is none turned
    out to be

Only ``service`` and ``map`` are needed. A name that is neither mapped nor ignored is
dropped and counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import yaml

from coin_ray import storage
from coin_ray.class_names import class_name_variants, normalize_class_name
from coin_ray.errors import ConfigError

KEYS = ("service", "classes", "map", "ignore", "precision", "confusion")
BACKGROUND = "background"
ROW_TOLERANCE = 1e-3
ASSUMED_PRECISION = 0.5
"""Stated, not measured: the score of a label without score or known precision."""


@dataclass(frozen=True, slots=True)
class Prior:
    """What is known of a service's labels beside its scores, by class.

    ``confusion`` [K][K+1], rows sum to 1, background last: what boxes of a label really
    are; only the shares off the diagonal count. None for a class: all others and the
    background alike. ``precision`` [K]: how often the label is right; None: unknown.
    """

    confusion: tuple[tuple[float, ...] | None, ...] = ()
    precision: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class LabelMap:
    """``names``: a service's name or id, folded, to (class index, weight in 0..1);
    ``ignored``: folded names dropped without counting.

    A box's score is multiplied by the weight: what is missing to 1 is doubt that the
    name means the class.
    """

    names: Mapping[str, tuple[int, float]]
    ignored: frozenset[str] = field(default_factory=frozenset)
    prior: Prior = Prior()
    service: str = ""

    def find(self, candidates: Sequence[str]) -> tuple[int, float] | None:
        """The first of ``candidates`` (best first: id, name, aliases, parents) that is
        mapped; None if an ignored one comes before.

        Whole names are compared, never parts of them: "bus stop" is no bus.
        """
        for name in candidates:
            for form in class_name_variants(name):
                if form in self.names:
                    return self.names[form]
                if form in self.ignored:
                    return None
        return None

    def ignores(self, candidates: Sequence[str]) -> bool:
        return any(
            form in self.ignored
            for name in candidates
            for form in class_name_variants(name)
        )

    @classmethod
    def of_classes(cls, classes: Sequence[str]) -> LabelMap:
        """Each class under its own name."""
        return cls(
            {normalize_class_name(name): (k, 1.0) for k, name in enumerate(classes)}
        )


def load_label_map(
    path: str, classes: Sequence[str], service: str | None = None
) -> LabelMap:
    """Read a map for these classes (and, if given, this service). Raises ConfigError
    naming the file, the line and the key.
    """
    try:
        root = yaml.compose(storage.read_bytes(path), Loader=yaml.SafeLoader)
    except (FileNotFoundError, IsADirectoryError):
        raise ConfigError(f"no label map at {path}") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if root is None:
        raise ConfigError(f"{path} is empty; a label map needs 'service' and 'map'")
    return _File(path, tuple(classes)).label_map(root, service)


@dataclass(frozen=True, slots=True)
class _File:
    """One file being read; every problem is raised with its line."""

    path: str
    classes: tuple[str, ...]

    def label_map(self, root: yaml.Node, service: str | None) -> LabelMap:
        parts = {
            key.value: (key, value) for key, value in self.entries(root, "a label map")
        }
        for name, (key, _) in parts.items():
            if name not in KEYS:
                self.fail(
                    key, f"unknown key {name!r}; a label map has {', '.join(KEYS)}"
                )
        for name in ("service", "map"):
            if name not in parts:
                self.fail(root, f"{name!r} is missing")
        written_for = self.text(parts["service"][1], "service")
        if service is not None and written_for != service:
            self.fail(
                parts["service"][0],
                f"the map is for service {written_for!r}, but cloud.service is"
                f" {service!r}",
            )
        if "classes" in parts:
            self.check_classes(parts["classes"][1])
        names, lines = self.mapped(parts["map"][1])
        ignored = (
            self.ignored(parts["ignore"][1], lines)
            if "ignore" in parts
            else frozenset()
        )
        precision = (
            self.precision(parts["precision"][1]) if "precision" in parts else ()
        )
        confusion = (
            self.confusion(parts["confusion"][1]) if "confusion" in parts else ()
        )
        return LabelMap(names, ignored, Prior(confusion, precision), written_for)

    def mapped(
        self, node: yaml.Node
    ) -> tuple[dict[str, tuple[int, float]], dict[str, int]]:
        """The map, and the line of each name."""
        names: dict[str, tuple[int, float]] = {}
        lines: dict[str, int] = {}
        for key, value in self.entries(node, "map"):
            folded = self.new_name(key, lines)
            names[folded] = self.target(value, key.value)
        if not names:
            self.fail(node, "map names nothing; write NAME: CLASS")
        return names, lines

    def target(self, node: yaml.Node, name: str) -> tuple[int, float]:
        if not isinstance(node, yaml.MappingNode):
            return self.column(node, name), 1.0
        parts = {key.value: (key, value) for key, value in self.entries(node, name)}
        for part, (key, _) in parts.items():
            if part not in ("class", "weight"):
                self.fail(
                    key,
                    f"{name!r} has the unknown key {part!r}; expected class and weight",
                )
        if "class" not in parts:
            self.fail(node, f"{name!r} has no class")
        weight = (
            self.number(parts["weight"][1], f"the weight of {name!r}")
            if "weight" in parts
            else 1.0
        )
        if weight == 0:
            self.fail(
                node,
                f"{name!r} has weight 0; a name that means no class belongs under"
                " ignore",
            )
        return self.column(parts["class"][1], name), weight

    def ignored(self, node: yaml.Node, lines: dict[str, int]) -> frozenset[str]:
        if isinstance(node, yaml.ScalarNode) and not node.value:
            return frozenset()
        return frozenset(
            self.new_name(item, lines) for item in self.items(node, "ignore")
        )

    def new_name(self, node: yaml.Node, lines: dict[str, int]) -> str:
        folded = normalize_class_name(self.text(node, "a name"))
        if not folded:
            self.fail(node, f"{node.value!r} is no name")
        if folded in lines:
            self.fail(
                node,
                f"{node.value!r} is the name of line {lines[folded]} again; names"
                " differ in more than case, spaces and hyphens",
            )
        lines[folded] = _line(node)
        return folded

    def check_classes(self, node: yaml.Node) -> None:
        given = [self.text(item, "a class") for item in self.items(node, "classes")]
        if sorted(given) != sorted(self.classes):
            self.fail(
                node,
                f"the map is for the classes {', '.join(given)}, but the run's are"
                f" {', '.join(self.classes)}",
            )

    def precision(self, node: yaml.Node) -> tuple[float | None, ...]:
        found: dict[int, float] = {}
        for key, value in self.entries(node, "precision"):
            number = self.number(value, f"the precision of {key.value!r}")
            if number == 0:
                self.fail(
                    value,
                    f"the precision of {key.value!r} is 0; names that are never right"
                    " belong under ignore",
                )
            found[self.column(key, "precision")] = number
        return tuple(found.get(k) for k in range(len(self.classes)))

    def confusion(self, node: yaml.Node) -> tuple[tuple[float, ...] | None, ...]:
        found: dict[int, tuple[float, ...]] = {}
        for key, value in self.entries(node, "confusion"):
            found[self.column(key, "confusion")] = self.confusion_row(value, key.value)
        return tuple(found.get(k) for k in range(len(self.classes)))

    def confusion_row(self, node: yaml.Node, name: str) -> tuple[float, ...]:
        row = [0.0] * (len(self.classes) + 1)
        for key, value in self.entries(node, f"the confusion of {name!r}"):
            column = (
                len(self.classes)
                if key.value == BACKGROUND
                else self.column(key, f"confusion of {name}")
            )
            row[column] = self.number(
                value, f"the share of {key.value!r} in the confusion of {name!r}"
            )
        if abs(sum(row) - 1) > ROW_TOLERANCE:
            self.fail(node, f"the confusion of {name!r} sums to {sum(row):g}, not 1")
        return tuple(row)

    def column(self, node: yaml.Node, name: str) -> int:
        given = self.text(node, f"the class of {name!r}")
        if given not in self.classes:
            self.fail(
                node,
                f"{name!r}: {given!r} is none of the classes {', '.join(self.classes)}",
            )
        return self.classes.index(given)

    def number(self, node: yaml.Node, what: str) -> float:
        text = self.text(node, what)
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 <= number <= 1:
            self.fail(node, f"{what} must be a number in 0..1; got {text!r}")
        return number

    def text(self, node: yaml.Node, what: str) -> str:
        """What is written, also where YAML would read a number or a truth value: ``no:
        car``, ``3: bus``.
        """
        if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
            self.fail(node, f"{what} must be a word; got {_kind(node)}")
        return str(node.value)

    def items(self, node: yaml.Node, what: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            self.fail(node, f"{what} must be a list; got {_kind(node)}")
        return list(node.value)

    def entries(self, node: yaml.Node, what: str) -> list[tuple[yaml.Node, yaml.Node]]:
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{what} must be a mapping; got {_kind(node)}")
        lines: dict[str, int] = {}
        for key, _ in node.value:
            text = self.text(key, f"a key of {what}")
            if text in lines:
                self.fail(
                    key, f"{text!r} is given again; it is already on line {lines[text]}"
                )
            lines[text] = _line(key)
        return list(node.value)

    def fail(self, node: yaml.Node, problem: str) -> NoReturn:
        raise ConfigError(f"{self.path}, line {_line(node)}: {problem}")


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return repr(node.value) if node.value else "nothing"
