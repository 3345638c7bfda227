"""An image that kills the process that labels it, and one that never lets it go."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from coin_ray import storage
from coin_ray.stages.common.watchdog import STALLED_EXIT_CODE

LABELER = """
import os, sys, time
from dataclasses import replace
import numpy as np
import pyarrow as pa
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.protocol import RawDetections
from coin_ray.config.presets import folder
from coin_ray.stages.collecting.cloud_actor import ANSWER_SCHEMA, _raw_row
from coin_ray.stages.collect import LabelerActor

class Poisoned(LabelerActor):
    def _labelled(self, row):
        if row["image_id"] == "poison" and row["status"] != "error":
            time.sleep(60) if sys.argv[2] == "hang" else os._exit(9)
        return super()._labelled(row)

preset = folder()
used = replace(preset, classes=("car",), cloud=replace(preset.cloud, url="https://detector.example.com"),
               collect=replace(preset.collect, labeler="none", batch_seconds=2.0))
box = Answer("ok", RawDetections(np.array([[0, 0, 9, 9]], np.float32), np.array([[0.9]], np.float32), "per_class"), 1, 1.0, 0.1, calls=1)
rows = [_raw_row(name, b"", box) for name in ("a", "poison", "b")]
for _ in range(4):  # a process each, that need not load the libraries anew
    labeler = os.fork()
    if not labeler:
        Poisoned(used, sys.argv[1])(pa.Table.from_pylist(rows, schema=ANSWER_SCHEMA))
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(labeler, 0)[1]), flush=True)
"""


@pytest.mark.parametrize(("fault", "code"), [("crash", 9), ("hang", STALLED_EXIT_CODE)])
def test_an_image_that_costs_labelers_is_given_up_after_three_and_the_others_are_kept(
    tmp_path: Path, fault: str, code: int
) -> None:
    parts = str(tmp_path / "parts")
    done = subprocess.run(
        [sys.executable, "-c", LABELER, parts, fault],
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    codes = [int(line) for line in done.stdout.split()]
    if fault == "hang":
        assert done.stderr.count("a labeler: nothing has happened for 2 s") == 3
        assert "in _labelled" in done.stderr, "where it hung"
    assert codes == [code, code, code, 0]
    rows = {row["image_id"]: row for row in storage.read_table(parts).to_pylist()}
    assert {name: row["status"] for name, row in rows.items()} == {
        "a": "ok",
        "poison": "error",
        "b": "ok",
    }
    assert "has died 2 times with it" in rows["poison"]["error"]
    assert [len(rows[name]["boxes"]) for name in ("a", "poison", "b")] == [1, 0, 1]
    assert storage.list_files(f"{parts}_begun") == []
    print(f"{fault}: 3 labelers ended by one image; lost: that image")
