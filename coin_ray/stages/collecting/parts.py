"""The parts of a collection: which of their rows count, and the tables that are made of
them, a block of rows at a time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from coin_ray import storage, tables
from coin_ray.errors import StepError

PART_SCHEMA = (
    tables.DETECTIONS.append(pa.field("clip_probs", tables.VECTORS))
    .append(pa.field("calls", pa.int32()))
    .append(pa.field("score_kind", pa.string()))
    .append(pa.field("teachers", pa.list_(pa.string())))
)
LISTED = pa.schema(
    [PART_SCHEMA.field(name) for name in ("image_id", "status", "calls", "cost_usd")]
)
ANSWERED = pa.array(["ok", "cached", "empty"])
BLOCK = 4 * storage.BLOCK_ROWS
"""Rows that are put in order at once."""
ERRORS = 10
"""Different errors that the metrics name."""


class CollectedParts:
    """What lies below some folders. Rows are numbered through all parts, in the order
    of the folders and of the parts' names.

    In memory are the ids, the states and the costs, not what was detected.
    """

    def __init__(self, *folders: str) -> None:
        self.files = [
            file
            for folder in folders
            for file in storage.list_files(folder, ".parquet")
        ]
        read = storage.read_tables(self.files, LISTED.names)
        self.sizes = np.array([part.num_rows for part in read], np.int64)
        self.listed = pa.concat_tables(
            [LISTED.empty_table(), *read], promote_options="default"
        ).combine_chunks()
        self.failed: NDArray[np.bool_] = (
            pc.is_in(self.listed["status"], value_set=tables.FAILED_STATUSES)
            .to_numpy()
            .astype(bool)
        )

    @property
    def answered(self) -> pa.ChunkedArray:
        """Ids of the images that have a final answer."""
        return self.listed["image_id"].filter(pa.array(~self.failed))

    @property
    def images(self) -> pa.Array:
        """Ids of all images, in the order of their first rows."""
        return self.listed["image_id"].unique()

    def counting(self, images: pa.Array | pa.ChunkedArray) -> NDArray[np.int64]:
        """For each image the row that counts: the first that is no failure, or else the
        last. Raises StepError if one has none.
        """
        place = (
            pc.index_in(self.listed["image_id"], value_set=images)
            .fill_null(-1)
            .to_numpy()
        )
        rows = np.flatnonzero(place >= 0)
        ascending = np.concatenate(
            [rows[self.failed[rows]], rows[~self.failed[rows]][::-1]]
        )
        found = np.full(len(images), -1)
        # of several rows of an image the last one stays
        found[place[ascending]] = ascending
        if missing := int((found < 0).sum()):
            raise StepError(
                f"{missing} images have no answer, the first"
                f" {images[int(found.argmin())]}: run again, and they are asked"
            )
        return found

    def blocks(self, rows: NDArray[np.int64]) -> Iterator[pa.Table]:
        """These rows in this order, ``BLOCK_ROWS`` at a time, with the columns of ``PART_SCHEMA``."""
        for start in range(0, len(rows), BLOCK):
            yield self._take(rows[start : start + BLOCK])

    def _take(self, rows: NDArray[np.int64]) -> pa.Table:
        ends = self.sizes.cumsum()
        chosen, where = np.unique(
            np.searchsorted(ends, rows, side="right"), return_inverse=True
        )
        read = pa.concat_tables(
            [PART_SCHEMA.empty_table(), *storage.read_tables([self.files[n] for n in chosen])],
            promote_options="default",  # a part of an older version lacks columns
        )
        moved = (self.sizes[chosen].cumsum() - ends[chosen])[where]
        return read.select(PART_SCHEMA.names).combine_chunks().take(rows + moved).cast(PART_SCHEMA)


def merge_parts(
    parts: CollectedParts, images: pa.Array | pa.ChunkedArray, folder: str, classes: int | None
) -> dict[str, Any]:
    """Write ``cloud.parquet``, and with CLIP's opinion of so many ``classes``
    ``clip_labels.parquet``: one row per image, in the images' order.

    Returns what collection counts.
    """
    counts: Counter[str] = Counter()
    errors: set[str] = set()
    answered_by: Counter[str] = Counter()
    with ExitStack() as files:
        cloud = files.enter_context(
            storage.table_writer(
                storage.join(folder, "cloud.parquet"), tables.DETECTIONS
            )
        )
        clip = None
        if classes is not None:
            clip = files.enter_context(
                storage.table_writer(
                    storage.join(folder, "clip_labels.parquet"), tables.DETECTIONS
                )
            )
        for rows in parts.blocks(parts.counting(images)):
            cloud.write(rows.select(tables.DETECTIONS.names))
            if clip is not None and classes is not None:
                clip.write(clip_opinions(rows, classes))
            counts += _counted(rows)
            errors = set(
                sorted(
                    errors.union(
                        e for e in rows["error"].drop_null().unique().to_pylist() if e
                    )
                )[:ERRORS]
            )
            answered_by += _values(pc.list_flatten(rows["teachers"]))
    return {
        "calls": {
            "made": pc.sum(parts.listed["calls"]).as_py() or 0,
            "cached": counts["cached"],
            "failed": counts["error"],
            "cost_usd": round(pc.sum(parts.listed["cost_usd"]).as_py() or 0, 6),
        },
        "empty": counts["without boxes"],
        "boxes": counts["boxes"],
        "errors": sorted(errors),
        "answered_by": dict(answered_by),
    }


def _counted(rows: pa.Table) -> Counter[str]:
    """Rows by status, their boxes, and the answers without boxes."""
    boxes = pc.list_value_length(rows["boxes"]).to_numpy()
    answered = pc.is_in(rows["status"], value_set=ANSWERED).to_numpy()
    return _values(rows["status"]) + Counter(
        {
            "boxes": int(boxes.sum()),
            "without boxes": int((answered & (boxes == 0)).sum()),
        }
    )


def _values(column: pa.ChunkedArray) -> Counter[str]:
    return Counter(
        {
            pair["values"].as_py(): pair["counts"].as_py()
            for pair in pc.value_counts(column)
        }
    )


def clip_opinions(rows: pa.Table, classes: int) -> pa.Table:
    """CLIP's best foreground class of each cloud box in rows of parts; probabilities
    keep the background column.
    """
    vectors = rows["clip_probs"].combine_chunks()
    probs = vectors.flatten().flatten().to_numpy().reshape(-1, classes + 1)
    boxes = rows["boxes"].combine_chunks()
    ends = np.concatenate(
        [[0], pc.list_value_length(boxes).to_numpy().cumsum()]
    ).astype(np.int32)

    def for_each_box(
        values: Sequence[Any] | NDArray[Any] | pa.Array, name: str
    ) -> pa.Array:
        kind = tables.DETECTIONS.field(name).type
        return pa.ListArray.from_arrays(
            pa.array(ends), pa.array(values, kind.value_type), kind
        )

    columns = {
        "image_id": rows["image_id"],
        "boxes": boxes,
        "scores": for_each_box(probs[:, :-1].max(1, initial=0), "scores"),
        "labels": for_each_box(
            probs[:, :-1].argmax(1) if len(probs) else probs[:0, 0], "labels"
        ),
        "probs": vectors,
        "prob_source": for_each_box(["native"] * len(probs), "prob_source"),
        "source": pa.repeat("clip_labels", len(rows)),
        "status": rows["status"],
        "attempts": pa.repeat(pa.scalar(0, pa.int32()), len(rows)),
        "latency_ms": pa.repeat(pa.scalar(0.0, pa.float32()), len(rows)),
        "cost_usd": pa.repeat(0.0, len(rows)),
        "error": pa.nulls(len(rows), pa.string()),
    }
    return pa.table(columns, schema=tables.DETECTIONS)
