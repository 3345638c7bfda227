"""Reading a JSON file in parts gives what ``json`` gives, wherever the parts end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coin_ray.data.formats import json_stream
from coin_ray.data.formats.json_stream import iterate_json
from coin_ray.errors import InputError

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-9, 9) | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)
ENTRIES = st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=3) | VALUES)


def _read(path: Path) -> dict[str, list[Any]]:
    lists: dict[str, list[Any]] = {}
    for key, position, entry in iterate_json(str(path), "json", frozenset("ab")):
        if position >= 0:
            assert position == len(lists.setdefault(key, []))
            lists[key].append(entry)
        else:
            lists.setdefault(key, [])
    return lists


@pytest.fixture(params=[(1, 1), (7, 3), (64, 16), (1 << 20, 1 << 14)])
def chunks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk_bytes, entry_characters = request.param
    monkeypatch.setattr(json_stream, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(json_stream, "ENTRY_CHARACTERS", entry_characters)


@settings(deadline=None)
@given(
    a=ENTRIES,
    b=ENTRIES,
    other=VALUES,
    layout=st.sampled_from(
        [
            {},
            {"indent": 1},
            {"separators": (",", ":")},
            {"separators": (",\n", ": ")},
            {"ensure_ascii": False},
        ]
    ),
)
@pytest.mark.usefixtures("chunks")
def test_all_entries_are_read(
    tmp_path_factory: pytest.TempPathFactory,
    a: list[Any],
    b: list[Any],
    other: Any,
    layout: dict[str, Any],
) -> None:
    path = tmp_path_factory.mktemp("json") / "a.json"
    text = json.dumps({"a": a, "other": other, "b": b}, **layout)
    path.write_text(text, encoding="utf-8-sig", errors="surrogatepass")
    assert _read(path) == {"a": a, "b": b}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{\n"a": [{"x": 1},\n {"x": ]}', "line 3, column 8"),
        ('{"a": [1 2]}', "expected ','.* line 1, column 10"),
        ('{"a": [{"x": 1},]}', "expected another entry in line 1, column 17"),
        ('{"a": [1', "line 1, column 9"),
        ('{"a": [1]} x', "expected the end of the file in line 1, column 12"),
        ('{"a": [], "a": []}', "'a' twice"),
        ("[1]", "expected an object at its start"),
        ('{"a": 3}', "expected a list, got int"),
        ('{"a": "\xff"}'.encode("latin-1"), "not text in UTF-8"),
        ("", "expected an object"),
    ],
)
@pytest.mark.usefixtures("chunks")
def test_errors_name_line_and_column(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message):
        _read(path)
