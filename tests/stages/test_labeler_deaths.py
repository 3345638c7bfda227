"""An image that kills the process that labels it, and one on which it hangs."""

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
import pyarrow.compute as pc
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.detections import AnswerConverter
from coin_ray.cloud.protocol import RawDetections
from coin_ray.config.presets import folder
from coin_ray.stages.collecting.cloud_actor import AnsweredImage, answer_table
from coin_ray.stages.collecting.labeler_actor import LabelerActor

class PoisonedLabeler(LabelerActor):
    def _label(self, answers):
        is_poison = pc.equal(answers["image_id"], "poison")
        is_alive = pc.not_equal(answers["status"], "error")
        if pc.any(pc.and_(is_poison, is_alive)).as_py():
            time.sleep(60) if sys.argv[2] == "hang" else os._exit(9)
        return super()._label(answers)

preset = folder()
config = replace(
    preset,
    classes=("car",),
    cloud=replace(preset.cloud, url="https://detector.example.com"),
    collect=replace(preset.collect, labeler="none", batch_seconds=2.0),
)
boxes = np.array([[0, 0, 9, 9]], np.float32)
detections = RawDetections(boxes, np.array([[0.9]], np.float32), "per_class")
answer = Answer("ok", detections, 1, 1.0, 0.1, calls=1)
images = [AnsweredImage(name, b"", answer) for name in ("a", "poison", "b")]
batch = answer_table(images, AnswerConverter(config))
for _ in range(4):  # a process each, that need not load the libraries anew
    labeler = os.fork()
    if not labeler:
        PoisonedLabeler(config, sys.argv[1])(batch)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(labeler, 0)[1]), flush=True)
"""


@pytest.mark.parametrize(
    ("fault", "exit_code"), [("crash", 9), ("hang", STALLED_EXIT_CODE)]
)
@pytest.mark.slow
def test_an_image_that_costs_labelers_is_given_up_after_three_and_the_others_are_kept(
    tmp_path: Path, fault: str, exit_code: int
) -> None:
    parts = str(tmp_path / "parts")
    labelers = subprocess.run(
        [sys.executable, "-c", LABELER, parts, fault],
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    exit_codes = [int(line) for line in labelers.stdout.split()]
    if fault == "hang":
        message = "a labeler: no progress for 2 s, exiting (70)"
        assert labelers.stderr.count(message) == 3
        assert "in _label\n" in labelers.stderr, "where it hung"
    assert exit_codes == [exit_code, exit_code, exit_code, 0]
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
