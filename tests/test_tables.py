from __future__ import annotations

import pickle
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from builders import detections

from coin_ray import storage, tables
from coin_ray.structures import Detections
from coin_ray.tables import (
    Provenance,
    detections_by_image,
    detections_row,
    detections_table,
)

FOUND = detections(([0.1, 0.2, 1 / 3, 7.7], 0, 0.9), ([1, 2, 3.3, 4], 2, 0.3))


def _is_same(a: Detections, b: Detections) -> bool:
    return all(
        torch.equal(getattr(a, n), getattr(b, n))
        for n in ("boxes", "scores", "labels", "probs")
    )


def test_round_trip_through_a_file_is_exact(tmp_path: Path) -> None:
    rows = [
        detections_row("a", FOUND, Provenance("cloud")),
        detections_row("none", Detections.empty(3), Provenance("cloud", "empty")),
    ]
    uri = str(tmp_path / "t.parquet")
    storage.write_table(uri, detections_table(rows))
    back = detections_by_image(storage.read_table(uri), 3)
    assert list(back) == ["a", "none"]
    assert _is_same(back["a"], FOUND)
    assert _is_same(back["none"], Detections.empty(3))


@pytest.mark.parametrize(
    ("status", "is_read"),
    [
        ("ok", True),
        ("cached", True),
        ("empty", True),
        ("error", False),
        ("skipped_budget", False),
    ],
)
def test_only_answered_images_are_read(status: str, is_read: bool) -> None:
    table = detections_table([detections_row("a", FOUND, Provenance("cloud", status))])
    assert ("a" in detections_by_image(table, 3)) == is_read


def test_a_table_of_no_images() -> None:
    assert detections_by_image(detections_table([]), 3) == {}
    assert detections_table([]).schema == tables.DETECTIONS


def test_provenance_is_stored() -> None:
    row = detections_table(
        [
            detections_row(
                "a", FOUND, Provenance("cloud", "error", 3, 12.5, 0.002, "busy")
            )
        ]
    ).to_pylist()[0]
    assert {
        k: row[k]
        for k in ("source", "status", "attempts", "latency_ms", "cost_usd", "error")
    } == {
        "source": "cloud",
        "status": "error",
        "attempts": 3,
        "latency_ms": 12.5,
        "cost_usd": 0.002,
        "error": "busy",
    }


@pytest.mark.parametrize(
    ("prob_source", "stored"),
    [
        (None, ["native", "native"]),
        (("grouped", "label_prior"), ["grouped", "label_prior"]),
    ],
)
def test_the_source_of_probabilities_is_stored(
    prob_source: tuple[str, ...] | None, stored: list[str]
) -> None:
    assert detections_table(
        [detections_row("a", FOUND, Provenance("cloud"), prob_source)]
    )["prob_source"].to_pylist() == [stored]


def test_truth(tmp_path: Path) -> None:
    rows = [
        {"image_id": "a", "boxes": [[0, 0, 5, 5]], "labels": [1], "difficult": [True]},
        {"image_id": "none", "boxes": [], "labels": [], "difficult": []},
    ]
    uri = str(tmp_path / "annotations.parquet")
    storage.write_table(uri, pa.Table.from_pylist(rows, schema=tables.ANNOTATIONS))
    truth = pickle.loads(pickle.dumps(tables.TruthTable(uri)))
    assert list(truth) == ["a", "none"]
    assert list(truth.select(pa.array(["none", "absent", "a"]))) == ["none", "a"]
    assert (
        truth["a"].boxes.tolist(),
        truth["a"].labels.tolist(),
        truth["a"].difficult.tolist(),
    ) == ([[0, 0, 5, 5]], [1], [True])
    assert truth["none"].boxes.shape == (0, 4)
    assert truth["none"].difficult.dtype == torch.bool


def test_rows_become_a_table_whatever_their_number(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tables, "BLOCK_ROWS", 3)
    schema = pa.schema([("n", pa.int64())])
    for count in (0, 2, 3, 7):
        rows = [{"n": n} for n in range(count)]
        builder = tables.TableBuilder(schema)
        for row in rows:
            builder.append(row)
            assert len(builder.pending_rows) < 3
        assert builder.table().to_pylist() == rows
        blocks = tables.iterate_tables(rows, schema)
        last_block = [count % 3] if count % 3 else []
        expected_counts = [3] * (count // 3) + last_block
        assert [block.num_rows for block in blocks] == expected_counts
