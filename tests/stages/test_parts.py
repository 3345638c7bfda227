"""Merging the parts of a collection: the same tables as if all rows were put together
at once, without holding them in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coin_ray import storage, tables
from coin_ray.errors import StepError
from coin_ray.stages.collecting import parts as parts_module
from coin_ray.stages.collecting.parts import (
    PART_SCHEMA,
    CollectedParts,
    MergedCounts,
    merge_parts,
)
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row

CLASSES = 3
OLD_SCHEMA = pa.schema(
    [
        field
        for field in PART_SCHEMA
        if field.name not in ("prob_source", "score_kind", "teachers")
    ]
)
"""Columns of a part that an older version wrote."""
STATUSES = ("ok", "cached", "empty", "error", "skipped_budget")


def _part_row(image_id: str, status: str, boxes: int, seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)

    def vectors(width: int) -> list[list[float]]:
        return draw.random((boxes, width), np.float32).tolist()

    return {
        "image_id": image_id,
        "boxes": vectors(4),
        "scores": draw.random(boxes, np.float32).tolist(),
        "labels": draw.integers(0, CLASSES, boxes).tolist(),
        "probs": vectors(CLASSES + 1),
        "clip_probs": vectors(CLASSES + 1),
        "prob_source": ["native"] * boxes,
        "source": "cloud",
        "status": status,
        "attempts": seed % 3,
        "latency_ms": float(seed),
        "cost_usd": 0.002 * (seed % 2),
        "error": f"busy {seed % 15}" if status == "error" else None,
        "calls": seed % 2,
        "score_kind": "per_class",
        "teachers": ["one", "two"][: seed % 3],
    }


def _merge_at_once(
    rows: Sequence[dict[str, Any]], order: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, object]], MergedCounts]:
    """Rows of both tables and the counts, from all rows as Python objects."""
    row_by_image: dict[str, dict[str, Any]] = {}
    for row in rows:
        earlier = row_by_image.get(row["image_id"])
        if earlier is None or earlier["status"] in ("error", "skipped_budget"):
            row_by_image[row["image_id"]] = row
    cloud_rows = [row_by_image[image_id] for image_id in order]
    statuses = [row["status"] for row in cloud_rows]
    teachers = [name for row in cloud_rows for name in row.get("teachers") or ()]
    counts = MergedCounts(
        calls=sum(row["calls"] for row in rows),
        usd=round(sum(row["cost_usd"] for row in rows), 6),
        cached=statuses.count("cached"),
        failed=statuses.count("error"),
        empty=sum(
            row["status"] in ("ok", "cached", "empty") and not row["boxes"]
            for row in cloud_rows
        ),
        boxes=sum(len(row["boxes"]) for row in cloud_rows),
        answered_in_part=0,
        errors=sorted({row["error"] for row in cloud_rows if row["error"]})[:10],
        answered_by={name: teachers.count(name) for name in set(teachers)},
    )
    return cloud_rows, [_clip_label_row(row) for row in cloud_rows], counts


def _clip_label_row(row: dict[str, Any]) -> dict[str, object]:
    probs = torch.tensor(row["clip_probs"], dtype=torch.float32)
    probs = probs.reshape(-1, CLASSES + 1)
    best = probs[:, :-1].max(1)
    detections = Detections(
        torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4),
        best.values,
        best.indices,
        probs,
    )
    provenance = Provenance("clip_labels", row["status"])
    return detections_row(row["image_id"], detections, provenance)


def _write_parts(
    folder: Path, rows: Sequence[dict[str, Any]], size: int, old: bool = False
) -> list[dict[str, Any]]:
    """Write parts of so many rows, the first one of an older version; return the rows as
    they are read again."""
    for number, start in enumerate(range(0, len(rows), size)):
        schema = OLD_SCHEMA if old and not start else PART_SCHEMA
        part_rows = [
            {name: row[name] for name in schema.names}
            for row in rows[start : start + size]
        ]
        storage.write_table(
            str(folder / f"{number:04d}.parquet"),
            pa.Table.from_pylist(part_rows, schema=schema),
        )
    return [
        {k: v for k, v in row.items() if n >= size or not old or k in OLD_SCHEMA.names}
        for n, row in enumerate(rows)
    ]


answers = st.lists(
    st.tuples(st.integers(0, 11), st.sampled_from(STATUSES), st.integers(0, 3)),
    max_size=40,
)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    answers,
    answers,
    st.integers(1, 7),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_the_tables_are_those_of_all_rows_at_once(
    tmp_path_factory: pytest.TempPathFactory,
    first_answers: list[Any],
    second_answers: list[Any],
    size: int,
    old: bool,
    random: Any,
) -> None:
    """Parts come in any order, with failures, images asked again, second opinions, and
    parts that lack columns."""
    folder = tmp_path_factory.mktemp("parts")
    first_rows = [
        _part_row(f"{i:064x}", status, boxes, seed)
        for seed, (i, status, boxes) in enumerate(first_answers)
    ]
    second_rows = [
        _part_row(f"{i:064x}", status, boxes, 100 + seed)
        for seed, (i, status, boxes) in enumerate(second_answers)
    ]
    rows = _write_parts(folder / "second", second_rows, size) + _write_parts(
        folder / "first", first_rows, size, old
    )
    order = sorted({row["image_id"] for row in rows}, key=lambda _: random.random())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts_module, "MERGE_BLOCK_ROWS", 4)
        counts = merge_parts(
            CollectedParts(str(folder / "second"), str(folder / "first")),
            pa.array(order, pa.string()),
            str(folder),
            CLASSES,
        )
    cloud_rows, clip_label_rows, expected_counts = _merge_at_once(rows, order)
    assert counts == expected_counts
    expected_rows = {
        "cloud": [
            {name: row.get(name) for name in tables.DETECTIONS.names}
            for row in cloud_rows
        ],
        "clip_labels": clip_label_rows,
    }
    expected_file = folder / "expected.parquet"
    for name, table_rows in expected_rows.items():
        expected = pa.Table.from_pylist(table_rows, schema=tables.DETECTIONS)
        storage.write_table(str(expected_file), expected)
        merged_file = folder / f"{name}.parquet"
        assert merged_file.read_bytes() == expected_file.read_bytes()


def test_of_an_image_the_first_answer_counts_and_of_failures_the_last(
    tmp_path: Path,
) -> None:
    rows = [
        ("a", "error"),
        ("b", "error"),
        ("a", "ok"),
        ("b", "skipped_budget"),
        ("a", "cached"),
        ("b", "error"),
        ("c", "empty"),
    ]
    _write_parts(
        tmp_path,
        [
            _part_row(image_id, status, 0, n)
            for n, (image_id, status) in enumerate(rows)
        ],
        2,
    )
    parts = CollectedParts(str(tmp_path))
    assert parts.select_rows(pa.array(["c", "b", "a"])).tolist() == [6, 5, 2]
    assert parts.image_ids.to_pylist() == ["a", "b", "c"]
    assert parts.answered_ids.to_pylist() == ["a", "a", "c"]


def test_an_image_without_a_row_is_an_error(tmp_path: Path) -> None:
    _write_parts(tmp_path, [_part_row("a", "ok", 1, 0)], 2)
    with pytest.raises(
        StepError,
        match="2 images have no answer, the first lost: run the same command again",
    ):
        CollectedParts(str(tmp_path)).select_rows(pa.array(["a", "lost", "other"]))


def test_only_the_parts_of_one_block_are_in_memory_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole parts, that is; the index reads four columns of all parts."""
    image_ids = [f"{n:064x}" for n in range(60)]
    _write_parts(
        tmp_path,
        [_part_row(image_id, "ok", 2, n) for n, image_id in enumerate(image_ids)],
        3,
    )
    read_tables, parts_read = storage.read_tables, list[int]()

    def count_parts(
        uris: Sequence[str], columns: Sequence[str] | None = None
    ) -> list[pa.Table]:
        if columns is None:
            parts_read.append(len(uris))
        else:
            assert set(columns) == {"image_id", "status", "calls", "cost_usd", "error"}
        return read_tables(uris, columns)

    monkeypatch.setattr(storage, "read_tables", count_parts)
    monkeypatch.setattr(parts_module, "MERGE_BLOCK_ROWS", 12)
    merge_parts(
        CollectedParts(str(tmp_path)), pa.array(image_ids), str(tmp_path / "out"), None
    )
    assert parts_read == [4] * 5
    assert not (tmp_path / "out" / "clip_labels.parquet").exists()
