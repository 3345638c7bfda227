"""What a run prints about each of its folders, and when it stops because of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from coin_ray.data.formats.record import Dataset, describe_dataset
from coin_ray.data.truth import REPAIRS
from coin_ray.errors import InputError
from coin_ray.stages.reading.folder_images import RejectedImage

SHOWN_NAMES = 3
SHOWN_REASONS = 5


def print_dataset(split: str, address: str, dataset: Dataset) -> None:
    """Print one line of counts of a folder, as it was read."""
    print(f"images: {split} {address}: {describe_dataset(dataset)}", flush=True)


def print_repairs(split: str, repairs: Mapping[str, int]) -> None:
    """Print what was put right in the labels of a split."""
    for repair, count in repairs.items():
        print(f"images: {split}: {count} {REPAIRS[repair]}", flush=True)


def print_other_classes(
    split: str, dataset: Dataset, class_indexes: Mapping[str, int]
) -> None:
    """Print how many boxes are of classes that are none of the run's."""
    others = Counter(
        label
        for record in dataset.records
        for label in record.labels
        if label not in class_indexes
    )
    if others:
        names = ", ".join(name for name, _ in others.most_common(SHOWN_NAMES))
        dots = ", ..." if len(others) > SHOWN_NAMES else ""
        print(
            f"images: {split}: {others.total()} boxes of other classes are not used"
            f" ({names}{dots})",
            flush=True,
        )


def check_left_out(
    setting: str, images: Sequence[RejectedImage], total: int, max_share: float
) -> None:
    """Print how many of the ``total`` images of a folder are left out, and why. Raises
    InputError if they are more than ``max_share`` of them. ``setting``: the option and
    the address of the folder.
    """
    if not images:
        return
    text = f"{len(images)} of {total} images are left out: {describe_left_out(images)}"
    if len(images) > max_share * total:
        raise InputError(
            f"{setting}: {text}. At most data.max_left_out_share={max_share:g} of them"
            " may be"
        )
    print(f"images: {setting}: {text}", flush=True)


def describe_left_out(images: Sequence[RejectedImage]) -> str:
    """Return the reasons by their number, each with an example."""
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for image in images:
        counts[image["reason"]] += 1
        examples.setdefault(image["reason"], image["uri"])
    parts = [
        f"{count} x {reason} (as {examples[reason]})"
        for reason, count in counts.most_common(SHOWN_REASONS)
    ]
    hidden = len(counts) - SHOWN_REASONS
    return "; ".join(parts) + (f"; and {hidden} more reasons" if hidden > 0 else "")
