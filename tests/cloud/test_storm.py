"""Killed again and again with SIGKILL: the answers are those of a quiet run, and
nothing that was paid is paid again."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from . import storm
from .counting_server import BILLED, FAULTS

IMAGES, KILLS = 1000, 50


def test_fifty_kills(tmp_path: Path) -> None:
    with storm.server(faults=0.08, seed=5) as url:
        report = storm.run(
            url=url,
            folder=str(tmp_path / "storm"),
            images=IMAGES,
            kills=KILLS,
            seed=11,
            records=60,
        )
        calls = storm.fetched(f"{url}/stats")["calls"]
    with storm.server() as url:
        quiet = storm.run(
            url=url,
            folder=str(tmp_path / "quiet"),
            images=IMAGES,
            kills=0,
            seed=0,
            records=0,
        )
    assert report["kills"] == KILLS
    check_table(report["table"], quiet["table"])
    check_calls([tuple(call) for call in calls], report["states"])


def check_table(stormy: dict[str, Any], quiet: dict[str, Any]) -> None:
    assert len(stormy) == IMAGES
    assert Counter(status for status, *_ in quiet.values()) == {"ok": IMAGES}
    assert {status for status, *_ in stormy.values()} == {"ok", "cached"}
    assert {image: row[2] for image, row in stormy.items()} == {
        image: row[2] for image, row in quiet.items()
    }
    assert len({str(row[2]) for row in quiet.values()}) == IMAGES, (
        "answers must differ, or a mix-up would go unseen"
    )


def check_calls(calls: list[tuple[str, str]], states: list[dict[str, Any]]) -> None:
    """``states``: after each kill, and after the passes that were left alone.

    A broken body is on record too. Killed before it was decoded, the next run finds it
    there, can't read it, and asks again: rightly.
    """
    assert {kind for _, kind in calls} == {"ok", *FAULTS}
    begin, under_way = 0, 0
    recorded: set[str] = set()
    readable: set[str] = set()
    for state in states:
        run = calls[begin : state["received"]]
        assert not readable & {key for key, _ in run}, (
            "asked again about an image whose answer was on record"
        )
        recorded, last = set(state["recorded"]), dict(calls[: state["received"]])
        readable = {key for key in recorded if last[key] != "broken"}
        lost = [key for key, kind in run if kind == "ok" and key not in recorded]
        assert len(lost) <= storm.IN_FLIGHT
        under_way += len(lost)
        billed = sum(kind in BILLED for _, kind in calls[: state["received"]])
        assert billed <= state["spent"][0], (
            "the service counted a call that the journal did not"
        )
        begin = state["received"]
    assert len(recorded) == IMAGES
    assert under_way > 0, "no kill hit a call: the storm is too weak"
    faults = Counter(kind for _, kind in calls if kind != "ok")
    billed_faults = sum(count for kind, count in faults.items() if kind in BILLED)
    assert (
        sum(kind in BILLED for _, kind in calls) <= IMAGES + billed_faults + under_way
    )
