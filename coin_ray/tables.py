"""Arrow schemas of every table, and ``Detections`` to and from Arrow. One row per image, so empty images survive."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from coin_ray.structures import Detections

BOXES = pa.list_(pa.list_(pa.float32(), 4))
VECTORS = pa.list_(pa.list_(pa.float32()))

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
    [("image_id", pa.string()), ("boxes", BOXES), ("labels", pa.list_(pa.int64())), ("difficult", pa.list_(pa.bool_()))]
)
DETECTIONS = pa.schema(
    [
        ("image_id", pa.string()),
        ("boxes", BOXES),
        ("scores", pa.list_(pa.float32())),
        ("labels", pa.list_(pa.int64())),
        ("probs", VECTORS),  # rows of K+1, background last
        ("prob_source", pa.list_(pa.string())),  # how each row of probs came about: coin_ray.cloud.probabilities
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
        ("kind", pa.list_(pa.string())),  # consistent, inconsistent, private
        ("cloud_probs", VECTORS),  # of a private box: of the one teacher that saw it
        ("clip_probs", VECTORS),  # all zeros for private boxes
    ]
)


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where one image's detections come from; the columns of a ``DETECTIONS`` row beside the detections themselves."""

    source: str
    status: str = "ok"
    attempts: int = 0
    latency_ms: float = 0.0
    cost_usd: float = 0.0
    error: str | None = None


def detections_row(
    image_id: str, detections: Detections, provenance: Provenance, prob_source: Sequence[str] | None = None
) -> dict[str, object]:
    """One row of a ``DETECTIONS`` table. ``prob_source`` [N]; None: our own models, which score every class."""
    return {
        "image_id": image_id,
        "boxes": detections.boxes.tolist(),
        "scores": detections.scores.tolist(),
        "labels": detections.labels.tolist(),
        "probs": detections.probs.tolist(),
        "prob_source": ["native"] * len(detections) if prob_source is None else list(prob_source),
        "source": provenance.source,
        "status": provenance.status,
        "attempts": provenance.attempts,
        "latency_ms": provenance.latency_ms,
        "cost_usd": provenance.cost_usd,
        "error": provenance.error,
    }


def detections_table(rows: Sequence[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=DETECTIONS)


def read_detections(table: pa.Table, num_classes: int) -> dict[str, Detections]:
    """Detections by ``image_id``; rows with an error are left out, rows without objects are not."""
    columns = ("image_id", "boxes", "scores", "labels", "probs", "status")
    rows = table.select(columns).to_pylist()
    return {r["image_id"]: _detections(r, num_classes) for r in rows if r["status"] not in ("error", "skipped_budget")}


def _detections(row: dict[str, list[float]], num_classes: int) -> Detections:
    return Detections(
        boxes=_floats(row["boxes"], 4),
        scores=torch.tensor(row["scores"], dtype=torch.float32),
        labels=torch.tensor(row["labels"], dtype=torch.int64),
        probs=_floats(row["probs"], num_classes + 1),
    )


def _floats(rows: list[float], width: int) -> Tensor:
    return torch.from_numpy(np.asarray(rows, np.float32).reshape(-1, width))


@dataclass(frozen=True, slots=True, eq=False)
class Truth:
    """Annotations of one image: boxes [N, 4] xyxy, labels [N], difficult [N] bool (neither required nor wrong in evaluation)."""

    boxes: Tensor
    labels: Tensor
    difficult: Tensor


def read_truth(table: pa.Table) -> dict[str, Truth]:
    """Annotations by ``image_id``."""
    return {
        row["image_id"]: Truth(
            _floats(row["boxes"], 4),
            torch.tensor(row["labels"], dtype=torch.int64),
            torch.tensor(row["difficult"], dtype=torch.bool),
        )
        for row in table.to_pylist()
    }
