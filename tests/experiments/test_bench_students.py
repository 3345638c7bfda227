"""The table of ``make bench-students``: what its runs are, and how it is computed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from coin_ray.report.methods import DASH
from coin_ray.runs.graph import build_steps

FILE = Path(__file__).parents[1] / "benchmarks" / "bench_students.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_students", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


def _run(seed: int, coin: float, plain: float, winner: str) -> dict[str, Any]:
    chosen = coin if winner == "coin" else plain
    return {
        "set": "carla",
        "student": "yolox-nano",
        "seed": seed,
        "map50": {
            "cloud": 0.4,
            "coin": coin,
            "pseudo_label": plain,
            "student": chosen,
        },
        "winner": winner,
        "choice_is_right": chosen == max(coin, plain),
        "choice_cost": max(coin, plain) - chosen,
    }


def test_table_of_means_deviations_and_choices(bench: ModuleType) -> None:
    runs = [_run(0, 0.5, 0.4, "coin"), _run(1, 0.5, 0.6, "coin")]
    grouped = bench.group_figures(runs)
    summary = grouped["carla, yolox-nano"]
    assert summary["map50"]["pseudo_label"]["mean"] == 0.5
    assert summary["map50"]["pseudo_label"]["std"] == pytest.approx(0.1414, abs=1e-4)
    assert summary["choice"]["right"] == 1
    assert summary["choice"]["cost"] == pytest.approx(0.05)
    lines = bench.format_table(grouped).splitlines()
    assert lines[2] == (
        f"| carla, yolox-nano | 2 | 40.0 | {DASH} | 50.0 ± 14.1 | 50.0 | 50.0 | {DASH} |"
        " 1 of 2 | 5.0 |"
    )


def test_written_page_keeps_the_text_around_the_table(
    bench: ModuleType, tmp_path: Path
) -> None:
    page = tmp_path / "students.md"
    page.write_text(f"# Title\n\nabove\n\n{bench.BEGIN}\nold\n{bench.END}\n\nbelow\n")
    bench.write_results(tmp_path, [_run(0, 0.5, 0.4, "coin")], "make it", amp=True)
    text = page.read_text()
    assert text.startswith("# Title\n\nabove\n")
    assert text.endswith("\n\nbelow\n")
    assert "old" not in text
    assert "carla, yolox-nano" in text
    assert "bfloat16" in text


@pytest.mark.parametrize("student", ["yolox-nano", "faster-rcnn"])
def test_sets_of_the_same_images_share_the_oracle(
    bench: ModuleType, student: str
) -> None:
    once = bench.build_config("thermal-once", student, "/assets")
    three = bench.build_config("thermal-three", student, "/assets")
    steps = [build_steps(config, baselines=True) for config in (once, three)]
    assert steps[0]["oracle"].fingerprint == steps[1]["oracle"].fingerprint
    assert steps[0]["distill"].fingerprint != steps[1]["distill"].fingerprint
    assert "choose" in steps[0]
