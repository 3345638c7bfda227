"""``collect.py labels ...`` and ``collect.py journal ...``: look at label maps and
journals. Nothing here makes a call.

python pipelines/collect.py labels check FILE --classes a,b [--root ROOT]
python pipelines/collect.py labels propose --classes a,b --root ROOT [--out FILE]
python pipelines/collect.py journal show|verify|compact --root ROOT
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from coin_ray import storage
from coin_ray.class_names import normalize_class_name, class_name_variants
from coin_ray.cloud.adapters.parsing import sanitize_text
from coin_ray.cloud.journal.journal import TASK, Journal, SegmentJournal
from coin_ray.cloud.label_map import LabelMap, load_label_map
from coin_ray.config import Clip, PipelineConfig
from coin_ray.errors import CoinError, ConfigError, InputError

TOOLS = ("labels", "journal")
NAMES_SHOWN = 40
SIMILARITY_MIN = 0.8
MARGIN = 0.05
"""A guess by text similarity names a class that is this much nearer than the next one.
"""
GUESS = "#? "
NAME_KEYS = ("label", "category", "class", "name", "Name")
BOX_KEYS = (
    "box",
    "bbox",
    "bbox_2d",
    "box_2d",
    "boundingBox",
    "boundingPoly",
    "BoundingBox",
)
CENTRE_KEYS = {"x", "y", "width", "height"}
FENCE = re.compile(r"^\s*```(?:json)?\s*|\s*```\s*$")

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Names [N] -> embeddings [N, D] of unit length."""


@dataclass(frozen=True, slots=True)
class SeenName:
    """What an answer calls a box. ``more``: aliases, then parents."""

    name: str
    vendor_id: str = ""
    more: tuple[str, ...] = ()

    @property
    def candidates(self) -> tuple[str, ...]:
        return (*((self.vendor_id,) if self.vendor_id else ()), self.name, *self.more)

    @property
    def key(self) -> str:
        """What a map calls it."""
        return self.vendor_id or self.name

    def __str__(self) -> str:
        return sanitize_text(self.name) + (
            f" ({sanitize_text(self.vendor_id)})" if self.vendor_id else ""
        )


@dataclass(frozen=True, slots=True)
class Seen:
    """Names in a journal's raw answers, by how many boxes have them."""

    names: Counter[SeenName]
    answers: int
    unreadable: int
    """Answers that are no JSON."""


def main(arguments: Sequence[str], script: str = "collect.py") -> int:
    """Run a tool; returns the exit code. User errors are one message, no traceback."""
    options = _parser(script).parse_args(list(arguments))
    try:
        return int(options.run(options))
    except CoinError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code


def _parser(script: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=script,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    tools = parser.add_subparsers(required=True, metavar="labels|journal")
    labels = tools.add_parser(
        "labels", help="label maps: from a service's own names to the classes"
    ).add_subparsers(required=True)
    check = labels.add_parser(
        "check",
        help=(
            "is every class reachable, and which names of the journal's answers does"
            " the map not know?"
        ),
    )
    check.add_argument("file")
    check.add_argument("--classes", required=True, type=_class_names, help="a,b")
    check.add_argument(
        "--root", help="folder or URI of a run, for the names its service gave"
    )
    check.set_defaults(run=_check)
    propose = labels.add_parser(
        "propose",
        help="write a map to correct by hand, from the names in the journal's answers",
    )
    propose.add_argument("--classes", required=True, type=_class_names, help="a,b")
    propose.add_argument("--root", required=True, help="folder or URI of a run")
    propose.add_argument(
        "--out", help="file to write; it must not exist (default: print)"
    )
    propose.add_argument(
        "--service", help="whose names these are (default: as in the run's config)"
    )
    propose.add_argument(
        "--no-similarity",
        action="store_true",
        help="don't guess by CLIP's text similarity",
    )
    propose.add_argument(
        "--clip-model", help="open_clip model for guesses (default: the run's)"
    )
    propose.add_argument("--clip-pretrained", help="its weights: a tag or a file")
    propose.add_argument(
        "--margin",
        type=float,
        default=MARGIN,
        help=f"how much nearer a guess must be than the next class ({MARGIN})",
    )
    propose.set_defaults(run=_propose)
    journal = tools.add_parser("journal", help="what was answered and spent")
    actions = journal.add_subparsers(required=True, metavar="show|verify|compact")
    for name, run, text in (
        ("show", _show, "answers, calls, USD and bytes"),
        ("verify", _verify, "read every record again; exit code 1 if any is damaged"),
        (
            "compact",
            _compact,
            (
                "rewrite live answers and sums into one file; no run may be using the"
                " journal"
            ),
        ),
    ):
        action = actions.add_parser(name, help=text)
        action.add_argument("--root", required=True, help="folder or URI of a run")
        action.set_defaults(run=run)
    return parser


def _class_names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names or len(set(names)) != len(names):
        raise argparse.ArgumentTypeError(
            "give different class names, separated by commas"
        )
    return names


def _open(root: str) -> Journal:
    place = storage.join(storage.absolute_uri(root), "journal")
    if not storage.exists(place):
        raise InputError(
            f"no journal at {place}; --root is the folder of a run that asked a service"
        )
    return Journal.open(place)


def _show(options: argparse.Namespace) -> int:
    contents = _open(options.root).contents()
    print(f"answers      {contents.answers:>9,}")
    for (service, model), count in sorted(contents.services.items()):
        print(f"  {count:>18,}  {service or 'service not recorded'} {model}".rstrip())
    print(f"open tasks   {contents.tasks:>9,}")
    print(f"quarantined  {contents.quarantined:>9,}")
    print(f"attempts     {contents.attempts:>9,}")
    print(f"refunds      {contents.refunds:>9,}")
    print(f"spent        {contents.calls:>9,} calls, ${contents.usd:,.4f}")
    print(f"size         {contents.size:>9,} bytes")
    return 0


def _verify(options: argparse.Namespace) -> int:
    journal = _open(options.root)
    found = 0
    for damage in journal.verify():
        found += 1
        print(f"{damage.place}: offset {damage.offset}: {damage.reason}")
    print(
        f"{found} damaged places"
        if found
        else f"no damage; {len(journal.keys()):,} answers and tasks can be read"
    )
    return 1 if found else 0


def _compact(options: argparse.Namespace) -> int:
    journal = _open(options.root)
    if not isinstance(journal, SegmentJournal):
        print("nothing to do: on an object store each answer is an object of its own")
        return 0
    before, after = journal.compact()
    print(f"{before:,} bytes before, {after:,} after")
    return 0


def _check(options: argparse.Namespace) -> int:
    labels = load_label_map(options.file, options.classes)
    by_class = {
        k: [
            (name, weight)
            for name, (column, weight) in labels.names.items()
            if column == k
        ]
        for k in range(len(options.classes))
    }
    for k, name in enumerate(options.classes):
        known = ", ".join(
            n if weight == 1 else f"{n} (weight {weight:g})"
            for n, weight in by_class[k]
        )
        print(f"{name}: {known or 'NOT REACHABLE: no name means it'}")
    unreachable = sum(not names for names in by_class.values())
    unknown = (
        _print_unknown(labels, seen_names(_open(options.root))) if options.root else 0
    )
    return 1 if unreachable or unknown else 0


def _print_unknown(labels: LabelMap, seen: Seen) -> int:
    """Names that would be dropped and counted, most frequent first; returns how many
    there are.
    """
    unknown = Counter(
        {
            n: c
            for n, c in seen.names.items()
            if labels.find(n.candidates) is None and not labels.ignores(n.candidates)
        }
    )
    print(
        f"\n{seen.answers:,} answers in the journal, {seen.names.total():,} boxes,"
        f" {unknown.total():,} of them under a name not in the map"
    )
    if seen.unreadable:
        print(f"{seen.unreadable:,} answers are no JSON")
    for name, count in unknown.most_common(NAMES_SHOWN):
        print(f"  {count:>9,}  {name}")
    if len(unknown) > NAMES_SHOWN:
        print(f"  and {len(unknown) - NAMES_SHOWN:,} more names")
    return len(unknown)


def _propose(options: argparse.Namespace) -> int:
    if options.out and storage.exists(storage.absolute_uri(options.out)):
        raise ConfigError(
            f"{options.out} exists and is not overwritten; give --out another name"
        )
    seen = seen_names(_open(options.root))
    config = _run_config(options.root)
    service = options.service or (config.cloud.service if config else "http")
    embed = None if options.no_similarity else _clip_texts(options, config)
    text = proposal(seen, options.classes, service, embed, options.margin)
    if options.out:
        storage.write_bytes(storage.absolute_uri(options.out), text.encode())
        print(
            f"wrote {options.out}: read it, correct it, and give it as"
            " --cloud.label-map"
        )
    else:
        print(text, end="")
    return 0


def proposal(
    seen: Seen,
    classes: Sequence[str],
    service: str,
    embed: Embed | None = None,
    margin: float = MARGIN,
) -> str:
    """YAML text of a label map. Names that match a class are mapped; guesses and the
    rest stand in comments, for a human to decide.
    """
    mapped: dict[str, tuple[str, str]] = {}
    columns: dict[str, tuple[int, float]] = {}
    for name, count in seen.names.most_common():
        if LabelMap(columns).find(name.candidates) is None:
            match = _match(name, classes)
            if match is not None:
                written, column, how = match
                mapped[written] = (classes[column], f"{how}, {count:,} boxes")
                columns[normalize_class_name(written)] = (column, 1.0)
    unmatched = (
        (name, count)
        for name, count in seen.names.most_common()
        if LabelMap(columns).find(name.candidates) is None
    )
    rest = list(
        {
            normalize_class_name(name.key): (name, count) for name, count in reversed(list(unmatched))
        }.values()
    )[::-1]
    guesses = _guesses([name.name for name, _ in rest], classes, embed, margin)
    lines = [
        (
            f"# Proposed from {seen.answers:,} answers. What follows {GUESS.strip()!r}"
            " was not matched by name and does not count as it stands:"
        ),
        (
            f"# remove {GUESS.strip()!r} where a guess is right, and under 'ignore' for"
            " names that mean none of the classes."
        ),
        f"service: {_quoted(service)}",
        f"classes: [{', '.join(map(_quoted, classes))}]",
        "map:",
        *(
            f"  {_quoted(name)}: {_quoted(label)}  # {how}"
            for name, (label, how) in mapped.items()
        ),
        *(
            f"{GUESS}  {_quoted(n.key)}: {_quoted(g[0])}  # {n}: {g[1]}, {c:,} boxes"
            for (n, c), g in zip(rest, guesses, strict=True)
            if g
        ),
        "ignore:",
        *(
            f"{GUESS}  - {_quoted(n.key)}  # {n}: {c:,} boxes"
            for (n, c), g in zip(rest, guesses, strict=True)
            if not g
        ),
    ]
    return "\n".join(lines) + "\n"


def _match(seen: SeenName, classes: Sequence[str]) -> tuple[str, int, str] | None:
    """Name to map, class index and how it was found: the name itself, else an alias or
    a parent that is a class by name.
    """
    by_fold = {normalize_class_name(c): k for k, c in enumerate(classes)}
    for word in (seen.name, *seen.more):
        for number, form in enumerate(class_name_variants(word)):
            if form in by_fold:
                k = by_fold[form]
                how = (
                    "exact"
                    if word == classes[k]
                    else "folded"
                    if number == 0
                    else "plural"
                )
                if word == seen.name:
                    return seen.key, k, f"{seen}: {how}"
                return word, k, f"{how}, alias or parent of {seen}"
    return None


def _guesses(
    names: Sequence[str], classes: Sequence[str], embed: Embed | None, margin: float
) -> list[tuple[str, str] | None]:
    """For each name the class whose text is nearest by ``margin``, and the
    similarities; None where none is.
    """
    if embed is None or not names:
        return [None] * len(names)
    similarity = embed(names) @ embed(classes).T
    return [_guess(row, classes, margin) for row in similarity]


def _guess(
    similarity: NDArray[np.float32], classes: Sequence[str], margin: float
) -> tuple[str, str] | None:
    order = np.argsort(-similarity, kind="stable")
    best = float(similarity[order[0]])
    runner_up = float(similarity[order[1]]) if len(order) > 1 else -1.0
    if best < SIMILARITY_MIN or best - runner_up < margin:
        return None
    other = f", next {classes[order[1]]} {runner_up:.2f}" if len(order) > 1 else ""
    return classes[order[0]], f"similarity {best:.2f}{other}"


def _quoted(name: str) -> str:
    """A YAML scalar that is read as this text."""
    if (
        re.fullmatch(r"[A-Za-z][\w-]*( [\w-]+)*", name)
        and name.isascii()
        and yaml.safe_load(name) == name
    ):
        return name
    return str(
        yaml.safe_dump(name, default_style='"', allow_unicode=True, width=10**9)
    ).strip()


def _run_config(root: str) -> PipelineConfig | None:
    from coin_ray.config.yaml_files import read_config

    place = storage.join(storage.absolute_uri(root), "config.yaml")
    return read_config(place) if storage.exists(place) else None


def _clip_texts(
    options: argparse.Namespace, config: PipelineConfig | None
) -> Embed | None:
    """CLIP's text embeddings, or None, with a note, if the model can't be loaded."""
    from coin_ray.clip.encoder import class_embeddings, load_clip

    known = config.clip if config else Clip()
    clip = Clip(
        options.clip_model or known.model,
        options.clip_pretrained or known.pretrained,
        templates=("a photo of a {}.",),
    )
    try:
        model = load_clip(clip)
    except InputError as error:
        print(f"no guesses by text similarity: {error}", file=sys.stderr)
        return None
    return lambda names: class_embeddings(model, names, clip)[:-1].numpy()


def seen_names(journal: Journal) -> Seen:
    """The names that a journal's raw answers give to boxes, whatever service they came
    from.
    """
    names: Counter[SeenName] = Counter()
    answers = unreadable = 0
    for key in journal.keys():  # noqa: SIM118
        record = None if key.endswith(TASK) else journal.get(key)
        if record is None:
            continue
        answers += 1
        try:
            names.update(_named_boxes(json.loads(record.body)))
        except (ValueError, RecursionError):
            unreadable += 1
    return Seen(names, answers, unreadable)


def _named_boxes(value: Any) -> Iterator[SeenName]:
    """A box is any JSON object that has a name and a box; language models put theirs as
    text into a string.
    """
    if isinstance(value, list):
        for item in value:
            yield from _named_boxes(item)
    elif isinstance(value, str):
        if "box" in value:
            yield from _named_boxes(_inner_json(value))
    elif isinstance(value, dict):
        boxes = _boxes(value)
        name = _name(value)
        if boxes and name:
            yield from [name] * boxes
        else:
            for item in value.values():
                yield from _named_boxes(item)


def _inner_json(text: str) -> Any:
    try:
        return json.loads(FENCE.sub("", text))
    except ValueError:
        return None


def _boxes(value: dict[str, Any]) -> int:
    if "Instances" in value:
        return len(value["Instances"]) if isinstance(value["Instances"], list) else 0
    return int(
        any(key in value for key in BOX_KEYS)
        or value.keys() >= CENTRE_KEYS
        or "Geometry" in value
    )


def _name(value: dict[str, Any]) -> SeenName | None:
    tags = value.get("tags")
    if isinstance(tags, list) and tags and isinstance(tags[0], dict):
        return _name(tags[0])
    own = [value[key] for key in NAME_KEYS if isinstance(value.get(key), str)]
    vendor_id = value["mid"] if isinstance(value.get("mid"), str) else ""
    related = [
        item.get("Name")
        for key in ("Aliases", "Parents")
        for item in value.get(key) or []
        if isinstance(item, dict)
    ]
    more = tuple(name for name in related if isinstance(name, str))
    return (
        SeenName(own[0] if own else vendor_id, vendor_id, more)
        if own or vendor_id
        else None
    )
