"""Maps from a service's own names to the classes of the run. They only decode answers:
changing a map costs no call.

    service: google-vision
    map:
      /m/0k4j: car                        # an id the service gives, or a name
      Van: {class: car, weight: 0.7}
    ignore: [Wheel, License plate]
    precision: {car: 0.8}                 # how often the label is right, for services
                                          # that give no score
    confusion: {car: {truck: 0.3, background: 0.7}}   # what a "car" that is none turned
                                                      # out to be

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
TARGET_KEYS = ("class", "weight")
BACKGROUND = "background"
ROW_TOLERANCE = 1e-3
ASSUMED_PRECISION = 0.5
"""Score of a label without score or measured precision: assumed, not measured."""

MapTarget = tuple[int, float]
"""Class index, and weight in 0..1."""


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
    """``names``: a service's normalized name or id to (class index, weight in 0..1);
    ``ignored``: normalized names that are dropped without counting.

    A box's score is multiplied by the weight: what is missing to 1 is doubt that the
    name means the class.
    """

    names: Mapping[str, MapTarget]
    ignored: frozenset[str] = field(default_factory=frozenset)
    prior: Prior = Prior()
    service: str = ""

    def find(self, candidates: Sequence[str]) -> MapTarget | None:
        """Return the target of the first of ``candidates`` (best first: id, name,
        aliases, parents) that is mapped; None if an ignored one comes before.

        Whole names are compared, never parts of them: "bus stop" is no bus.
        """
        for name in candidates:
            for variant in class_name_variants(name):
                if variant in self.names:
                    return self.names[variant]
                if variant in self.ignored:
                    return None
        return None

    def ignores(self, candidates: Sequence[str]) -> bool:
        """Return whether any of these names is ignored."""
        return any(
            variant in self.ignored
            for name in candidates
            for variant in class_name_variants(name)
        )

    @classmethod
    def of_classes(cls, classes: Sequence[str]) -> LabelMap:
        """Return a map of each class under its own name."""
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
    return _LabelMapParser(path, tuple(classes)).parse_label_map(root, service)


@dataclass(frozen=True, slots=True)
class _LabelMapParser:
    """Parses one file; every problem is raised with its line."""

    path: str
    classes: tuple[str, ...]

    def parse_label_map(self, root: yaml.Node, service: str | None) -> LabelMap:
        nodes = self.parse_keys(root, KEYS, "a label map")
        for name in ("service", "map"):
            if name not in nodes:
                self.fail(root, f"{name!r} is missing")
        map_service = self.parse_text(nodes["service"], "service")
        if service is not None and map_service != service:
            self.fail(
                nodes["service"],
                f"the map is for service {map_service!r}, but cloud.service is"
                f" {service!r}",
            )
        if "classes" in nodes:
            self.check_classes(nodes["classes"])
        names, lines = self.parse_map(nodes["map"])
        ignored: frozenset[str] = frozenset()
        if "ignore" in nodes:
            ignored = self.parse_ignored(nodes["ignore"], lines)
        precision: tuple[float | None, ...] = ()
        if "precision" in nodes:
            precision = self.parse_precision(nodes["precision"])
        confusion: tuple[tuple[float, ...] | None, ...] = ()
        if "confusion" in nodes:
            confusion = self.parse_confusion(nodes["confusion"])
        return LabelMap(names, ignored, Prior(confusion, precision), map_service)

    def parse_map(self, node: yaml.Node) -> tuple[dict[str, MapTarget], dict[str, int]]:
        """Return the map, and the line of each name."""
        names: dict[str, MapTarget] = {}
        lines: dict[str, int] = {}
        for name_node, target_node in self.parse_pairs(node, "map"):
            name = self.parse_new_name(name_node, lines)
            names[name] = self.parse_target(target_node, name_node.value)
        if not names:
            self.fail(node, "map names nothing; write NAME: CLASS")
        return names, lines

    def parse_target(self, node: yaml.Node, name: str) -> MapTarget:
        if not isinstance(node, yaml.MappingNode):
            return self.parse_class(node, name), 1.0
        nodes = self.parse_keys(node, TARGET_KEYS, repr(name))
        if "class" not in nodes:
            self.fail(node, f"{name!r} has no class")
        weight = 1.0
        if "weight" in nodes:
            weight = self.parse_number(nodes["weight"], f"the weight of {name!r}")
        if weight == 0:
            self.fail(
                node,
                f"{name!r} has weight 0; a name that means no class belongs under"
                " ignore",
            )
        return self.parse_class(nodes["class"], name), weight

    def parse_ignored(self, node: yaml.Node, lines: dict[str, int]) -> frozenset[str]:
        if isinstance(node, yaml.ScalarNode) and not node.value:
            return frozenset()
        return frozenset(
            self.parse_new_name(name_node, lines)
            for name_node in self.parse_list(node, "ignore")
        )

    def parse_new_name(self, node: yaml.Node, lines: dict[str, int]) -> str:
        """Return a normalized name and note its line; it must not be in ``lines``."""
        name = normalize_class_name(self.parse_text(node, "a name"))
        if not name:
            self.fail(node, f"{node.value!r} is no name")
        if name in lines:
            self.fail(
                node,
                f"{node.value!r} is the name of line {lines[name]} again; names"
                " differ in more than case, spaces and hyphens",
            )
        lines[name] = _line_number(node)
        return name

    def check_classes(self, node: yaml.Node) -> None:
        class_nodes = self.parse_list(node, "classes")
        map_classes = [self.parse_text(n, "a class") for n in class_nodes]
        if sorted(map_classes) != sorted(self.classes):
            self.fail(
                node,
                f"the map is for the classes {', '.join(map_classes)}, but the run's"
                f" are {', '.join(self.classes)}",
            )

    def parse_precision(self, node: yaml.Node) -> tuple[float | None, ...]:
        by_class: dict[int, float] = {}
        for class_node, number_node in self.parse_pairs(node, "precision"):
            name = class_node.value
            precision = self.parse_number(number_node, f"the precision of {name!r}")
            if precision == 0:
                self.fail(
                    number_node,
                    f"the precision of {name!r} is 0; names that are never right belong"
                    " under ignore",
                )
            by_class[self.parse_class(class_node, "precision")] = precision
        return tuple(by_class.get(k) for k in range(len(self.classes)))

    def parse_confusion(self, node: yaml.Node) -> tuple[tuple[float, ...] | None, ...]:
        by_class: dict[int, tuple[float, ...]] = {}
        for class_node, row_node in self.parse_pairs(node, "confusion"):
            label = self.parse_class(class_node, "confusion")
            by_class[label] = self.parse_confusion_row(row_node, class_node.value)
        return tuple(by_class.get(k) for k in range(len(self.classes)))

    def parse_confusion_row(self, node: yaml.Node, name: str) -> tuple[float, ...]:
        background = len(self.classes)
        row = [0.0] * (background + 1)
        for class_node, share_node in self.parse_pairs(
            node, f"the confusion of {name!r}"
        ):
            column = background
            if class_node.value != BACKGROUND:
                column = self.parse_class(class_node, f"confusion of {name}")
            row[column] = self.parse_number(
                share_node,
                f"the share of {class_node.value!r} in the confusion of {name!r}",
            )
        if abs(sum(row) - 1) > ROW_TOLERANCE:
            self.fail(node, f"the confusion of {name!r} sums to {sum(row):g}, not 1")
        return tuple(row)

    def parse_class(self, node: yaml.Node, name: str) -> int:
        """Return the index of a class of the run."""
        class_name = self.parse_text(node, f"the class of {name!r}")
        if class_name not in self.classes:
            self.fail(
                node,
                f"{name!r}: {class_name!r} is none of the classes"
                f" {', '.join(self.classes)}",
            )
        return self.classes.index(class_name)

    def parse_number(self, node: yaml.Node, description: str) -> float:
        text = self.parse_text(node, description)
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not 0 <= number <= 1:
            self.fail(node, f"{description} must be a number in 0..1; got {text!r}")
        return number

    def parse_text(self, node: yaml.Node, description: str) -> str:
        """Return the text as it is written, also where YAML would read a number or a
        Boolean: ``no: car``, ``3: bus``.
        """
        if not isinstance(node, yaml.ScalarNode) or not node.value.strip():
            self.fail(node, f"{description} must be a word; got {_describe_node(node)}")
        return str(node.value)

    def parse_list(self, node: yaml.Node, description: str) -> list[yaml.Node]:
        if not isinstance(node, yaml.SequenceNode):
            self.fail(node, f"{description} must be a list; got {_describe_node(node)}")
        return list(node.value)

    def parse_keys(
        self, node: yaml.Node, allowed: Sequence[str], description: str
    ) -> dict[str, yaml.Node]:
        """Return the nodes of a mapping with fixed keys."""
        nodes = {}
        for key_node, node_of_key in self.parse_pairs(node, description):
            if key_node.value not in allowed:
                self.fail(
                    key_node,
                    f"{description} has the unknown key {key_node.value!r}; expected"
                    f" {', '.join(allowed)}",
                )
            nodes[key_node.value] = node_of_key
        return nodes

    def parse_pairs(
        self, node: yaml.Node, description: str
    ) -> list[tuple[yaml.Node, yaml.Node]]:
        """Return the keys and values of a mapping; no key may be repeated."""
        if not isinstance(node, yaml.MappingNode):
            self.fail(
                node, f"{description} must be a mapping; got {_describe_node(node)}"
            )
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            text = self.parse_text(key_node, f"a key of {description}")
            if text in lines:
                self.fail(
                    key_node,
                    f"{text!r} is given again; it is already on line {lines[text]}",
                )
            lines[text] = _line_number(key_node)
        return list(node.value)

    def fail(self, node: yaml.Node, problem: str) -> NoReturn:
        raise ConfigError(f"{self.path}, line {_line_number(node)}: {problem}")


def _line_number(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _describe_node(node: yaml.Node) -> str:
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return repr(node.value) if node.value else "nothing"
