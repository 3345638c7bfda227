from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.protocol import RawDetections
from coin_ray.commands.main import main
from coin_ray.config.presets import demo
from coin_ray.experiments.rendering_comparison import (
    SHEET_GAP,
    SHEET_SIDE,
    RenderingConfidence,
    draw_contact_sheet,
    measure_confidence,
)

FIRST_LINES = (
    "demo",
    "--cloud.serve-latency",
    "0",
    "--cloud.serve-faults",
    "0",
    "--data.train",
    "6",
    "--data.val",
    "0",
    "--data.test",
    "1",
)


def _raw(*scores: list[float]) -> RawDetections:
    boxes = np.tile(np.array([[0, 0, 10, 10]], np.float32), (len(scores), 1))
    return RawDetections(boxes, np.array(scores, np.float32).reshape(-1, 2), "label")


def test_confidence_by_hand() -> None:
    """Best scores .8, 0 (nothing seen) and .2; two boxes from .3 on; the image without
    an answer counts in neither."""
    confidence = measure_confidence(
        "grey", [_raw([0.8, 0.1], [0.0, 0.5]), _raw(), _raw([0.1, 0.2]), None]
    )
    assert (confidence.rendering, confidence.failed) == ("grey", 1)
    assert confidence.best_score == pytest.approx((0.8 + 0 + 0.2) / 3)
    assert confidence.boxes == pytest.approx(2 / 3)
    assert measure_confidence("grey", [None, None]) == RenderingConfidence(
        "grey", 0.0, 0.0, 2
    )


@pytest.mark.slow
def test_renderings_of_the_demo_are_compared_and_paid_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over the local cloud: a table with the most confident first, a picture, and nothing to
    pay the second time."""
    command = [
        *FIRST_LINES,
        "--root",
        str(tmp_path),
        "--sample",
        "4",
        "--in",
        "plain",
        "mirrored+reduced",
    ]
    assert main(["collect", "views", *command]) == 0
    printed = capsys.readouterr().out
    assert "4 images in 2 renderings" in printed
    assert "--cloud.views plain" in printed
    assert open_journal(str(tmp_path / "journal")).spent()[0] == 8
    with Image.open(io.BytesIO((tmp_path / "views.png").read_bytes())) as sheet:
        assert sheet.size == (
            2 * (SHEET_SIDE + SHEET_GAP),
            SHEET_GAP + 4 * (SHEET_SIDE + SHEET_GAP),
        )
    assert main(["collect", "views", *command]) == 0
    assert open_journal(str(tmp_path / "journal")).spent()[0] == 8


@pytest.mark.slow
def test_a_file_that_is_gone_has_no_answer_and_the_others_are_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [*FIRST_LINES, "--root", str(tmp_path), "--in", "plain", "inverted"]
    assert main(["collect", "views", *command, "--sample", "1"]) == 0
    next(iter(sorted(tmp_path.glob("steps/images-*/images/train_*")))).unlink()
    capsys.readouterr()
    assert main(["collect", "views", *command, "--sample", "6"]) == 0
    rows = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("│")
    ]
    assert [row.split("│")[-2].strip() for row in rows] == ["1", "1"]
    with Image.open(tmp_path / "views.png") as sheet:
        assert sheet.height == SHEET_GAP + 5 * (SHEET_SIDE + SHEET_GAP)


def test_a_panorama_is_shown_too(tmp_path: Path) -> None:
    """Six pixels high, which no service would take, and is only to be looked at."""
    Image.new("RGB", (2400, 60), "red").save(tmp_path / "wide.png")
    config = replace(
        demo(), cloud=replace(demo().cloud, views=("plain", "inverted+reduced"))
    )
    with Image.open(
        io.BytesIO(
            draw_contact_sheet(config, [str(tmp_path / "wide.png")], [[None, None]])
        )
    ) as sheet:
        assert sheet.size == (
            2 * (SHEET_SIDE + SHEET_GAP),
            2 * SHEET_GAP + SHEET_SIDE,
        )


@pytest.mark.slow
def test_a_budget_stops_it_and_keeps_what_was_paid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        *FIRST_LINES,
        "--root",
        str(tmp_path),
        "--sample",
        "4",
        "--in",
        "plain",
        "grey",
        "--cloud.max-calls",
        "3",
    ]
    assert main(["collect", "views", *command]) != 0
    assert "BudgetExhausted" in capsys.readouterr().err
    assert open_journal(str(tmp_path / "journal")).spent()[0] == 3
    assert not (tmp_path / "views.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sample", "0"], "--sample"),
        (["--in", "sideways"], "mirrored, grey"),
        (["--in", "grey", "grey"], "once"),
    ],
)
def test_what_cannot_be_asked(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert (
        main(["collect", "views", *FIRST_LINES, "--root", str(tmp_path), *arguments])
        == 2
    )
    assert message in capsys.readouterr().err


def test_a_dry_run_says_what_it_would_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (
        main(
            [
                "collect",
                "views",
                *FIRST_LINES,
                "--root",
                str(tmp_path),
                "--dry-run",
                "--sample",
                "50",
                "--cloud.usd-per-call",
                "0.01",
            ]
        )
        == 0
    )
    assert (
        "50 images in 6 views, 0 answered already, at most 300 calls to make, $3.00"
        in capsys.readouterr().out
    )
    assert not (tmp_path / "journal").exists()
