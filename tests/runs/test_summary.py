from __future__ import annotations

import json
from typing import Any

import pytest

from coin_ray.config.presets import demo
from coin_ray.runs.summary import gap_closed, summarise


@pytest.mark.parametrize(
    ("map50", "expected"),
    [
        ({"student": 0.5, "cloud": 0.4, "oracle": 0.6}, 0.5),
        ({"student": 0.3, "cloud": 0.4, "oracle": 0.6}, -0.5),
        ({"student": 0.7, "cloud": 0.4, "oracle": 0.6}, 1.5),
        ({"student": 0.4, "cloud": 0.4, "oracle": 0.7}, 0.0),
        ({"student": 0.0, "cloud": 0.0, "oracle": 0.3}, 0.0),
        ({"student": 0.5, "cloud": 0.6, "oracle": 0.6}, None),
        ({"student": 0.5, "cloud": 0.6, "oracle": 0.4}, None),
        ({"student": 0.5, "cloud": 0.4}, None),
        ({"student": None, "cloud": 0.4, "oracle": 0.6}, None),
        ({}, None),
    ],
)
def test_gap_closed(map50: dict[str, float | None], expected: float | None) -> None:
    assert gap_closed(map50) == expected


def test_a_run_that_has_only_begun() -> None:
    summary = summarise(
        demo(),
        {"images": {"metrics": {"count": {"train": 5}, "rejected": 2}, "seconds": 1.5}},
    )
    assert (
        summary["images"],
        summary["rejected"],
        summary["gap_closed"],
        summary["map50"],
    ) == ({"train": 5}, 2, None, {})
    assert summary["seconds"] == {"images": 1.5, "total": 1.5}
    assert "note" not in summary
    json.dumps(summary, allow_nan=False)


def test_figures_come_from_the_manifests() -> None:
    map50 = {"cloud": 0.4, "student": 0.55, "oracle": 0.7}
    metrics: dict[str, dict[str, Any]] = {
        "collect": {"calls": {"made": 7}},
        "separate": {"separation": {"consistent": 3}},
        "evaluate": {"map50": map50, "per_class": {"cat": 1.0}, "note": "few images"},
    }
    summary = summarise(
        demo(), {name: {"metrics": m, "seconds": 2.0} for name, m in metrics.items()}
    )
    assert summary["map50"] == map50
    assert summary["gap_closed"] == 0.5
    assert (summary["calls"], summary["separation"]) == ({"made": 7}, {"consistent": 3})
    assert (summary["per_class"], summary["note"]) == ({"cat": 1.0}, "few images")
    assert summary["seconds"]["total"] == 6
    assert summary["versions"]["torch"]
