"""Corrections: images whose labels a person has reviewed, as exports of review tools or
as a labelled folder.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import compress
from typing import Any

from coin_ray import storage
from coin_ray.data.formats import IMAGE_SUFFIXES, read_dataset
from coin_ray.data.formats.folder import DatasetFolder
from coin_ray.data.formats.parsing import image_size
from coin_ray.data.review.cvat import read_cvat
from coin_ray.data.review.fiftyone import is_fiftyone, read_fiftyone
from coin_ray.data.review.label_studio import read_label_studio
from coin_ray.data.review.reviews import Review, ReviewedBox
from coin_ray.data.threads import map_in_threads
from coin_ray.data.truth import REPAIRS, CleanedRecord, check_complete, clean_labels
from coin_ray.errors import InputError

FILE_READERS = {".json": read_label_studio, ".xml": read_cvat, ".zip": read_cvat}
ROUNDING = 1.0
"""Pixels a box may lie outside its image without a word: tools round."""
OUTSIDE_SHARE = 0.05
"""Share of the image's side up to which a box that lies outside is cut at the border."""
MOST_LEFT_OUT = 0.5
"""Share of the reviewed images that may be left out for odd regions."""
SHOWN_PROBLEMS = 5
DIGEST_LENGTH = 16


def read_reviews(address: str) -> list[Review]:
    """Read a JSON export of Label Studio, an export of CVAT (.xml or .zip), a folder
    exported by FiftyOne, or any labelled folder.

    Annotated images of a folder count as reviewed; their ids are those of their bytes.
    Raises InputError for an export that can't be read.
    """
    address = storage.absolute_uri(address)
    reader = FILE_READERS.get(address[address.rfind(".") :].lower())
    if reader is not None and storage.exists(address):
        return reader(address)
    if is_fiftyone(address):
        return read_fiftyone(address)
    return _read_labelled_folder(address)


def _read_labelled_folder(address: str) -> list[Review]:
    """Return the annotated images of a folder, with their labels cleaned as a run cleans
    those it is measured by.
    """
    dataset = read_dataset(address)
    check_complete(dataset, address)
    records = [record for record in dataset.records if record.annotated]
    sizes = map_in_threads(image_size, [record.uri for record in records])
    readable = [all(size) for size in sizes]
    cleaned = clean_labels(
        list(compress(records, readable)), list(compress(sizes, readable))
    )
    unreadable = [
        Review("", "", labels.uri, 0, 0, reviewed=True, problems=(labels.reason,))
        for labels in dataset.unreadable
    ]
    return [*map_in_threads(_review_of_record, cleaned), *unreadable]


def _review_of_record(cleaned: CleanedRecord) -> Review:
    record, boxes = cleaned.record, []
    rows = zip(record.boxes.tolist(), record.labels, record.difficult, strict=True)
    for (x1, y1, x2, y2), label, difficult in rows:
        if not difficult:
            boxes.append(ReviewedBox((x1, y1, x2, y2), label))
    return Review(
        hashlib.sha256(storage.read_bytes(record.uri)).hexdigest(),
        record.uri,
        record.file,
        record.width,
        record.height,
        tuple(boxes),
        reviewed=True,
        changes=tuple(
            f"{count} {REPAIRS[repair]}" for repair, count in cleaned.repairs.items()
        ),
    )


def reviews_digest(address: str) -> str:
    """Return sixteen hex digits that change with what ``read_reviews`` would return; of
    images in a folder names and sizes count. Empty if ``address`` does not exist.
    """
    address = storage.absolute_uri(address)
    try:
        if address.lower().endswith(tuple(FILE_READERS)):
            return storage.sha256(address)[:DIGEST_LENGTH]
        folder = DatasetFolder.open(address)
    except (OSError, InputError):
        return ""
    digest = hashlib.sha256(folder.split.encode())
    sizes = storage.file_sizes(folder.root)
    size_by_path = {name.strip("/"): size for name, size in sizes.items()}
    for path, uri in sorted(folder.uris.items()):
        is_image = path.lower().endswith(IMAGE_SUFFIXES)
        bare_uri = uri.rpartition("://")[2].strip("/")
        version = str(size_by_path[bare_uri]) if is_image else storage.sha256(uri)
        digest.update(f"{path}\0{version}\0".encode())
    return digest.hexdigest()[:DIGEST_LENGTH]


def correction_rows(
    reviews: Iterable[Review],
    images: Mapping[str, Mapping[str, Any]],
    indexes: Mapping[str, int],
    source: str,
    tell: Callable[[str], object] = print,
    splits: Collection[str] = ("train",),
) -> list[dict[str, Any]]:
    """Return rows ``image_id``, ``boxes`` (within the image), ``labels`` of the
    reviewed images.

    ``images``: rows of ``tables.IMAGES`` by id. ``indexes``: number of the class by
    name. ``source``: name of the corrections in messages. ``splits``: splits of the run
    whose images may be corrected. An image with a region that
    can't be used is left out; such images, and boxes that were put right, are passed
    to ``tell``. Raises InputError naming the reviews that do not fit the run, and if
    more than ``MOST_LEFT_OUT`` of the reviewed images are left out.
    """
    corrections = _Corrections(images, indexes, splits)
    for review in reviews:
        if review.reviewed:
            corrections.add(review)
    corrections.check(source)
    corrections.report(source, tell)
    return list(corrections.rows.values())


class _Corrections:
    """Rows of the reviews so far by image id, and why others can't be used."""

    def __init__(
        self,
        images: Mapping[str, Mapping[str, Any]],
        indexes: Mapping[str, int],
        splits: Collection[str],
    ) -> None:
        self._images = images
        self._indexes = indexes
        self._splits = splits
        self._id_of_uri = {image.get("uri"): key for key, image in images.items()}
        self._ids: set[str] = set()
        self._misfits: list[str] = []
        self._left_out: list[str] = []
        self._changes: list[str] = []
        self._reviewed_count = self._left_out_count = 0
        self.rows: dict[str, dict[str, Any]] = {}

    def add(self, review: Review) -> None:
        """Add the row of a reviewed image, or the reasons why it has none."""
        self._reviewed_count += 1
        problems = [f"{review.name}: {problem}" for problem in review.problems]
        if review.image_id:
            misfits = self._find_misfits(review)
            self._ids.add(review.image_id)
            self._misfits += misfits
            if not misfits:
                problems += _box_problems(review, self._indexes)
        if problems:
            self._left_out_count += 1
            self._left_out += problems
        elif review.image_id in self._images:
            row, row_changes = _row(review, self._indexes)
            self.rows[review.image_id] = row
            self._changes += [f"{review.name}: {change}" for change in review.changes]
            self._changes += row_changes

    def _find_misfits(self, review: Review) -> list[str]:
        misfits = _misfits(review, self._images.get(review.image_id), self._splits)
        if self._id_of_uri.get(review.uri, review.image_id) != review.image_id:
            misfits.append(_describe_exchange(review, review.uri))
        if review.image_id in self._ids:
            misfits.append(f"{review.name} is in it twice")
        return misfits

    def check(self, source: str) -> None:
        """Raise InputError if the reviews are not of this run, or too few are usable."""
        is_too_much = self._left_out_count > MOST_LEFT_OUT * self._reviewed_count
        if self._misfits or is_too_much:
            problems = _first_few([*self._misfits, *self._left_out])
            if is_too_much and not self._misfits:
                problems += f"; {self._describe_left_out()} can't be used"
            raise InputError(f"corrections {source}: {problems}")
        if not self.rows:
            raise InputError(
                f"corrections {source}: no image in it is marked as reviewed"
                " (docs/own-data.md says how)"
            )

    def report(self, source: str, tell: Callable[[str], object]) -> None:
        """Tell which images were left out, and which labels were put right."""
        if self._left_out:
            tell(
                f"corrections {source}: {self._describe_left_out()} are left out, the"
                f" teachers' labels hold there: {_first_few(self._left_out)}"
            )
        if self._changes:
            tell(
                f"corrections {source}: {len(self._changes)} labels were put right or"
                f" selected: {_first_few(self._changes)}"
            )

    def _describe_left_out(self) -> str:
        return f"{self._left_out_count} of {self._reviewed_count} reviewed images"


def _first_few(messages: Sequence[str]) -> str:
    listed = "; ".join(messages[:SHOWN_PROBLEMS])
    hidden_count = len(messages) - SHOWN_PROBLEMS
    return f"{listed}; and {hidden_count} more" if hidden_count > 0 else listed


def _misfits(
    review: Review, image: Mapping[str, Any] | None, splits: Collection[str]
) -> list[str]:
    """Return why a review does not belong to the run, whatever its boxes are."""
    if image is None:
        return [
            f"{review.name} is no image of this run: expected one of its training"
            " images, as the run read them"
        ]
    expected_name = str(image.get("uri", "")).rpartition("/")[2]
    if not review.uri and review.name.rpartition("/")[2] not in ("", expected_name):
        return [_describe_exchange(review, "(none)")]
    if image["split"] not in splits:
        return [
            f"{review.name} is a {image['split']} image of this run; only training"
            " images can be corrected"
        ]
    size = image["width"], image["height"]
    if min(review.width, review.height) > 0 and (review.width, review.height) != size:
        return [
            f"{review.name} is {size[0]} x {size[1]}, its corrections are for"
            f" {review.width} x {review.height}"
        ]
    return []


def _describe_exchange(review: Review, uri: str) -> str:
    return (
        f"{review.name} has the image_id of another image than its uri {uri}: expected"
        " both as coin_ray wrote them"
    )


def _box_problems(review: Review, indexes: Mapping[str, int]) -> list[str]:
    problems = [
        f"{review.name} has a {name!r}, which is no class of this run"
        for name in sorted({box.label for box in review.boxes} - indexes.keys())
    ]
    for box in review.boxes:
        if problem := _box_problem(box, (review.width, review.height)):
            problems.append(f"{review.name}: {_describe(box)} {problem}")
    return problems


def _describe(box: ReviewedBox) -> str:
    return f"the box {box.label} {[round(edge, 1) for edge in box.edges]}"


def _box_problem(box: ReviewedBox, size: tuple[int, int]) -> str:
    """Return why a box can't be used; empty if it can."""
    if not all(math.isfinite(edge) for edge in box.edges):
        return "has an edge that is not a finite number"
    edges = _order_edges(box.edges)
    overhang = _overhang(edges, size)
    limits = [max(ROUNDING, OUTSIDE_SHARE * side) for side in size]
    if overhang[0] > limits[0] or overhang[1] > limits[1]:
        return f"is not inside the image of {size[0]} x {size[1]}"
    x1, y1, x2, y2 = _clip_edges(edges, size)
    if x2 <= x1 or y2 <= y1:
        return "has no area"
    return ""


def _order_edges(edges: Sequence[float]) -> list[float]:
    x1, y1, x2, y2 = edges
    return [min(x1, x2), min(y1, y2), max(x1, x2), max(y1, y2)]


def _overhang(edges: Sequence[float], size: tuple[int, int]) -> tuple[float, float]:
    """Return the pixels that ordered edges lie outside the image, in x and y."""
    x1, y1, x2, y2 = edges
    return max(-x1, x2 - size[0], 0.0), max(-y1, y2 - size[1], 0.0)


def _row(
    review: Review, indexes: Mapping[str, int]
) -> tuple[dict[str, Any], list[str]]:
    """Return the row of a review whose boxes can be used, and what was put right."""
    size = review.width, review.height
    changes: list[str] = []
    objects: dict[tuple[tuple[float, ...], int], None] = {}
    for box in review.boxes:
        edges = _order_edges(box.edges)
        description = f"{review.name}: {_describe(box)}"
        if edges != list(box.edges):
            changes.append(f"{description} had its edges the other way round")
        if max(_overhang(edges, size)) > ROUNDING:
            changes.append(f"{description} was cut at the border of the image")
        key = tuple(_clip_edges(edges, size)), indexes[box.label]
        if key in objects:
            changes.append(f"{description} is there twice and counts once")
        objects[key] = None
    row = {
        "image_id": review.image_id,
        "boxes": [list(edges) for edges, _ in objects],
        "labels": [label for _, label in objects],
    }
    return row, changes


def _clip_edges(edges: Sequence[float], size: tuple[int, int]) -> list[float]:
    limits = (*size, *size)
    return [
        min(max(edge, 0.0), float(limit))
        for edge, limit in zip(edges, limits, strict=True)
    ]
