from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from coin_ray import storage


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path / "new")
        if request.param == "local"
        else f"memory://{uuid.uuid4().hex}"
    )


def test_bytes_and_json(root: str) -> None:
    uri = storage.join(root, "a", "b.json")
    assert not storage.exists(uri)
    storage.write_json(uri, {"x": [1, 2]})
    assert storage.exists(uri)
    assert storage.read_json(uri) == {"x": [1, 2]}
    storage.write_bytes(uri, b"new")
    assert storage.read_bytes(uri) == b"new"
    storage.remove(uri)
    storage.remove(uri)
    assert not storage.exists(uri)


def test_list_files(root: str) -> None:
    assert storage.list_files(root) == []
    for name in ("b.txt", "deep/er/a.txt", "c.json"):
        storage.write_bytes(storage.join(root, name), name.encode())
    files = storage.list_files(root, ".txt")
    assert [storage.read_bytes(f) for f in files] == [b"b.txt", b"deep/er/a.txt"]
    assert len(storage.list_files(root)) == 3


def test_digest_is_that_of_the_whole_file(root: str) -> None:
    raw = bytes(range(256)) * 5000
    storage.write_bytes(storage.join(root, "a.bin"), raw)
    assert (
        storage.sha256(storage.join(root, "a.bin")) == hashlib.sha256(raw).hexdigest()
    )


def test_tables_in_parts(root: str) -> None:
    for number in (1, 0, 2):
        storage.write_table(
            storage.join(root, f"part-{number}.parquet"), pa.table({"n": [number]})
        )
    assert storage.read_table(root)["n"].to_pylist() == [0, 1, 2]
    assert storage.read_table(storage.join(root, "part-1.parquet"))[
        "n"
    ].to_pylist() == [1]
    with pytest.raises(FileNotFoundError, match="no Parquet parts"):
        storage.read_table(storage.join(root, "absent"))


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    uri = tmp_path / "file"
    storage.write_bytes(str(uri), b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space"):
        storage.write_bytes(str(uri), b"new")
    assert uri.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_file_urls_are_local(tmp_path: Path) -> None:
    storage.write_bytes(f"file://{tmp_path}/x", b"1")
    assert (tmp_path / "x").read_bytes() == b"1"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("s3://b/x", "s3://b/x"),
        ("runs", os.path.abspath("runs")),
        ("~/x", os.path.expanduser("~/x")),
        ("/a/../b", "/b"),
        ("file:///a/b", "/a/b"),
    ],
)
def test_absolute(uri: str, expected: str) -> None:
    assert storage.absolute_uri(uri) == expected


def test_join() -> None:
    assert storage.join("s3://b/x/", "y", "z") == "s3://b/x/y/z"


@pytest.mark.parametrize("block", [1, 7, 10])
def test_a_table_written_as_its_rows_come_is_the_same_file(
    root: str, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "ROW_GROUP", 10)
    table = pa.table({"n": range(33), "name": [[str(n)] * (n % 3) for n in range(33)]})
    pq.write_table(table, tmp_path / "whole.parquet", row_group_size=10)
    storage.write_table(storage.join(root, "whole.parquet"), table)
    with storage.table_writer(
        storage.join(root, "rows.parquet"), table.schema
    ) as writer:
        for start in range(0, 33, block):
            writer.write(table.slice(start, block))
    for name in ("rows", "whole"):
        assert (
            storage.read_bytes(storage.join(root, f"{name}.parquet"))
            == (tmp_path / "whole.parquet").read_bytes()
        )


def test_rows_that_are_large_are_written_before_a_group_is_full(
    root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "MAX_BYTES_IN_MEMORY", 50)
    with storage.table_writer(
        storage.join(root, "rows.parquet"), pa.schema([("n", pa.int64())])
    ) as writer:
        for n in range(21):
            writer.write(pa.table({"n": [n]}))
            assert writer.bytes < 50
    assert storage.read_table(storage.join(root, "rows.parquet"))[
        "n"
    ].to_pylist() == list(range(21))


def test_a_table_whose_rows_break_off_leaves_the_old_one(root: str) -> None:
    uri = storage.join(root, "rows.parquet")
    storage.write_table(uri, pa.table({"n": [1]}))

    def broken_off() -> None:
        with storage.table_writer(uri, pa.schema([("n", pa.int64())])) as writer:
            writer.write(pa.table({"n": [2]}))
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        broken_off()
    assert storage.read_table(uri)["n"].to_pylist() == [1]
    assert len(storage.list_files(root)) == 1


def test_a_table_is_read_in_blocks(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "BLOCK_ROWS", 4)
    uri = storage.join(root, "rows.parquet")
    storage.write_table(uri, pa.table({"n": range(10), "other": range(10)}))
    blocks = list(storage.stream_table(uri, ["n"]))
    assert [block["n"].to_pylist() for block in blocks] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9],
    ]
    assert blocks[0].column_names == ["n"]
