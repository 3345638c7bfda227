"""Killed again and again with SIGKILL: the answers are those of an undisturbed run, and
no call that was paid is paid again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from . import storm
from .counting_server import BILLED, FAULTS

STORMS = [
    pytest.param(250, 12, id="12 kills"),
    pytest.param(1000, 50, id="50 kills", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("images", "kills"), STORMS)
def test_killed_repeatedly(tmp_path: Path, images: int, kills: int) -> None:
    with storm.counting_server(faults=0.08, seed=5) as url:
        report = storm.run_storm(
            url=url,
            folder=str(tmp_path / "storm"),
            images=images,
            kills=kills,
            seed=11,
            records=60,
        )
        calls = storm.fetch_json(f"{url}/stats")["calls"]
    with storm.counting_server() as url:
        undisturbed = storm.run_storm(
            url=url,
            folder=str(tmp_path / "undisturbed"),
            images=images,
            kills=0,
            seed=0,
            records=0,
        )
    assert report["kills"] == kills
    _check_table(report["table"], undisturbed["table"], images)
    _check_calls([tuple(call) for call in calls], report["states"], images)


def _check_table(
    table: dict[str, Any], undisturbed: dict[str, Any], images: int
) -> None:
    assert len(table) == images
    assert Counter(status for status, *_ in undisturbed.values()) == {"ok": images}
    assert {status for status, *_ in table.values()} == {"ok", "cached"}
    detections = {image: row[2] for image, row in table.items()}
    assert detections == {image: row[2] for image, row in undisturbed.items()}
    assert len({str(row[2]) for row in undisturbed.values()}) == images, (
        "answers must differ, or a mix-up would go unnoticed"
    )


def _check_calls(
    calls: list[tuple[str, str]], states: list[dict[str, Any]], images: int
) -> None:
    """Check the server's calls against the journal's ``states``: after each kill, and
    after each pass that was not killed.

    A broken body is recorded too. If the process is killed before it decodes the body,
    the next run cannot read it and rightly sends the request again.
    """
    assert {kind for _, kind in calls} == {"ok", *FAULTS}
    begin, lost_calls = 0, 0
    recorded: set[str] = set()
    readable: set[str] = set()
    for state in states:
        end = state["received"]
        run = calls[begin:end]
        assert not readable & {key for key, _ in run}, (
            "a request was sent again although its response was on record"
        )
        recorded = set(state["recorded"])
        last_kind = dict(calls[:end])
        readable = {key for key in recorded if last_kind[key] != "broken"}
        lost = [key for key, kind in run if kind == "ok" and key not in recorded]
        assert len(lost) <= storm.IN_FLIGHT
        lost_calls += len(lost)
        billed = sum(kind in BILLED for _, kind in calls[:end])
        assert billed <= state["spent"][0], (
            "the service counted a call that the journal did not"
        )
        begin = end
    assert len(recorded) == images
    assert lost_calls > 0, "no kill hit a call: the storm is too weak"
    faults = Counter(kind for _, kind in calls if kind != "ok")
    billed_faults = sum(count for kind, count in faults.items() if kind in BILLED)
    billed_calls = sum(kind in BILLED for _, kind in calls)
    assert billed_calls <= images + billed_faults + lost_calls
