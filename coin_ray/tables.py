"""Define the Arrow schema of every table, and convert ``Detections`` to and from Arrow.
Each image has one row, so images without objects are kept.

torch is imported where tensors are made: the actors that ask clouds do without it.
"""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from coin_ray.storage import BLOCK_ROWS, open_table, stream_table

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from coin_ray.structures import Detections

T = TypeVar("T")

BOXES = pa.list_(pa.list_(pa.float32(), 4))
VECTORS = pa.list_(pa.list_(pa.float32()))
LABELS = pa.list_(pa.int64())
NO_LABEL = -1
"""CLIP's label of a private box: there is none."""

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
        # how each row of probs was made: coin_ray.cloud.probabilities
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
        ("boxes", BOXES),  # the fused box of the pair, or the private box
        # consistent, inconsistent, private; reviewed: a person's box
        ("kind", pa.list_(pa.string())),
        # the labels that were compared; the largest entry of cloud_probs may be
        # background all the same
        ("cloud_labels", LABELS),
        # K: CLIP's label is background; NO_LABEL for private boxes
        ("clip_labels", LABELS),
        # of a private box, like its label: of the one teacher that found it
        ("cloud_probs", VECTORS),
        ("clip_probs", VECTORS),  # all zeros for private boxes
    ]
)
FAILED_STATUSES = pa.array(["error", "skipped_budget"])
"""Values of ``status`` of images without an answer."""


class TableBuilder:
    """A table that grows row by row. Only its last rows are Python objects: those take
    nine times the memory.
    """

    def __init__(self, schema: pa.Schema) -> None:
        self.schema, self.blocks = schema, [schema.empty_table()]
        self.pending_rows: list[Mapping[str, Any]] = []

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        self.pending_rows.append(row)
        if len(self.pending_rows) == BLOCK_ROWS:
            self.blocks.append(self._pending_table())
            self.pending_rows = []

    def table(self) -> pa.Table:
        """Return all rows added so far."""
        return pa.concat_tables([*self.blocks, self._pending_table()])

    def _pending_table(self) -> pa.Table:
        return pa.Table.from_pylist(self.pending_rows, schema=self.schema)


def iterate_tables(
    rows: Iterable[Mapping[str, Any]], schema: pa.Schema
) -> Iterator[pa.Table]:
    """Yield the rows as tables of ``BLOCK_ROWS`` rows, as they come."""
    row_iterator = iter(rows)
    while block := list(islice(row_iterator, BLOCK_ROWS)):
        yield pa.Table.from_pylist(block, schema=schema)


def stream_rows(
    uri: str, images: pa.Array | pa.ChunkedArray, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file whose image id is in ``images``, in the file's
    order.
    """
    for block in stream_table(uri, columns):
        selected = pc.is_in(block["image_id"], value_set=images)
        yield from block.filter(selected).to_pylist()


@dataclass(frozen=True, slots=True)
class Provenance:
    """The origin of one image's detections: the columns of a ``DETECTIONS`` row beside
    the detections themselves.
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
    """Return one row of a ``DETECTIONS`` table. ``prob_source`` [N]; None: our own
    models, which score every class.
    """
    if prob_source is None:
        prob_source = ["native"] * len(detections)
    return {
        "image_id": image_id,
        "boxes": detections.boxes.tolist(),
        "scores": detections.scores.tolist(),
        "labels": detections.labels.tolist(),
        "probs": detections.probs.tolist(),
        "prob_source": list(prob_source),
        "source": provenance.source,
        "status": provenance.status,
        "attempts": provenance.attempts,
        "latency_ms": provenance.latency_ms,
        "cost_usd": provenance.cost_usd,
        "error": provenance.error,
    }


def detections_table(rows: Sequence[dict[str, object]]) -> pa.Table:
    """Return a ``DETECTIONS`` table of the rows."""
    return pa.Table.from_pylist(list(rows), schema=DETECTIONS)


DETECTION_COLUMNS = ("image_id", "boxes", "scores", "labels", "probs", "status")
"""Columns that make ``Detections``."""


class TableByImage(Mapping[str, T]):
    """Rows of a table by their ``image_id``; each access converts its row."""

    def __init__(self, table: pa.Table, mask: NDArray[np.bool_]) -> None:
        """Use the rows of ``table`` that ``mask`` [N] selects."""
        self.table, self.image_ids = table, table["image_id"]
        self.rows: NDArray[np.int64] = np.flatnonzero(mask)
        sorted_rows = pc.sort_indices(self.image_ids).to_numpy()
        self.sorted_rows = sorted_rows[mask[sorted_rows]].astype(np.int32)

    @abstractmethod
    def convert_row(self, row: int) -> T:
        """Convert a row of the table."""

    @property
    def ids(self) -> pa.ChunkedArray:
        """The image ids, in the table's order."""
        return self.image_ids.take(pa.array(self.rows))

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[str]:
        return (self._image_id(row) for row in self.rows)

    def __contains__(self, image_id: object) -> bool:
        return isinstance(image_id, str) and self._find_row(image_id) is not None

    def __getitem__(self, image_id: str) -> T:
        row = self._find_row(image_id)
        if row is None:
            raise KeyError(image_id)
        return self.convert_row(row)

    def _image_id(self, row: int) -> str:
        return str(self.image_ids[int(row)].as_py())

    def _find_row(self, image_id: str) -> int | None:
        """Find the row by binary search: a dictionary of the ids would take more memory
        than a small table.
        """
        position = bisect_left(self.sorted_rows, image_id, key=self._image_id)
        if position == len(self.sorted_rows):
            return None
        row = int(self.sorted_rows[position])
        return row if self._image_id(row) == image_id else None


class DetectionsTable(TableByImage["Detections"]):
    """Detections by ``image_id``; rows with an error are left out, rows without objects
    are not.

    With a ``uri`` it is pickled by reference.
    """

    def __init__(
        self, table: pa.Table, num_classes: int, uri: str | None = None
    ) -> None:
        failed = pc.is_in(table["status"], value_set=FAILED_STATUSES).to_numpy()
        super().__init__(table.select(DETECTION_COLUMNS), ~failed.astype(bool))
        self.num_classes, self.uri = num_classes, uri
        self.columns = [self.table[name] for name in DETECTION_COLUMNS[1:5]]

    def __reduce__(self) -> tuple[Any, ...]:
        if self.uri is None:
            return DetectionsTable, (self.table, self.num_classes)
        return open_detections, (self.uri, self.num_classes)

    def convert_row(self, row: int) -> Detections:
        import torch

        from coin_ray.structures import Detections

        boxes, scores, labels, probs = (column[row].values for column in self.columns)
        prob_rows = _tensor(probs.flatten(), torch.float32)
        return Detections(
            boxes=_tensor(boxes.flatten(), torch.float32).reshape(-1, 4),
            scores=_tensor(scores, torch.float32),
            labels=_tensor(labels, torch.int64),
            probs=prob_rows.reshape(-1, self.num_classes + 1),
        )


def detections_by_image(table: pa.Table, num_classes: int) -> DetectionsTable:
    """Return the detections of a table in memory by ``image_id``."""
    return DetectionsTable(table, num_classes)


def open_detections(uri: str, num_classes: int) -> DetectionsTable:
    """Return the detections of a Parquet file by ``image_id``; a large file stays on
    the disk.
    """
    return DetectionsTable(open_table(uri, DETECTION_COLUMNS), num_classes, uri)


def _tensor(array: pa.Array, dtype: torch.dtype) -> Tensor:
    import torch

    return torch.tensor(array.to_numpy(zero_copy_only=False), dtype=dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """Annotations of one image: boxes [N, 4] xyxy, labels [N], difficult [N] bool
    (neither required nor wrong in evaluation).
    """

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


class TruthTable(TableByImage[Truth]):
    """Annotations by ``image_id``, pickled by reference to ``uri``."""

    def __init__(self, uri: str) -> None:
        table = open_table(uri, ANNOTATIONS.names)
        super().__init__(table, np.ones(len(table), bool))
        self.uri = uri

    def __reduce__(self) -> tuple[Any, ...]:
        return TruthTable, (self.uri,)

    def convert_row(self, row: int) -> Truth:
        import torch

        boxes, labels, difficult = (
            self.table[name][row].values for name in ANNOTATIONS.names[1:]
        )
        return Truth(
            _tensor(boxes.flatten(), torch.float32).reshape(-1, 4),
            _tensor(labels, torch.int64),
            _tensor(difficult, torch.bool),
        )

    def select(self, images: pa.Array | pa.ChunkedArray) -> dict[str, Truth]:
        """Return the annotations of those of the images that have any, in the order of
        ``images``.
        """
        image_ids = images.to_pylist()
        return {image_id: self[image_id] for image_id in image_ids if image_id in self}
