from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coin_ray.cloud.answer import Answer
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.protocol import RawDetections
from coin_ray.commands.main import main
from coin_ray.config import ClassPrompt, Cloud
from coin_ray.config.presets import folder
from coin_ray.errors import ConfigError
from coin_ray.experiments.teacher_comparison import (
    Teacher,
    configs_by_phrases,
    measure_teachers,
)

CONFIG = replace(
    folder(), classes=("a", "b"), cloud=Cloud(url="https://x", usd_per_call=0.01)
)
LEFT, RIGHT = (0.0, 0.0, 10.0, 10.0), (50.0, 0.0, 60.0, 10.0)


def _answer(
    *rows: tuple[tuple[float, float, float, float], tuple[float, float]],
    latency: float = 100.0,
) -> Answer:
    boxes = np.array([box for box, _ in rows], np.float32).reshape(-1, 4)
    scores = np.array([scores for _, scores in rows], np.float32).reshape(-1, 2)
    raw = RawDetections(boxes, scores, "per_class")
    return Answer("ok", raw, attempts=1, latency_ms=latency)


def _teacher(name: str) -> Teacher:
    return Teacher(name, CONFIG, CONFIG.cloud)


def test_figures_by_hand() -> None:
    """The first two agree on the left box; only the first has the right one, and a box
    of a low score that does not count; the third calls the left box "b"."""
    first = [
        _answer((LEFT, (0.9, 0)), (RIGHT, (0, 0.7)), (RIGHT, (0.2, 0))),
        _answer(latency=300.0),
    ]
    second = [_answer((LEFT, (0.8, 0))), _answer()]
    third = [_answer((LEFT, (0, 0.6))), None]
    figures = measure_teachers(
        [_teacher(name) for name in "xyz"], [first, second, third]
    )
    x, y, z = figures
    assert (x.boxes, y.boxes, z.boxes) == (1, 0.5, 1)
    assert x.best_score == pytest.approx(0.45)
    # x and y: two of three boxes; x and z, y and z: none
    assert x.agreement == pytest.approx((2 / 3 + 0) / 2)
    assert y.agreement == pytest.approx((2 / 3 + 0) / 2)
    assert z.agreement == 0
    # y's only box is confirmed by half of the others, z's by none
    assert y.calibration_error == pytest.approx(1 - 0.8)
    assert z.calibration_error == pytest.approx(0.6)
    assert x.calibration_error == pytest.approx((0.1 + 0.7) / 2)
    assert (x.latency_ms, z.failed) == (200, 1)
    assert x.usd_per_1000 == pytest.approx(10)


def test_a_single_teacher_has_nothing_to_agree_with() -> None:
    (figures,) = measure_teachers([_teacher("x")], [[_answer((LEFT, (0.9, 0)))]])
    assert math.isnan(figures.agreement)
    assert math.isnan(figures.calibration_error)
    cached = Answer("cached", _answer().raw)
    (figures,) = measure_teachers([_teacher("x")], [[cached]])
    assert math.isnan(figures.latency_ms)


def test_negatives_are_part_of_the_price() -> None:
    prompt = ClassPrompt("a", ("one", "two"), negatives=("three",))
    config = replace(CONFIG, class_prompts=(prompt,))
    (figures,) = measure_teachers(
        [Teacher("x", config, config.cloud)], [[_answer((LEFT, (0.9, 0)))]]
    )
    assert figures.usd_per_1000 == pytest.approx(20)


def test_files_of_phrases(tmp_path: Path) -> None:
    file = tmp_path / "phrases.yaml"
    file.write_text("a: {ask: [one]}\nb:\n")
    (_, plain), (name, config) = configs_by_phrases(CONFIG, [str(file)])
    assert plain is CONFIG
    assert name == "phrases.yaml"
    assert config.class_phrases == (("one",), ("b",))
    file.write_text("b:\na:\n")
    with pytest.raises(ConfigError, match="in their order: a, b"):
        configs_by_phrases(CONFIG, [str(file)])


def test_calls_of_a_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "phrases.yaml"
    file.write_text("a: {ask: [one], not: [two]}\n")
    arguments = ["folder", "--images", "x", "--classes", "a", "--cloud", "https://a"]
    arguments += ["--cloud.usd-per-call", "0.01", "--phrases", str(file)]
    assert main(["teachers", "compare", *arguments, "--sample", "5", "--dry-run"]) == 0
    assert "at most 15 calls, $0.15" in capsys.readouterr().out
    assert main(["teachers", "rank"]) == 2


@pytest.mark.slow
def test_renderings_of_the_demo_as_teachers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "demo",
        *("--cloud.serve-latency", "0", "--cloud.serve-faults", "0"),
        *("--data.train", "6", "--data.val", "0", "--data.test", "1"),
        *("--cloud.views", "plain", "mirrored"),
        *("--root", str(tmp_path), "--sample", "3"),
    ]
    assert main(["teachers", "compare", *command]) == 0
    printed = capsys.readouterr().out
    assert "3 images, 2 teachers" in printed
    assert open_journal(str(tmp_path / "journal")).spent()[0] == 6
    with Image.open(io.BytesIO((tmp_path / "teachers.png").read_bytes())) as sheet:
        assert sheet.width > sheet.height / 2
    assert main(["teachers", "compare", *command]) == 0
    assert open_journal(str(tmp_path / "journal")).spent()[0] == 6
