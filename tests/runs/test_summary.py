from __future__ import annotations

import json

import pytest

from coin_ray.config.presets import demo
from coin_ray.report.run_summary import RunSummary
from coin_ray.runs.steps import Manifest, Metrics
from coin_ray.runs.summary import build_summary, gap_closed


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
    metrics = {"count": {"train": 5}, "rejected": 2}
    summary = build_summary(demo(), {"images": Manifest(metrics=metrics, seconds=1.5)})
    assert summary.images == {"train": 5}
    assert summary.rejected == 2
    assert summary.gap_closed is None
    assert summary.map50 == {}
    assert summary.seconds == {"images": 1.5, "total": 1.5}
    assert summary.note is None
    json.dumps(summary.to_json(), allow_nan=False)


def test_figures_come_from_the_manifests() -> None:
    map50 = {"cloud": 0.4, "student": 0.55, "oracle": 0.7}
    metrics: dict[str, Metrics] = {
        "collect": {"calls": {"made": 7}},
        "separate": {"separation": {"consistent": 3}},
        "evaluate": {"map50": map50, "per_class": {"cat": [1.0]}, "note": "few images"},
    }
    manifests = {
        name: Manifest(metrics=step_metrics, seconds=2.0)
        for name, step_metrics in metrics.items()
    }
    summary = build_summary(demo(), manifests).to_json()
    assert summary["map50"] == map50
    assert summary["gap_closed"] == 0.5
    assert summary["calls"] == {"made": 7}
    assert summary["separation"] == {"consistent": 3}
    assert summary["per_class"] == {"cat": (1.0,)}
    assert summary["note"] == "few images"
    assert summary["seconds"]["total"] == 6
    assert summary["versions"]["torch"]


def test_a_summary_is_written_with_the_keys_of_earlier_versions() -> None:
    """Keys, and nothing else: comparisons read the summaries of all versions."""
    figures = {
        "preset": "demo",
        "seed": 0,
        "classes": ["cat"],
        "gap_closed": None,
        "images": {"train": 5, "test": 3},
        "rejected": 0,
        "in_both": 0,
        "map50": {"cloud": 0.4, "student": None},
        "separation": {"consistent": 3, "inconsistent": 2, "private": 1},
        "calls": {"made": 7, "cached": 1, "failed": 0, "cost_usd": 0.5},
        "seconds": {"total": 3.5},
        "versions": {"torch": "2"},
        "map50_unknown": {"cloud": 0.1},
        "coco_map50": {"cloud": 0.4},
        "per_class": {"cloud": [None]},
        "knowledge": {"private": {"right": 0.5}},
        "note": "few images",
        "map50_interval": {"cloud": {"low": 0.1, "high": 0.2}, "student": {}},
        "vs_cloud_interval": {"student": {"low": -0.1, "high": 0.2}},
        "class_change_interval": [[None, None]],
        "truth_boxes": [3],
        "operating": {
            "cloud": {"score": 0.5, "precision": 1.0, "recall": 0.5, "f1": 0.7}
        },
        "calibration_error": {"cloud": 0.1},
        "ckg_sides": {"cloud": {"share": 1.0, "right": 0.5}, "clip": {"share": 0.0}},
        "kept": {"boxes": 9, "used": 4},
        "corrections": {
            "images": 2,
            "boxes": 3,
            "empty": 1,
            "teachers": {"cloud": {"boxes": 3, "wrong": 1, "missed": 0, "images": 1}},
        },
        "sweeps": [{"name": "a", "trial": 1, "trials": 4, "link": "../x.html"}],
        "hardware": {"cpus": 2, "memory_gib": 3.5, "gpu": "", "system": "Linux"},
        "page": "/root/report.html",
        "model": {"parameters": 5, "bytes": 20},
    }
    written = RunSummary.from_json(figures).to_json()
    assert json.loads(json.dumps(written)) == figures
