"""Find faults of annotated images before money or hours are spent: broken files, wrong
boxes, duplicates, class names that do not match, and labels that no reader took.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from coin_ray import storage
from coin_ray.class_names import is_same_class_name
from coin_ray.data.canonical import upright_size_and_range
from coin_ray.data.formats import (
    UNDECODABLE,
    Dataset,
    ImageRecord,
    describe_dataset,
    read_dataset,
)
from coin_ray.data.threads import map_in_threads
from coin_ray.errors import InputError

TOLERANCE = 1.0
"""Pixels a box may lie outside: formats round, and VOC's pixels are counted in several
ways."""
HASH_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93],
    np.uint64,
)
"""Odd numbers that make one number of a box: equal boxes have an equal one."""
SHOWN_EXAMPLES = 3
MESSAGE_LENGTH = 300


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault: ``kind`` groups faults, ``example`` names the file and the fault."""

    kind: str
    example: str


@dataclass(frozen=True, slots=True)
class DecodedRecord:
    """A record after its image was decoded: ``digest`` sha256 of the file, ``size``
    upright (width, height); ``error``: why the image can't be decoded.
    """

    record: ImageRecord
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    error: str = ""


def check_datasets(
    addresses: Sequence[str],
    classes: Sequence[str] = (),
    describe: Callable[[str], None] = lambda _: None,
) -> list[Fault]:
    """Return every fault of the splits (``FOLDER`` or ``FOLDER#SPLIT``), each alone and
    all together; decodes every image.

    Of labels that can't be read, only the first file of a folder is named. ``classes``:
    names that will be asked for. ``describe`` is called with a line about each split.
    """
    datasets: dict[str, Dataset] = {}
    faults = []
    for address in addresses:
        try:
            datasets[address] = read_dataset(address)
        except InputError as error:
            faults.append(Fault("can't be read", str(error)))
        else:
            describe(f"{address}: {describe_dataset(datasets[address])}")
    decoded = {
        address: map_in_threads(_decode, dataset.records)
        for address, dataset in datasets.items()
    }
    for address, dataset in datasets.items():
        faults += _split_faults(address, dataset, decoded[address])
    faults += _duplicates(decoded)
    faults += _class_name_faults(datasets.values(), classes)
    return faults


def _decode(record: ImageRecord) -> DecodedRecord:
    raw = storage.read_bytes(record.uri)
    try:
        size, _ = upright_size_and_range(raw)
    except InputError as error:
        return DecodedRecord(record, error=str(error))
    return DecodedRecord(record, hashlib.sha256(raw).hexdigest(), size)


def _split_faults(
    address: str, dataset: Dataset, decoded: Sequence[DecodedRecord]
) -> Iterator[Fault]:
    if not dataset.records:
        yield Fault("no images", address)
    for name in dataset.missing:
        message = f"{address}: {name} is labelled or listed, but not there"
        yield Fault("image missing", message)
    for labels in dataset.unreadable:
        yield Fault("labels with errors", labels.reason)
    for file in dataset.unread_files:
        yield Fault("labels not read", f"{file.uri} looks like {file.layout}")
    for left_out in dataset.left_out:
        if left_out.reason == UNDECODABLE:
            yield Fault("image not read", f"{left_out.uri}: {left_out.reason}")
    for image in decoded:
        if image.error:
            yield Fault("broken image", f"{image.record.uri}: {image.error}")
    usable = [image for image in decoded if image.record.annotated and not image.error]
    records = [image.record for image in usable]
    yield from label_faults(records, [image.size for image in usable])


def label_faults(
    records: Sequence[ImageRecord], sizes: Sequence[tuple[int, int]]
) -> Iterator[Fault]:
    """Find faults of boxes, and labels of another size than the images, whose upright
    ``sizes`` these are.
    """
    for record, (width, height) in zip(records, sizes, strict=True):
        if (record.width, record.height) != (width, height):
            yield Fault(
                "size differs",
                f"{record.uri} is {width} x {height}, its labels say {record.width} x"
                f" {record.height}",
            )
    if not records:
        return
    boxes = np.concatenate([record.boxes for record in records])
    counts = [len(record.labels) for record in records]
    record_rows = np.repeat(np.arange(len(records)), counts)
    box_sizes = np.tile(np.asarray(sizes, np.float64)[record_rows], 2)
    left, top, right, bottom = boxes.T
    is_reversed = (right < left) | (bottom < top)
    is_empty = ((right == left) | (bottom == top)) & ~is_reversed
    excess = np.maximum(boxes - box_sizes, -boxes)
    is_outside = excess.max(1, initial=-np.inf) > TOLERANCE
    boxes_by_kind = {
        "reversed box": is_reversed,
        "empty box": is_empty,
        "box outside its image": is_outside & ~is_reversed,
        "same box twice": _is_repeated(records, record_rows, boxes),
    }
    first_rows = np.cumsum([0, *counts])
    for kind, mask in boxes_by_kind.items():
        for row in np.flatnonzero(mask):
            record_row = record_rows[row]
            record, (width, height) = records[record_row], sizes[record_row]
            label = record.labels[row - first_rows[record_row]]
            box = [round(edge, 1) for edge in boxes[row].tolist()]
            yield Fault(kind, f"{record.uri}: {label} {box} of {width} x {height}")


def _is_repeated(
    records: Sequence[ImageRecord],
    record_rows: NDArray[np.int64],
    boxes: NDArray[np.float64],
) -> NDArray[np.bool_]:
    """Mark boxes [N] that equal an earlier box of the record with the same label."""
    marks = np.zeros(len(boxes), np.bool_)
    bits = (boxes + 0.0).view(np.uint64)  # 0.0 and -0.0 are one number
    hashes = bits @ HASH_FACTORS + record_rows.astype(np.uint64) * HASH_FACTORS[0]
    order = np.argsort(hashes, kind="stable")
    is_same_hash = hashes[order][1:] == hashes[order][:-1]
    candidate_rows = np.unique(record_rows[order][1:][is_same_hash])
    first_rows = np.searchsorted(record_rows, candidate_rows)
    for record_row, first_row in zip(candidate_rows, first_rows, strict=True):
        record = records[record_row]
        earlier: set[tuple[object, ...]] = set()
        labelled_boxes = zip(record.labels, *record.boxes.T.tolist(), strict=True)
        for row, labelled_box in enumerate(labelled_boxes, start=first_row):
            marks[row] = labelled_box in earlier
            earlier.add(labelled_box)
    return marks


def _duplicates(decoded: Mapping[str, Sequence[DecodedRecord]]) -> Iterator[Fault]:
    """Find files with the same bytes, and files listed twice; the same image encoded
    anew is not found.
    """
    first_by_digest: dict[str, tuple[str, str]] = {}
    for address, images in decoded.items():
        for image in images:
            if image.error:
                continue
            uri = image.record.uri
            if image.digest not in first_by_digest:
                first_by_digest[image.digest] = address, uri
                continue
            first_address, first_uri = first_by_digest[image.digest]
            same_split = first_address == address
            kind = "same image twice" if same_split else "same image in two splits"
            yield Fault(kind, f"{uri} is {first_uri}")


def _class_name_faults(
    datasets: Collection[Dataset], classes: Sequence[str]
) -> Iterator[Fault]:
    box_counts = Counter({name: 0 for dataset in datasets for name in dataset.names})
    records = [record for dataset in datasets for record in dataset.records]
    for record in records:
        box_counts.update(record.labels)
    for names in _group_same_names({*box_counts, *classes}):
        if len(names) > 1:
            yield _name_variants_fault(names, box_counts, classes)
    if not any(record.annotated for record in records):
        return
    present = [name for name, count in box_counts.items() if count]
    for name in classes:
        if not any(is_same_class_name(name, other) for other in present):
            known_names = ", ".join(sorted(box_counts)) or "no names"
            message = f"{name!r}; there are {known_names}"
            yield Fault("class without a box", message[:MESSAGE_LENGTH])


def _name_variants_fault(
    names: Sequence[str], box_counts: Mapping[str, int], classes: Sequence[str]
) -> Fault:
    descriptions = []
    for name in names:
        requested = ", asked for" if name in classes else ""
        descriptions.append(f"{name!r} ({box_counts[name]} boxes{requested})")
    return Fault("names differ only in case or plural", ", ".join(descriptions))


def _group_same_names(names: Iterable[str]) -> list[list[str]]:
    """Group names that mean the same class."""
    groups: list[list[str]] = []
    for name in sorted(names):
        for group in groups:
            if any(is_same_class_name(name, other) for other in group):
                group.append(name)
                break
        else:
            groups.append([name])
    return groups


def faults_table(faults: Sequence[Fault]) -> Table:
    """Return a table of the kinds of faults, the most frequent first, with counts and
    examples.
    """
    table = Table(title="What is wrong", title_justify="left", show_lines=True)
    table.add_column("fault")
    table.add_column("count", justify="right")
    table.add_column("examples", overflow="fold")
    for kind, count in Counter(fault.kind for fault in faults).most_common():
        examples = [fault.example for fault in faults if fault.kind == kind]
        lines = examples[:SHOWN_EXAMPLES]
        if count > SHOWN_EXAMPLES:
            lines.append(f"and {count - SHOWN_EXAMPLES} more")
        table.add_row(kind, str(count), escape("\n".join(lines)))
    return table
