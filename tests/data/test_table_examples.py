from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from builders import CLASSES, examples, tiny_config, tiny_fit

from coin_ray import storage, tables
from coin_ray.data.examples import Example, TableExamples, iterate_batches, wide_images
from coin_ray.structures import Detections
from coin_ray.tables import (
    DetectionsTable,
    Provenance,
    detections_row,
    detections_table,
    open_detections,
)

NAMES = ("cloud", "clip", "labels")


def _lookup_detections(
    tables_by_name: dict[str, DetectionsTable], image_id: str
) -> dict[str, Detections]:
    return {name: table[image_id] for name, table in tables_by_name.items()}


def _examples_from_tables(folder: Path, source: list[Example]) -> TableExamples:
    """Return the same examples, read from Parquet. Rows of the detections are in another order
    than those of the images."""
    sizes = [(96, 64) if e.wide else (64, 96) for e in source]
    rows = [
        {
            "image_id": e.image_id,
            "uri": e.uri,
            "width": w,
            "height": h,
            "split": "train",
        }
        for e, (w, h) in zip(source, sizes, strict=True)
    ]
    storage.write_table(
        str(folder / "images.parquet"), pa.Table.from_pylist(rows, schema=tables.IMAGES)
    )
    for name in NAMES:
        written = [
            detections_row(e.image_id, e.detections[name], Provenance(name))
            for e in reversed(source)
        ]
        storage.write_table(str(folder / f"{name}.parquet"), detections_table(written))
    tables_by_name = {
        name: open_detections(str(folder / f"{name}.parquet"), len(CLASSES))
        for name in NAMES
    }
    return TableExamples(
        str(folder / "images.parquet"),
        np.arange(len(source)),
        partial(_lookup_detections, tables_by_name),
    )


def _examples_in_memory(folder: Path) -> list[Example]:
    return [
        Example(e.image_id, e.uri, {n: e.detections[n] for n in NAMES})
        for e in examples(folder)
    ]


def _is_equal(a: Detections, b: Detections) -> bool:
    return all(
        torch.equal(getattr(a, n), getattr(b, n))
        and getattr(a, n).dtype == getattr(b, n).dtype
        for n in Detections.__slots__
    )


@pytest.fixture(params=[1 << 26, 0], ids=["small, in memory", "large, on the disk"])
def limit(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(storage, "MAX_BYTES_IN_MEMORY", request.param)
    monkeypatch.setattr(storage, "ROW_GROUP", 2)
    return int(request.param)


@pytest.mark.parametrize(
    "send",
    [lambda x: x, lambda x: pickle.loads(pickle.dumps(x))],
    ids=["here", "in another process"],
)
def test_batches_are_those_of_examples_in_memory(
    tmp_path: Path, limit: int, send: Callable[[TableExamples], TableExamples]
) -> None:
    source = _examples_in_memory(tmp_path)
    configs = (tiny_fit(steps=4, batch=4), tiny_config())
    batches = iterate_batches(
        send(_examples_from_tables(tmp_path, source)),
        *configs,
        seed=3,
        first=0,
        rank=0,
        workers=1,
    )
    for batch, expected in zip(
        batches,
        iterate_batches(source, *configs, seed=3, first=0, rank=0, workers=1),
        strict=True,
    ):
        assert all(
            torch.equal(a, b)
            for a, b in zip(batch.strong, expected.strong, strict=True)
        )
        for name in NAMES:
            assert all(
                _is_equal(a, b)
                for a, b in zip(
                    batch.detections[name], expected.detections[name], strict=True
                )
            )


def test_examples_are_pickled_by_reference(tmp_path: Path) -> None:
    """Pickles for a worker do not grow with the tables: 4 bytes a row of the index,
    and addresses."""
    assert (
        len(
            pickle.dumps(_examples_from_tables(tmp_path, _examples_in_memory(tmp_path)))
        )
        < 2000
    )


def test_slices_and_ends(tmp_path: Path) -> None:
    read = _examples_from_tables(tmp_path, _examples_in_memory(tmp_path))
    assert [e.image_id for e in read[1:4]] == ["1", "2", "3"]
    assert read[-1].image_id == "4"
    with pytest.raises(IndexError):
        read[5]


def test_orientation(tmp_path: Path) -> None:
    source = [
        Example(e.image_id, e.uri, e.detections, wide=n % 2 == 0)
        for n, e in enumerate(_examples_in_memory(tmp_path))
    ]
    expected = [True, False, True, False, True]
    assert (
        wide_images(source).tolist()
        == wide_images(_examples_from_tables(tmp_path, source)).tolist()
        == expected
    )
    assert [e.wide for e in _examples_from_tables(tmp_path, source)] == expected


def test_a_step_of_grouped_images_has_one_orientation(tmp_path: Path) -> None:
    source = [
        Example(str(n), e.uri, e.detections, wide=n % 2 == 0)
        for n, e in enumerate(_examples_in_memory(tmp_path)[:1] * 8)
    ]
    batches = iterate_batches(
        source,
        tiny_fit(steps=2, batch=4, group_aspects=True),
        tiny_config(),
        seed=0,
        first=0,
        rank=0,
        workers=1,
    )
    assert len(list(batches)) == 2


class TestLookup:
    def table(self, *names: str, failed: str = "") -> DetectionsTable:
        rows = [
            detections_row(
                n,
                Detections.empty(3),
                Provenance("cloud", "error" if n == failed else "empty"),
            )
            for n in names
        ]
        return tables.detections_by_image(detections_table(rows), 3)

    @pytest.mark.parametrize(
        "names", [(), ("a",), ("b", "a", "c"), tuple(str(n) for n in range(50))]
    )
    def test_every_name_is_found_and_no_other(self, names: tuple[str, ...]) -> None:
        table = self.table(*names)
        assert list(table) == list(names)
        assert all(name in table for name in names)
        assert not any(name in table for name in ("", "aa", "zz", 3))
        with pytest.raises(KeyError):
            table["absent"]

    def test_failed_images_are_absent_and_their_neighbours_are_not(self) -> None:
        table = self.table("c", "a", "b", failed="b")
        assert (list(table), len(table), table.ids.to_pylist()) == (
            ["c", "a"],
            2,
            ["c", "a"],
        )
        assert "b" not in table


def test_a_large_table_leaves_no_file_and_no_memory_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "MAX_BYTES_IN_MEMORY", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    storage.write_table(
        str(tmp_path / "a.parquet"),
        pa.table({"number": range(200_000), "other": range(200_000)}),
    )
    before = pa.total_allocated_bytes()
    table = storage.open_table(str(tmp_path / "a.parquet"), ("number",))
    assert table["number"].to_pylist() == list(range(200_000))
    assert pa.total_allocated_bytes() - before < 100_000
    assert not list((tmp_path / "temporary").iterdir())
