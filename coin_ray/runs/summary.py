"""Build a run's summary from the manifests of its steps."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version

from coin_ray.config import PipelineConfig
from coin_ray.report.run_summary import RunSummary
from coin_ray.runs.steps import Manifest, Metrics

EVALUATION_FIGURES = ("map50_unknown", "coco_map50", "per_class", "knowledge", "note")
REPORT_FIGURES = (
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
MODEL_FIGURES = ("parameters", "bytes")
CHOICE_FIGURES = ("winner", "scores", "reason")
PACKAGES = (
    "coin-ray",
    "torch",
    "torchvision",
    "open_clip_torch",
    "ray",
    "mlflow",
    "pyarrow",
)


def build_summary(
    config: PipelineConfig, manifests: Mapping[str, Manifest]
) -> RunSummary:
    """Return the figures of the finished steps, whose manifests are given by name."""
    metrics = {name: manifest.metrics for name, manifest in manifests.items()}
    images = metrics.get("images", {})
    evaluation = metrics.get("evaluate", {})
    map50 = evaluation.get("map50", {})
    seconds = {name: manifest.seconds for name, manifest in manifests.items()}
    total_seconds = round(sum(seconds.values()), 3)
    figures: Metrics = {
        "preset": config.preset,
        "seed": config.seed,
        "classes": config.classes,
        "images": images.get("count", {}),
        "rejected": images.get("rejected", 0),
        "in_both": images.get("in_both", 0),
        "map50": map50,
        "gap_closed": gap_closed(map50),
        "separation": metrics.get("separate", {}).get("separation", {}),
        "calls": metrics.get("collect", {}).get("calls", {}),
        "seconds": seconds | {"total": total_seconds},
        "versions": package_versions(),
    }
    figures |= _select(evaluation, EVALUATION_FIGURES)
    figures |= _select(metrics.get("report", {}), REPORT_FIGURES)
    if "intensity" in images:
        figures["intensity"] = images["intensity"]
    if "choose" in metrics:
        figures["choice"] = _select(metrics["choose"], CHOICE_FIGURES)
    if "export" in metrics:
        figures["model"] = _select(metrics["export"], MODEL_FIGURES)
    return RunSummary.from_json(figures)


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that compute the figures."""
    versions = {package: version(package) for package in PACKAGES}
    return versions | {"python": platform.python_version()}


def gap_closed(map50: Mapping[str, float | None]) -> float | None:
    """Return (student - cloud) / (oracle - cloud).

    Returns None unless all three are known and the oracle is better than the cloud.
    """
    student, cloud, oracle = (map50.get(m) for m in ("student", "cloud", "oracle"))
    if student is None or cloud is None or oracle is None or oracle <= cloud:
        return None
    return round((student - cloud) / (oracle - cloud), 4)


def _select(metrics: Metrics, names: tuple[str, ...]) -> Metrics:
    return {name: metrics[name] for name in names if name in metrics}
