"""Jobs on a cluster of three machines of this one; the whole table is ``make
test-cluster``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import docs_page
import pytest
from machines import missing_requirements

pytest.importorskip("s3fs", reason="s3:// needs the extra s3")
pytest.importorskip("moto.server", reason="the object store is moto[server]")

from scenarios import SCENARIOS, Row, count_tracebacks

RUN = Path(__file__).with_name("run.py")
ENABLED_BY = "COIN_RAY_TEST_CLUSTER"
"""It needs the machine for itself: beside other tests a node may be too slow to answer,
and Ray takes it for lost."""
MISSING = missing_requirements()
if not os.environ.get(ENABLED_BY):
    MISSING = [*MISSING, f"the machine for itself: {ENABLED_BY}=1"]
FAULTS = "asking-10s,training-cable"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")
def test_the_commands_of_the_docs_start_a_cluster_that_survives_faults() -> None:
    completed = subprocess.run(
        [sys.executable, str(RUN), "--no-table", "--only", FAULTS],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert completed.returncode == 0, completed.stdout[-6000:]
    assert "down: no process of Ray" in completed.stdout


def test_every_command_that_is_typed_is_on_the_page_once() -> None:
    from real_cluster import SECTION

    for start in (
        "ray get-auth-token",
        "python -m pip wheel",
        "ray up",
        "ray exec",
        "ray dashboard",
        "ray job submit",
        "ray down",
    ):
        assert docs_page.command(SECTION, start).startswith(start)
    with pytest.raises(ValueError, match="expected one command that starts with"):
        docs_page.command(SECTION, "ray")


def _row(**changes: object) -> Row:
    fields = {
        "scenario": SCENARIOS[0],
        "date": "2026-11-29",
        "seconds": 61.4,
        "made": 32,
        "maybe_billed": 0,
        "served": 32,
        "differences": (),
    }
    return Row(**(fields | changes))  # type: ignore[arg-type]


def test_a_row_tells_other_figures_and_calls_without_an_account() -> None:
    assert _row().problems() == []
    assert _row(maybe_billed=4, served=34).problems() == []
    assert _row(differences=("map50",)).problems() == ["map50 differs"]
    (problem,) = _row(served=33).problems()
    assert "the server counted 33 calls, the summary 32" in problem
    assert _row(lost_nodes=1).problems() == ["Ray took 1 nodes for lost"]
    assert _row(tracebacks=2).problems() == ["2 tracebacks in the job's log"]
    assert _row(made=31, served=31).problems() == ["31 calls for 32 images"]


def test_new_rows_replace_old_ones_and_the_others_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "cluster.md"
    rows = ["| a | old |", "| b | old |"]
    table = "\n".join(["| scenario | x |", "|---|---|", *rows])
    start, end = docs_page.START_OF_TABLE, docs_page.END_OF_TABLE
    page.write_text(f"before\n{start}\n{table}\n{end}\nafter\n")
    monkeypatch.setattr(docs_page, "PAGE", page)
    docs_page.write_table(["| b | new |", "| c | new |"])
    expected = "\n".join(
        ["| scenario | x |", "|---|---|", "| a | old |", "| b | new |", "| c | new |"]
    )
    assert page.read_text() == f"before\n{start}\n{expected}\n{end}\nafter\n"


def test_exceptions_that_python_ignores_are_no_tracebacks() -> None:
    log = (
        "(_trial pid=770) Exception ignored in: <function WeakSet._remove>\n"
        "(_trial pid=770) Traceback (most recent call last):\n"
        "(_trial pid=770) SystemExit: 1\n"
    )
    assert count_tracebacks(log) == 0
    assert count_tracebacks(log + "Traceback (most recent call last):\n") == 1
