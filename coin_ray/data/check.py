"""``python -m coin_ray.data.check DIR [DIR ...] [--classes a,b]``: what is wrong with
annotated images, before money or hours are spent.

Each DIR is a split, in any format of ``coin_ray.data.formats``, also as
``FOLDER#SPLIT``. Exit code 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coin_ray import storage
from coin_ray.class_names import is_same_class_name
from coin_ray.data.canonical import decode_rgb
from coin_ray.data.formats import Dataset, ImageRecord, read_dataset
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError

OUTSIDE = 1.0
"""Pixels a box may stand out: formats round, and VOC's pixels are counted in several
ways."""
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong: ``kind`` groups them, ``example`` says where."""

    kind: str
    example: str


@dataclass(frozen=True, slots=True)
class Look:
    """A record after its image was decoded: ``sha256`` sha256 of the file, ``size``
    upright (width, height); ``broken`` says why not.
    """

    record: ImageRecord
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    broken: str = ""


def check_datasets(places: Sequence[str], classes: Sequence[str] = ()) -> list[Fault]:
    """Every fault of the folders together; decodes every image. Of labels that can't be
    read, only the first file of a folder is named.
    """
    datasets: dict[str, Dataset] = {}
    faults = []
    for place in places:
        try:
            datasets[place] = read_dataset(place)
        except InputError as error:
            faults.append(Fault("can't be read", str(error)))
    looks = {
        place: map_in_threads(_look, dataset.records)
        for place, dataset in datasets.items()
    }
    faults += [
        fault
        for place, dataset in datasets.items()
        for fault in _of_split(place, dataset, looks[place])
    ]
    return faults + list(_duplicates(looks)) + list(_names(datasets.values(), classes))


def _look(record: ImageRecord) -> Look:
    raw = storage.read_bytes(record.uri)
    try:
        return Look(record, hashlib.sha256(raw).hexdigest(), decode_rgb(raw).size)
    except InputError as error:
        return Look(record, broken=str(error))


def _of_split(place: str, dataset: Dataset, looks: Sequence[Look]) -> Iterator[Fault]:
    if not dataset.records:
        yield Fault("no images", place)
    for name in dataset.missing:
        yield Fault(
            "image missing", f"{place}: {name} is labelled or listed, but not there"
        )
    for look in looks:
        if look.broken:
            yield Fault("broken image", f"{look.record.uri}: {look.broken}")
        elif look.record.annotated:
            yield from _boxes(look.record, look.size)


def _boxes(record: ImageRecord, size: tuple[int, int]) -> Iterator[Fault]:
    if (record.width, record.height) != size:
        yield Fault(
            "size differs",
            f"{record.uri} is {size[0]} x {size[1]}, its labels say {record.width} x"
            f" {record.height}",
        )
    left, top, right, bottom = record.boxes.T
    reversed_ = (right < left) | (bottom < top)
    empty = ((right == left) | (bottom == top)) & ~reversed_
    outside = (
        np.maximum(record.boxes - np.tile(size, 2), -record.boxes).max(
            1, initial=-np.inf
        )
        > OUTSIDE
    )
    kinds = (
        ("reversed box", reversed_),
        ("empty box", empty),
        ("box outside its image", outside & ~reversed_),
        ("same box twice", _twice(record)),
    )
    for kind, found in kinds:
        for row in np.flatnonzero(found):
            yield Fault(
                kind,
                f"{record.uri}: {record.labels[row]}"
                f" {[round(v, 1) for v in record.boxes[row].tolist()]} of {size[0]} x"
                f" {size[1]}",
            )


def _twice(record: ImageRecord) -> NDArray[np.bool_]:
    """Marks boxes that an earlier one with the same label equals."""
    seen: set[tuple[object, ...]] = set()
    marks = []
    for row in zip(record.labels, *record.boxes.T.tolist(), strict=True):
        marks.append(row in seen)
        seen.add(row)
    return np.asarray(marks, np.bool_)


def _duplicates(looks: dict[str, list[Look]]) -> Iterator[Fault]:
    """Files with the same bytes, and a file listed twice; the same image encoded anew
    is not found.
    """
    first: dict[str, tuple[str, str]] = {}
    for place, found in looks.items():
        for look in found:
            if look.broken:
                continue
            if look.digest not in first:
                first[look.digest] = place, look.record.uri
                continue
            other, uri = first[look.digest]
            yield Fault(
                "same image twice" if other == place else "same image in two splits",
                f"{look.record.uri} is {uri}",
            )


def _names(datasets: Collection[Dataset], classes: Sequence[str]) -> Iterator[Fault]:
    counts = Counter({name: 0 for dataset in datasets for name in dataset.names})
    counts.update(
        label
        for dataset in datasets
        for record in dataset.records
        for label in record.labels
    )
    for names in _alike({*counts, *classes}):
        told = (
            f"{name!r} ({counts[name]} boxes{', asked for' if name in classes else ''})"
            for name in names
        )
        if len(names) > 1:
            yield Fault("names differ only in case or plural", ", ".join(told))
    if not any(record.annotated for dataset in datasets for record in dataset.records):
        return
    present = [name for name, count in counts.items() if count]
    for name in classes:
        if not any(is_same_class_name(name, known) for known in present):
            yield Fault(
                "class without a box",
                f"{name!r}; there are {', '.join(sorted(counts)) or 'no names'}"[:300],
            )


def _alike(names: Iterable[str]) -> list[list[str]]:
    """Names in groups, each of them like another one of its group."""
    groups: list[list[str]] = []
    for name in sorted(names):
        group = next(
            (g for g in groups if any(is_same_class_name(name, known) for known in g)),
            None,
        )
        if group is None:
            groups.append([name])
        else:
            group.append(name)
    return groups


def faults_table(faults: Sequence[Fault]) -> Table:
    """Kinds of faults, the most frequent first, with counts and examples."""
    found = Table(title="What is wrong", title_justify="left", show_lines=True)
    found.add_column("fault")
    found.add_column("count", justify="right")
    found.add_column("examples", overflow="fold")
    for kind, count in Counter(f.kind for f in faults).most_common():
        examples = [f.example for f in faults if f.kind == kind]
        more = [f"and {count - SHOWN} more"] if count > SHOWN else []
        found.add_row(kind, str(count), escape("\n".join(examples[:SHOWN] + more)))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m coin_ray.data.check",
        description="Look for faults in annotated images.",
    )
    parser.add_argument(
        "places",
        nargs="+",
        metavar="DIR",
        help="a split: a folder, or FOLDER#SPLIT; several are compared with each other",
    )
    parser.add_argument(
        "--classes", default="", help="names that will be asked for: a,b"
    )
    given = parser.parse_args(arguments)
    faults = check_datasets(
        given.places,
        [name.strip() for name in given.classes.split(",") if name.strip()],
    )
    Console().print(
        (
            faults_table(faults)
            if faults
            else f"nothing wrong found in {', '.join(given.places)}"
        ),
        soft_wrap=not faults,
        markup=False,
    )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
