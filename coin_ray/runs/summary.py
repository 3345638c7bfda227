"""``summary.json``: the figures of a run, from the manifests of its steps."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from coin_ray.config import PipelineConfig

FIGURES = (
    "map50_interval",
    "vs_cloud_interval",
    "class_change_interval",
    "truth_boxes",
    "operating",
    "calibration_error",
    "ckg_sides",
    "kept",
    "corrections",
    "sweeps",
    "hardware",
    "page",
)
"""What the report adds to what the evaluation measured."""
PACKAGES = (
    "coin-ray",
    "torch",
    "torchvision",
    "open_clip_torch",
    "ray",
    "mlflow",
    "pyarrow",
)


def summarise(
    config: PipelineConfig, manifests: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Preset, seed, mAP50 of every method and its interval, gap closed, separation,
    calls, seconds per stage, hardware, versions.
    """
    metrics = {name: manifest["metrics"] for name, manifest in manifests.items()}
    evaluated = metrics.get("evaluate", {})
    map50 = evaluated.get("map50", {})
    seconds = {name: manifest["seconds"] for name, manifest in manifests.items()}
    summary: dict[str, Any] = {
        "preset": config.preset,
        "seed": config.seed,
        "classes": list(config.classes),
        "images": metrics.get("images", {}).get("count", {}),
        "rejected": metrics.get("images", {}).get("rejected", 0),
        "in_both": metrics.get("images", {}).get("in_both", 0),
        "map50": map50,
        "gap_closed": gap_closed(map50),
        "separation": metrics.get("separate", {}).get("separation", {}),
        "calls": metrics.get("collect", {}).get("calls", {}),
        "seconds": seconds | {"total": round(sum(seconds.values()), 3)},
        "versions": versions(),
    }
    for name in ("map50_unknown", "coco_map50", "per_class", "knowledge", "note"):
        if name in evaluated:
            summary[name] = evaluated[name]
    reported = metrics.get("report", {})
    summary |= {name: reported[name] for name in FIGURES if name in reported}
    if exported := metrics.get("export"):
        summary["model"] = {
            name: exported[name] for name in ("parameters", "bytes") if name in exported
        }
    return summary


def versions() -> dict[str, str]:
    """Of what computes the figures."""
    return {p: version(p) for p in PACKAGES} | {"python": platform.python_version()}


def gap_closed(map50: Mapping[str, float | None]) -> float | None:
    """(student - cloud) / (oracle - cloud); None unless all three are known and the
    oracle is better than the cloud.
    """
    student, cloud, oracle = (
        map50.get(name) for name in ("student", "cloud", "oracle")
    )
    if student is None or cloud is None or oracle is None or oracle <= cloud:
        return None
    return round((student - cloud) / (oracle - cloud), 4)
