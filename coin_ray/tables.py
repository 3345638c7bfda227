"""Arrow schemas of every table, and ``Detections`` to and from Arrow. One row per
image, so empty images survive.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from coin_ray.storage import BLOCK_ROWS, open_table, stream_table
from coin_ray.structures import Detections

T = TypeVar("T")

BOXES = pa.list_(pa.list_(pa.float32(), 4))
VECTORS = pa.list_(pa.list_(pa.float32()))
LABELS = pa.list_(pa.int64())
NO_LABEL = -1
"""The name that nobody gave."""

IMAGES = pa.schema(
    [
        ("image_id", pa.string()),  # sha256 of the file's bytes
        ("uri", pa.string()),
        ("width", pa.int32()),  # upright
        ("height", pa.int32()),
        ("split", pa.string()),  # train, val, test
    ]
)
ANNOTATIONS = pa.schema(
    [
        ("image_id", pa.string()),
        ("boxes", BOXES),
        ("labels", LABELS),
        ("difficult", pa.list_(pa.bool_())),
    ]
)
DETECTIONS = pa.schema(
    [
        ("image_id", pa.string()),
        ("boxes", BOXES),
        ("scores", pa.list_(pa.float32())),
        ("labels", LABELS),
        ("probs", VECTORS),  # rows of K+1, background last
        # how each row of probs came about: coin_ray.cloud.probabilities
        ("prob_source", pa.list_(pa.string())),
        ("source", pa.string()),  # cloud, clip_labels, clip_detector, student, ...
        ("status", pa.string()),  # ok, cached, empty, error, skipped_budget
        ("attempts", pa.int32()),
        ("latency_ms", pa.float32()),
        ("cost_usd", pa.float64()),
        ("error", pa.string()),
    ]
)
SEPARATION = pa.schema(
    [
        ("image_id", pa.string()),
        ("boxes", BOXES),  # the box that stands for the pair, or the private box
        # consistent, inconsistent, private; reviewed: a person's box
        ("kind", pa.list_(pa.string())),
        # the names that were compared; the best entry of an unsure vector may be
        # background all the same
        ("cloud_labels", LABELS),
        # K: CLIP's verdict is background; NOBODY for private boxes
        ("clip_labels", LABELS),
        # of a private box, as its name: of the one teacher that saw it
        ("cloud_probs", VECTORS),
        ("clip_probs", VECTORS),  # all zeros for private boxes
    ]
)
FAILED_STATUSES = pa.array(["error", "skipped_budget"])
"""Values of ``status`` of images without an answer."""


class TableBuilder:
    """A table that grows row by row. Only its last ones are Python objects: those take
    nine times the memory.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema, self.blocks = schema, [schema.empty_table()]
        self.last: list[Mapping[str, Any]] = []

    def append(self, row: Mapping[str, Any]) -> None:
        self.last.append(row)
        if len(self.last) == BLOCK_ROWS:
            self.blocks, self.last = (
                [
                    *self.blocks,
                    pa.Table.from_pylist(self.last, schema=self.schema),
                ],
                [],
            )

    def table(self) -> pa.Table:
        return pa.concat_tables(
            [*self.blocks, pa.Table.from_pylist(self.last, schema=self.schema)]
        )


def iterate_tables(
    rows: Iterable[Mapping[str, Any]], schema: pa.Schema
) -> Iterator[pa.Table]:
    """Rows as tables of ``BLOCK_ROWS`` rows, while they come."""
    coming = iter(rows)
    while some := list(islice(coming, BLOCK_ROWS)):
        yield pa.Table.from_pylist(some, schema=schema)


def stream_rows(
    uri: str, images: pa.Array | pa.ChunkedArray, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet file that are about these images, by their ids; in the file's
    order.
    """
    for block in stream_table(uri, columns):
        yield from block.filter(
            pc.is_in(block["image_id"], value_set=images)
        ).to_pylist()


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where one image's detections come from; the columns of a ``DETECTIONS`` row
    beside the detections themselves.
    """

    source: str
    status: str = "ok"
    attempts: int = 0
    latency_ms: float = 0.0
    cost_usd: float = 0.0
    error: str | None = None


def detections_row(
    image_id: str,
    detections: Detections,
    provenance: Provenance,
    prob_source: Sequence[str] | None = None,
) -> dict[str, object]:
    """One row of a ``DETECTIONS`` table. ``prob_source`` [N]; None: our own models,
    which score every class.
    """
    return {
        "image_id": image_id,
        "boxes": detections.boxes.tolist(),
        "scores": detections.scores.tolist(),
        "labels": detections.labels.tolist(),
        "probs": detections.probs.tolist(),
        "prob_source": (
            ["native"] * len(detections) if prob_source is None else list(prob_source)
        ),
        "source": provenance.source,
        "status": provenance.status,
        "attempts": provenance.attempts,
        "latency_ms": provenance.latency_ms,
        "cost_usd": provenance.cost_usd,
        "error": provenance.error,
    }


def detections_table(rows: Sequence[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=DETECTIONS)


DETECTION_COLUMNS = ("image_id", "boxes", "scores", "labels", "probs", "status")
"""Columns that make ``Detections``."""


class TableByImage(Mapping[str, T]):
    """Some rows of a table by their ``image_id``; what a row says is made when it is
    asked for.
    """

    def __init__(self, table: pa.Table, counts: NDArray[np.bool_]) -> None:
        self.table, self.names = table, table["image_id"]
        self.rows: NDArray[np.int64] = np.flatnonzero(counts)
        by_name = pc.sort_indices(self.names).to_numpy()
        self.order = by_name[counts[by_name]].astype(np.int32)

    @abstractmethod
    def made(self, row: int) -> T:
        """What a row of the table says."""

    @property
    def ids(self) -> pa.ChunkedArray:
        """The image ids, in the table's order."""
        return self.names.take(pa.array(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return (self._name(row) for row in self.rows)

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, str) and self._row(image_id) is not None

    def __getitem__(self, image_id: str) -> T:
        row = self._row(image_id)
        if row is None:
            raise KeyError(image_id)
        return self.made(row)

    def _name(self, row: int) -> str:
        return str(self.names[int(row)].as_py())

    def _row(self, image_id: str) -> int | None:
        """Found by halves: an index of the names themselves would take more memory than
        a small answer.
        """
        place = bisect_left(self.order, image_id, key=self._name)
        found = int(self.order[place]) if place < len(self.order) else None
        return found if found is not None and self._name(found) == image_id else None


class DetectionsTable(TableByImage[Detections]):
    """Detections by ``image_id``; rows with an error are left out, rows without objects
    are not.

    With a ``uri`` it goes to other processes by reference.
    """

    def __init__(
        self, table: pa.Table, num_classes: int, uri: str | None = None
    ) -> None:
        failed = pc.is_in(table["status"], value_set=FAILED_STATUSES).to_numpy()
        super().__init__(table.select(DETECTION_COLUMNS), ~failed.astype(bool))
        self.num_classes, self.uri = num_classes, uri
        self.columns = [self.table[name] for name in DETECTION_COLUMNS[1:5]]

    def __reduce__(self) -> tuple[Any, ...]:
        return (
            (DetectionsTable, (self.table, self.num_classes))
            if self.uri is None
            else (open_detections, (self.uri, self.num_classes))
        )

    def made(self, row: int) -> Detections:
        boxes, scores, labels, probs = (column[row].values for column in self.columns)
        return Detections(
            boxes=_tensor(boxes.flatten(), torch.float32).reshape(-1, 4),
            scores=_tensor(scores, torch.float32),
            labels=_tensor(labels, torch.int64),
            probs=_tensor(probs.flatten(), torch.float32).reshape(
                -1, self.num_classes + 1
            ),
        )


def detections_by_image(table: pa.Table, num_classes: int) -> DetectionsTable:
    """Detections by ``image_id`` of a table in memory."""
    return DetectionsTable(table, num_classes)


def open_detections(uri: str, num_classes: int) -> DetectionsTable:
    """Detections by ``image_id`` of a Parquet file, on the disk if it is large."""
    return DetectionsTable(open_table(uri, DETECTION_COLUMNS), num_classes, uri)


def _tensor(values: pa.Array, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values.to_numpy(zero_copy_only=False), dtype=dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """Annotations of one image: boxes [N, 4] xyxy, labels [N], difficult [N] bool
    (neither required nor wrong in evaluation).
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


class TruthTable(TableByImage[Truth]):
    """Annotations by ``image_id``. It goes to other processes by reference, with its
    ``uri``.
    """

    def __init__(self, uri: str) -> None:
        table = open_table(uri, ANNOTATIONS.names)
        super().__init__(table, np.ones(len(table), bool))
        self.uri = uri

    def __reduce__(self) -> tuple[Any, ...]:
        return TruthTable, (self.uri,)

    def made(self, row: int) -> Truth:
        boxes, labels, difficult = (
            self.table[name][row].values for name in ANNOTATIONS.names[1:]
        )
        return Truth(
            _tensor(boxes.flatten(), torch.float32).reshape(-1, 4),
            _tensor(labels, torch.int64),
            _tensor(difficult, torch.bool),
        )

    def of(self, images: pa.Array | pa.ChunkedArray) -> dict[str, Truth]:
        """Those of the images that are annotated, in the order given."""
        return {i: self[i] for i in images.to_pylist() if i in self}
