"""The parts of a collection: which of their rows count, and the tables that are made of
them, a block of rows at a time.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from coin_ray import storage, tables
from coin_ray.cloud.protocol import BoxCounts
from coin_ray.errors import StepError
from coin_ray.runs.failed_images import has_error, is_final

PART_SCHEMA = (
    tables.DETECTIONS.append(pa.field("clip_probs", tables.VECTORS))
    .append(pa.field("calls", pa.int32()))
    .append(pa.field("score_kind", pa.string()))
    .append(pa.field("teachers", pa.list_(pa.string())))
)
INDEX_SCHEMA = pa.schema(
    [
        PART_SCHEMA.field(name)
        for name in ("image_id", "status", "calls", "cost_usd", "error")
    ]
)
"""Columns that are in memory for all rows."""
ANSWERED = pa.array(["ok", "cached", "empty"])
MERGE_BLOCK_ROWS = 4 * storage.BLOCK_ROWS
"""Rows that are put in order at once."""
BOX_COUNTS = "box_counts"
"""Key of a part's metadata: the counts of boxes by image id, as JSON (``BoxCounts``)."""
MAX_ERRORS = 10
"""Different errors that the metrics name."""


class MergedCounts(NamedTuple):
    """Counts of a merged collection. ``calls`` and ``usd``: of the rows of all parts.
    ``cached`` and ``failed``: images. ``empty``: answers without boxes.
    ``answered_in_part``: images that some of several clouds answered.
    ``answered_by``: images by cloud.
    """

    calls: int
    usd: float
    cached: int
    failed: int
    empty: int
    boxes: int
    answered_in_part: int
    errors: list[str]
    answered_by: dict[str, int]


class CollectedParts:
    """The parts below some folders. Rows are numbered through all parts, in the order of
    the folders and of the parts' names.

    The columns of ``INDEX_SCHEMA`` are in memory, the detections are not.
    """

    def __init__(self, *folders: str) -> None:
        files_by_folder = [storage.list_files(folder, ".parquet") for folder in folders]
        self.files = [file for files in files_by_folder for file in files]
        part_indexes = storage.read_tables(self.files, INDEX_SCHEMA.names)
        part_sizes = [part.num_rows for part in part_indexes]
        self.box_counts = _read_box_counts(part_indexes)
        """By image id, for images with boxes that are not used as they came."""
        self.part_ends: NDArray[np.int64] = np.array(part_sizes, np.int64).cumsum()
        self.part_sizes = np.array(part_sizes, np.int64)
        self.index = pa.concat_tables(
            [INDEX_SCHEMA.empty_table(), *part_indexes], promote_options="default"
        ).combine_chunks()
        failed = pc.is_in(self.index["status"], value_set=tables.FAILED_STATUSES)
        self.failed: NDArray[np.bool_] = failed.to_numpy().astype(bool)
        with_error = has_error(self.index["error"]).to_numpy().astype(bool)
        self.partial: NDArray[np.bool_] = with_error & ~self.failed
        """Rows that some of several clouds answered."""
        folder_of_part = np.repeat(
            np.arange(len(folders)), [len(files) for files in files_by_folder]
        )
        self.folder_of_row = np.repeat(folder_of_part, self.part_sizes)

    @property
    def answered_ids(self) -> pa.ChunkedArray:
        """Ids of the images that have a final answer."""
        return self.index["image_id"].filter(pa.array(~self.failed))

    @property
    def refused_ids(self) -> pa.ChunkedArray:
        """Ids of the images that failed in a way that asking again would not change."""
        rows = [
            int(row)
            for row in np.flatnonzero(self.failed)
            if is_final(self.index["error"][int(row)].as_py() or "")
        ]
        return self.index["image_id"].take(pa.array(rows, pa.int64()))

    def settled_ids(self, *, retry_refused: bool, every_cloud: bool) -> pa.ChunkedArray:
        """Return the ids of the images that are not asked about again.

        ``retry_refused``: those that were refused are; ``every_cloud``: those that only
        some of several clouds answered are, unless the others refused them.
        """
        is_open = self.failed | self.partial if every_cloud else self.failed.copy()
        if not retry_refused:
            for row in np.flatnonzero(is_open):
                is_open[row] = not is_final(self.index["error"][int(row)].as_py() or "")
        return self.index["image_id"].filter(pa.array(~is_open))

    @property
    def image_ids(self) -> pa.Array:
        """Ids of all images, in the order of their first rows."""
        return self.index["image_id"].unique()

    def select_rows(self, image_ids: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """Return the row of each image that counts: the first that is no failure, or
        else the last; in one folder rather one that all clouds answered. Raises
        StepError if an image has none.
        """
        positions = pc.index_in(self.index["image_id"], value_set=image_ids)
        position_of_row = positions.fill_null(-1).to_numpy()
        rows = np.flatnonzero(position_of_row >= 0)
        # of several rows of an image the last assignment stays
        by_priority = np.concatenate([rows[self.failed[rows]], self._by_priority(rows)])
        selected = np.full(len(image_ids), -1)
        selected[position_of_row[by_priority]] = by_priority
        missing = int((selected < 0).sum())
        if missing:
            first_missing = image_ids[int(selected.argmin())]
            raise StepError(
                f"{missing} images have no answer, the first {first_missing}: run the"
                " same command again to ask about them"
            )
        return selected

    def _by_priority(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return those of the rows that have an answer, the ones that count last."""
        answered = rows[~self.failed[rows]][::-1]
        order = np.lexsort((~self.partial[answered], -self.folder_of_row[answered]))
        by_priority: NDArray[np.int64] = answered[order]
        return by_priority

    def read_blocks(self, rows: NDArray[np.int64]) -> Iterator[pa.Table]:
        """Yield these rows in this order, ``MERGE_BLOCK_ROWS`` at a time, with the columns of
        ``PART_SCHEMA``.
        """
        for start in range(0, len(rows), MERGE_BLOCK_ROWS):
            yield self._read_rows(rows[start : start + MERGE_BLOCK_ROWS])

    def _read_rows(self, rows: NDArray[np.int64]) -> pa.Table:
        part_of_row = np.searchsorted(self.part_ends, rows, side="right")
        part_numbers, read_number = np.unique(part_of_row, return_inverse=True)
        parts = storage.read_tables([self.files[number] for number in part_numbers])
        concatenated = pa.concat_tables(
            [PART_SCHEMA.empty_table(), *parts],
            promote_options="default",  # a part of an older version lacks columns
        )
        # a row's number counts all parts, but only some of them were read
        read_ends = self.part_sizes[part_numbers].cumsum()
        shifts = (read_ends - self.part_ends[part_numbers])[read_number]
        table = concatenated.select(PART_SCHEMA.names).combine_chunks()
        return table.take(rows + shifts).cast(PART_SCHEMA)


def box_counts_metadata(answers: pa.Table) -> dict[str, str]:
    """Return the metadata of a part with the column ``box_counts`` by image id."""
    counts = {
        row["image_id"]: json.loads(row["box_counts"])
        for row in answers.select(["image_id", "box_counts"]).to_pylist()
        if row["box_counts"] is not None
    }
    return {BOX_COUNTS: json.dumps(counts)} if counts else {}


def _read_box_counts(parts: Sequence[pa.Table]) -> dict[str, BoxCounts]:
    """Return the counts by image id; of several for an image the first."""
    box_counts: dict[str, BoxCounts] = {}
    for part in parts:
        metadata = part.schema.metadata or {}
        by_image = json.loads(metadata.get(BOX_COUNTS.encode(), b"{}"))
        for image_id, counts in by_image.items():
            box_counts.setdefault(image_id, BoxCounts(**counts))
    return box_counts


def merge_parts(
    parts: CollectedParts,
    image_ids: pa.Array | pa.ChunkedArray,
    folder: str,
    num_classes: int | None,
) -> MergedCounts:
    """Write ``cloud.parquet``: one row per image, in the images' order. With CLIP's
    probabilities, of so many classes, write ``clip_labels.parquet`` too.
    """
    counts: Counter[str] = Counter()
    errors: set[str] = set()
    answered_by: Counter[str] = Counter()
    with ExitStack() as files:
        cloud_writer = files.enter_context(_detections_writer(folder, "cloud"))
        clip_writer = None
        if num_classes is not None:
            clip_writer = files.enter_context(_detections_writer(folder, "clip_labels"))
        for block in parts.read_blocks(parts.select_rows(image_ids)):
            cloud_writer.write(block.select(tables.DETECTIONS.names))
            if clip_writer is not None and num_classes is not None:
                clip_writer.write(clip_label_table(block, num_classes))
            counts += _count_rows(block)
            errors = _first_errors(errors, block["error"])
            answered_by += _count_values(pc.list_flatten(block["teachers"]))
    return MergedCounts(
        calls=pc.sum(parts.index["calls"]).as_py() or 0,
        usd=round(pc.sum(parts.index["cost_usd"]).as_py() or 0, 6),
        cached=counts["cached"],
        failed=counts["error"],
        empty=counts["without boxes"],
        boxes=counts["boxes"],
        answered_in_part=counts["in part"],
        errors=sorted(errors),
        answered_by=dict(answered_by),
    )


def _detections_writer(
    folder: str, name: str
) -> AbstractContextManager[storage.TableWriter]:
    uri = storage.join(folder, f"{name}.parquet")
    return storage.table_writer(uri, tables.DETECTIONS)


def _first_errors(errors: set[str], column: pa.ChunkedArray) -> set[str]:
    """Return the first ``MAX_ERRORS`` different errors, in alphabetical order."""
    new_errors = [error for error in column.drop_null().unique().to_pylist() if error]
    return set(sorted(errors.union(new_errors))[:MAX_ERRORS])


def _count_rows(block: pa.Table) -> Counter[str]:
    """Count rows by status, their boxes, and the answers without boxes."""
    box_counts = pc.list_value_length(block["boxes"]).to_numpy()
    answered = pc.is_in(block["status"], value_set=ANSWERED).to_numpy()
    with_error = has_error(block["error"]).to_numpy()
    without_boxes = answered & (box_counts == 0)
    box_totals = {
        "boxes": int(box_counts.sum()),
        "without boxes": int(without_boxes.sum()),
        "in part": int((answered & with_error).sum()),
    }
    return _count_values(block["status"]) + Counter(box_totals)


def _count_values(column: pa.ChunkedArray) -> Counter[str]:
    pairs = pc.value_counts(column)
    return Counter({pair["values"].as_py(): pair["counts"].as_py() for pair in pairs})


def clip_label_table(block: pa.Table, num_classes: int) -> pa.Table:
    """Return ``DETECTIONS`` with CLIP's best foreground class of each cloud box in rows
    of parts; the probabilities keep the background column.
    """
    vectors = block["clip_probs"].combine_chunks()
    probs = vectors.flatten().flatten().to_numpy().reshape(-1, num_classes + 1)
    class_probs = probs[:, :-1]
    labels: NDArray[np.int64] = np.zeros(0, np.int64)
    if len(probs):
        labels = class_probs.argmax(1)
    boxes = block["boxes"].combine_chunks()
    box_counts = pc.list_value_length(boxes).to_numpy()
    offsets = pa.array(np.concatenate([[0], box_counts.cumsum()]).astype(np.int32))
    rows = len(block)
    columns = {
        "image_id": block["image_id"],
        "boxes": boxes,
        "scores": _list_column(offsets, class_probs.max(1, initial=0), "scores"),
        "labels": _list_column(offsets, labels, "labels"),
        "probs": vectors,
        "prob_source": _list_column(offsets, ["native"] * len(probs), "prob_source"),
        "source": pa.repeat("clip_labels", rows),
        "status": block["status"],
        "attempts": pa.repeat(pa.scalar(0, pa.int32()), rows),
        "latency_ms": pa.repeat(pa.scalar(0.0, pa.float32()), rows),
        "cost_usd": pa.repeat(0.0, rows),
        "error": pa.nulls(rows, pa.string()),
    }
    return pa.table(columns, schema=tables.DETECTIONS)


def _list_column(
    offsets: pa.Array,
    elements: NDArray[np.float32] | NDArray[np.int64] | Sequence[str],
    name: str,
) -> pa.ListArray:
    """Return a column of ``DETECTIONS`` with one element for each box."""
    list_type = tables.DETECTIONS.field(name).type
    return pa.ListArray.from_arrays(
        offsets, pa.array(elements, list_type.value_type), list_type
    )
