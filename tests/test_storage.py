from __future__ import annotations

import hashlib
import os
import uuid
from pathlib import Path

import pyarrow as pa
import pytest

from coin_ray import storage


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "new") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


def test_bytes_and_json(root: str) -> None:
    place = storage.join(root, "a", "b.json")
    assert not storage.exists(place)
    storage.write_json(place, {"x": [1, 2]})
    assert storage.exists(place)
    assert storage.read_json(place) == {"x": [1, 2]}
    storage.write_bytes(place, b"new")
    assert storage.read_bytes(place) == b"new"
    storage.remove(place)
    storage.remove(place)
    assert not storage.exists(place)


def test_list_files(root: str) -> None:
    assert storage.list_files(root) == []
    for name in ("b.txt", "deep/er/a.txt", "c.json"):
        storage.write_bytes(storage.join(root, name), name.encode())
    found = storage.list_files(root, ".txt")
    assert [storage.read_bytes(f) for f in found] == [b"b.txt", b"deep/er/a.txt"]
    assert len(storage.list_files(root)) == 3


def test_digest_is_that_of_the_whole_file(root: str) -> None:
    content = bytes(range(256)) * 5000
    storage.write_bytes(storage.join(root, "a.bin"), content)
    assert storage.digest(storage.join(root, "a.bin")) == hashlib.sha256(content).hexdigest()


def test_tables_in_parts(root: str) -> None:
    for number in (1, 0, 2):
        storage.write_table(storage.join(root, f"part-{number}.parquet"), pa.table({"n": [number]}))
    assert storage.read_table(root)["n"].to_pylist() == [0, 1, 2]
    assert storage.read_table(storage.join(root, "part-1.parquet"))["n"].to_pylist() == [1]
    with pytest.raises(FileNotFoundError, match="no Parquet parts"):
        storage.read_table(storage.join(root, "absent"))


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    place = tmp_path / "file"
    storage.write_bytes(str(place), b"old")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, broken, fail)
    with pytest.raises(OSError, match="No space"):
        storage.write_bytes(str(place), b"new")
    assert place.read_bytes() == b"old"
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
    assert storage.absolute(uri) == expected


def test_join() -> None:
    assert storage.join("s3://b/x/", "y", "z") == "s3://b/x/y/z"
