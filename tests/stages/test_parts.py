"""Merging the parts of a collection: the same tables as if all rows were put together
at once, without holding them."""

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
from coin_ray.stages.collecting import parts as merging
from coin_ray.stages.collecting.parts import PART_SCHEMA, CollectedParts, merge_parts
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row

CLASSES = 3
OLD = pa.schema(
    [
        field
        for field in PART_SCHEMA
        if field.name not in ("prob_source", "score_kind", "teachers")
    ]
)
"""Columns of a part that an older version wrote."""
STATES = ("ok", "cached", "empty", "error", "skipped_budget")


def part_row(image: str, status: str, boxes: int, seed: int) -> dict[str, Any]:
    draw = np.random.default_rng(seed)

    def vectors(width: int) -> list[list[float]]:
        return draw.random((boxes, width), np.float32).tolist()

    return {
        "image_id": image,
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


def at_once(
    rows: Sequence[dict[str, Any]], order: Sequence[str]
) -> tuple[list[dict[str, Any]], list[dict[str, object]], dict[str, Any]]:
    """Rows of both tables and the counts, from all rows as Python objects."""
    latest: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["image_id"] not in latest or latest[row["image_id"]]["status"] in (
            "error",
            "skipped_budget",
        ):
            latest[row["image_id"]] = row
    chosen = [latest[image] for image in order]
    opinions = []
    for row in chosen:
        probs = torch.tensor(row["clip_probs"], dtype=torch.float32).reshape(
            -1, CLASSES + 1
        )
        best = probs[:, :-1].max(1)
        found = Detections(
            torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4),
            best.values,
            best.indices,
            probs,
        )
        opinions.append(
            detections_row(
                row["image_id"], found, Provenance("clip_labels", row["status"])
            )
        )
    states, teachers = (
        [row["status"] for row in chosen],
        [name for row in chosen for name in row.get("teachers") or ()],
    )
    counts = {
        "calls": {
            "made": sum(row["calls"] for row in rows),
            "cached": states.count("cached"),
            "failed": states.count("error"),
            "cost_usd": round(sum(row["cost_usd"] for row in rows), 6),
        },
        "empty": sum(
            row["status"] in ("ok", "cached", "empty") and not row["boxes"]
            for row in chosen
        ),
        "boxes": sum(len(row["boxes"]) for row in chosen),
        "errors": sorted({row["error"] for row in chosen if row["error"]})[:10],
        "answered_by": {name: teachers.count(name) for name in set(teachers)},
    }
    return chosen, opinions, counts


def write_parts(
    folder: Path, rows: Sequence[dict[str, Any]], size: int, old: bool = False
) -> list[dict[str, Any]]:
    """Parts of so many rows, the first one of an older version; returns the rows as
    they are read again."""
    for number, start in enumerate(range(0, len(rows), size)):
        schema = OLD if old and not start else PART_SCHEMA
        some = [
            {name: row[name] for name in schema.names}
            for row in rows[start : start + size]
        ]
        storage.write_table(
            str(folder / f"{number:04d}.parquet"),
            pa.Table.from_pylist(some, schema=schema),
        )
    return [
        {k: v for k, v in row.items() if n >= size or not old or k in OLD.names}
        for n, row in enumerate(rows)
    ]


answers = st.lists(
    st.tuples(st.integers(0, 11), st.sampled_from(STATES), st.integers(0, 3)),
    max_size=40,
)


@settings(
    max_examples=40,
    deadline=None,
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
    told: list[Any],
    second: list[Any],
    size: int,
    old: bool,
    random: Any,
) -> None:
    """In whatever order parts came, with failures, images asked again, second opinions,
    and parts that lack columns."""
    place = tmp_path_factory.mktemp("parts")
    first = [
        part_row(f"{i:064x}", status, boxes, seed)
        for seed, (i, status, boxes) in enumerate(told)
    ]
    better = [
        part_row(f"{i:064x}", status, boxes, 100 + seed)
        for seed, (i, status, boxes) in enumerate(second)
    ]
    rows = write_parts(place / "second", better, size) + write_parts(
        place / "first", first, size, old
    )
    order = sorted({row["image_id"] for row in rows}, key=lambda _: random.random())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "BLOCK", 4)
        found = merge_parts(
            CollectedParts(str(place / "second"), str(place / "first")),
            pa.array(order, pa.string()),
            str(place),
            CLASSES,
        )
    chosen, opinions, counts = at_once(rows, order)
    assert found == counts
    expected = {
        "cloud": [{k: row.get(k) for k in tables.DETECTIONS.names} for row in chosen],
        "clip_labels": opinions,
    }
    for name, made in expected.items():
        storage.write_table(
            str(place / "expected.parquet"),
            pa.Table.from_pylist(made, schema=tables.DETECTIONS),
        )
        assert (place / f"{name}.parquet").read_bytes() == (
            place / "expected.parquet"
        ).read_bytes()


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
    write_parts(
        tmp_path,
        [part_row(image, status, 0, n) for n, (image, status) in enumerate(rows)],
        2,
    )
    parts = CollectedParts(str(tmp_path))
    assert parts.counting(pa.array(["c", "b", "a"])).tolist() == [6, 5, 2]
    assert parts.images.to_pylist() == ["a", "b", "c"]
    assert parts.answered.to_pylist() == ["a", "a", "c"]


def test_an_image_without_a_row_is_told(tmp_path: Path) -> None:
    write_parts(tmp_path, [part_row("a", "ok", 1, 0)], 2)
    with pytest.raises(
        StepError, match="2 images have no answer, the first lost: run again"
    ):
        CollectedParts(str(tmp_path)).counting(pa.array(["a", "lost", "other"]))


def test_only_the_parts_of_one_block_are_in_memory_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole parts, that is; the list of what there is reads four columns."""
    images = [f"{n:064x}" for n in range(60)]
    write_parts(
        tmp_path, [part_row(image, "ok", 2, n) for n, image in enumerate(images)], 3
    )
    read, held = storage.read_tables, list[int]()

    def watched(
        uris: Sequence[str], columns: Sequence[str] | None = None
    ) -> list[pa.Table]:
        if columns is None:
            held.append(len(uris))
        else:
            assert set(columns) == {"image_id", "status", "calls", "cost_usd"}
        return read(uris, columns)

    monkeypatch.setattr(storage, "read_tables", watched)
    monkeypatch.setattr(merging, "BLOCK", 12)
    merge_parts(CollectedParts(str(tmp_path)), pa.array(images), str(tmp_path / "out"), None)
    assert held == [4] * 5
    assert not (tmp_path / "out" / "clip_labels.parquet").exists()
