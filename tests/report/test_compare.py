from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from coin_ray.errors import InputError
from coin_ray.report.compare import write_comparison


def _write_run(
    folder: Path,
    seed: int,
    student: float,
    classes: tuple[str, ...] = ("bird", "car"),
    **settings: Any,
) -> str:
    page = folder / "steps" / f"report-{seed}" / "report.html"
    page.parent.mkdir(parents=True)
    page.write_text("")
    summary = {
        "preset": "demo",
        "seed": seed,
        "classes": classes,
        "map50": {"cloud": 0.3, "student": student},
        "map50_interval": {"student": {"low": student - 0.05, "high": student + 0.05}},
        "per_class": {"student": [student, 1 - student]},
        "calls": {"cost_usd": 1.5},
        "page": f"/elsewhere/steps/report-{seed}/report.html",
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(json.dumps({"seed": seed, "distill": settings}))
    return str(folder)


def _comparison(roots: list[str], folder: Path) -> str:
    return " ".join(
        Path(write_comparison(roots, str(folder / "out" / "all.html")))
        .read_text()
        .split()
    )


def test_runs_that_differ_in_the_seed_have_a_mean_and_a_deviation(
    tmp_path: Path,
) -> None:
    page = _comparison(
        [_write_run(tmp_path / "a", 0, 0.4), _write_run(tmp_path / "b", 1, 0.5)],
        tmp_path,
    )
    for phrase in [
        "45.0 ± 7.1 mAP50 over 2 seeds",
        "35.0 to 45.0",
        "+20.0",
        "<strong>60.0</strong>",
        '<a href="../a/steps/report-0/report.html">a</a>',
    ]:
        assert phrase in page, phrase


def test_settings_that_differ_are_listed_and_no_mean_is_taken(tmp_path: Path) -> None:
    page = _comparison(
        [
            _write_run(tmp_path / "a", 0, 0.4, private=1.0, batch=8),
            _write_run(tmp_path / "b", 0, 0.5, private=2.0, batch=8),
        ],
        tmp_path,
    )
    assert '<th scope="row">distill.private</th><td>1.0</td><td>2.0</td>' in page
    assert "distill.batch" not in page
    assert "±" not in page


def test_runs_of_other_classes_have_no_table_by_class(tmp_path: Path) -> None:
    page = _comparison(
        [
            _write_run(tmp_path / "a", 0, 0.4),
            _write_run(tmp_path / "b", 0, 0.5, classes=("cat", "dog")),
        ],
        tmp_path,
    )
    assert "By class" not in page


def test_text_of_users_is_escaped_in_a_comparison(tmp_path: Path) -> None:
    evil = "<script>alert(1)<"
    page = _comparison(
        [
            _write_run(tmp_path / evil, 0, 0.4, (evil, "car")),
            _write_run(tmp_path / "b", 0, 0.5, (evil, "car"), name=evil),
        ],
        tmp_path,
    )
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;") >= 3


def test_a_folder_without_a_run_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no summary\.json; run coin-ray adapt"):
        write_comparison(
            [_write_run(tmp_path / "a", 0, 0.4), str(tmp_path)],
            str(tmp_path / "all.html"),
        )
