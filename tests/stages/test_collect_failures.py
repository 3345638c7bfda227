"""What a collection does with images that failed; without a cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from coin_ray import storage, tables
from coin_ray.cloud.journal.base import CallAccount
from coin_ray.config import Cloud, PipelineConfig
from coin_ray.config.presets import folder
from coin_ray.errors import BudgetExhausted, CloudError
from coin_ray.runs.steps import Context
from coin_ray.stages.collect import (
    _check_error_share,
    _remaining_images,
    _show_collected,
)
from coin_ray.stages.collecting.call_account import RunAccount
from coin_ray.stages.collecting.cloud_actor import STOPPED
from coin_ray.stages.collecting.parts import PART_SCHEMA, CollectedParts
from coin_ray.stages.common.watchdog import Watchdog

OUTAGE = "DeadlineExceeded: no answer in 60 s"
IMAGES = pa.table(
    {"image_id": list("abcd"), "uri": [f"/photos/{i}.jpg" for i in "abcd"]}
)


def _rows(errors: dict[str, str], schema: pa.Schema) -> pa.Table:
    rows = [
        dict.fromkeys(schema.names)
        | {
            "image_id": image_id,
            "status": "error" if image_id in errors else "ok",
            "error": errors.get(image_id),
            "calls": 1,
            "cost_usd": 0.1,
        }
        for image_id in IMAGES["image_id"].to_pylist()
    ]
    return pa.Table.from_pylist(rows, schema=schema)


def _context(tmp_path: Path, share: float = 0.2) -> Context[PipelineConfig]:
    cloud = Cloud(url="https://detector.example.com", max_error_share=share)
    config = replace(folder(), classes=("car",), cloud=cloud)
    return Context(config, str(tmp_path), str(tmp_path), {}, {}, "collect")


@pytest.mark.parametrize(
    ("failed", "share", "stops"),
    [
        ("abcd", 0.2, True),
        ("a", 0.2, True),
        ("a", 0.25, False),
        ("", 0.0, False),
        ("abcd", 1.0, False),
    ],
)
def test_the_share_of_failed_images_counts_however_few_images_there_are(
    failed: str,
    share: float,
    stops: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    context = _context(tmp_path, share)
    table = _rows(dict.fromkeys(failed, OUTAGE), tables.DETECTIONS)
    storage.write_table(storage.join(context.folder, "cloud.parquet"), table)
    message = ""
    if stops:
        with pytest.raises(CloudError) as error:
            _check_error_share(context, IMAGES)
        message = str(error.value)
        assert f"cloud.max_error_share={share:g}" in message
        assert error.value.exit_code == 1
    else:
        _check_error_share(context, IMAGES)
        message = capsys.readouterr().out
    if failed:
        assert f"{len(failed)} of 4 images failed" in message
        assert OUTAGE in message
        assert "/photos/a.jpg" in message
    else:
        assert message == ""


def _batches(*statuses: tuple[str, str, str | None]) -> Iterator[pa.Table]:
    for image_id, status, error in statuses:
        row = {"image_id": image_id, "status": status, "error": error}
        yield pa.Table.from_pylist([row | {"calls": 1, "cost_usd": 0.1}])


SPENT = json.dumps({"type": "BudgetExhausted", "message": "3 calls are spent"})


def test_the_commonest_reason_is_told_when_the_budget_ends(
    capsys: pytest.CaptureFixture[str],
) -> None:
    batches = _batches(
        ("a", "error", "ProtocolError: no JSON at 17"),
        ("b", "error", OUTAGE),
        ("c", "error", "ProtocolError: no JSON at 240"),
        ("d", STOPPED, SPENT),
    )
    with pytest.raises(BudgetExhausted, match="3 calls are spent"):
        _show_collected(batches, IMAGES, 0, Watchdog("test", 0))
    assert (
        "collect: 3 of 3 images failed; the commonest reason (2 images): ProtocolError:"
        " no JSON at 17; for example /photos/a.jpg" in capsys.readouterr().out
    )


def test_the_reason_is_told_when_the_stream_breaks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def broken() -> Iterator[pa.Table]:
        yield from _batches(("a", "error", OUTAGE), ("b", "ok", None))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _show_collected(broken(), IMAGES, 2, Watchdog("test", 0))
    output = capsys.readouterr().out
    assert f"1 of 4 images failed; the reason: {OUTAGE}" in output


def test_the_last_line_counts_the_calls_of_a_worker_that_was_lost(
    capsys: pytest.CaptureFixture[str],
) -> None:
    batches = _batches(("a", "ok", None), ("b", "ok", None))
    accounts = iter([CallAccount(1, 0.1), CallAccount(6, 0.6, ("a" * 16,))])
    _show_collected(
        batches, IMAGES, 2, Watchdog("test", 0), lambda: RunAccount(next(accounts))
    )
    last_line = capsys.readouterr().err.splitlines()[-1]
    assert last_line == "collect: 4/4 6 calls, 0 failed, $0.60"


@pytest.mark.parametrize(
    ("retry_refused", "remaining"), [(False, ["b", "c"]), (True, ["b", "c", "d"])]
)
def test_images_that_are_asked_again(
    retry_refused: bool, remaining: list[str], tmp_path: Path
) -> None:
    errors = {
        "b": OUTAGE,
        "c": "FileNotFoundError: /photos/c.jpg",
        "d": "Refused: the service answered 451",
    }
    table = _rows(errors, PART_SCHEMA)
    storage.write_table(str(tmp_path / "parts" / "0.parquet"), table)
    parts = CollectedParts(str(tmp_path / "parts"))
    images = _remaining_images(IMAGES, parts, retry_refused)
    assert images["image_id"].to_pylist() == remaining
    no_parts = CollectedParts(str(tmp_path / "none"))
    assert _remaining_images(IMAGES, no_parts, retry_refused).equals(IMAGES)
