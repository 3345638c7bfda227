"""Report: one page with the figures, the curves and pictures of each method's boxes."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from operator import attrgetter
from typing import Any

import psutil
import pyarrow.compute as pc
import torch

from coin_ray import storage
from coin_ray.config import DemoScenes, PipelineConfig
from coin_ray.config.presets import PRESETS, with_student
from coin_ray.config.yaml_files import to_yaml
from coin_ray.evaluation.operating import ImageCounts, count_by_image
from coin_ray.evaluation.voc import Floats
from coin_ray.report.methods import METHODS
from coin_ray.report.page import PageFigures, build_page
from coin_ray.report.run_summary import SearchLink
from coin_ray.runs.steps import Context, Manifest, Metrics, read_manifest
from coin_ray.runs.summary import build_summary
from coin_ray.stages.common.image_tables import read_image_rows, read_images
from coin_ray.stages.common.training_job import CURVE_FILE
from coin_ray.stages.common.validation import VALIDATION_CURVE_FILE
from coin_ray.stages.evaluate import PredictionsByMethod
from coin_ray.stages.reporting import measurements
from coin_ray.stages.reporting.ckg_probabilities import predict_ckg_probabilities
from coin_ray.stages.reporting.pictures import make_gallery, make_gallery_inputs
from coin_ray.stages.reporting.teacher_calibration import measure_calibration
from coin_ray.stages.reporting.teacher_mistakes import count_teacher_mistakes
from coin_ray.tables import Truth

TRAINING_STEPS = ("propagate", "distill", "pseudo_label", "oracle")


@dataclass(frozen=True)
class MeasuredTestSet:
    """What the annotated test images tell: the figures by name, box counts by method
    and image, and precision-recall curves [K, R] by method.
    """

    figures: Metrics = field(default_factory=dict)
    counts: Mapping[str, ImageCounts] = field(default_factory=dict)
    curves: Mapping[str, Floats] = field(default_factory=dict)


def run(context: Context[PipelineConfig]) -> Metrics:
    """Write ``report.html``; the metrics hold its figures."""
    config = context.config
    figures: Metrics = {"hardware": describe_hardware(), "kept": _count_kept(context)}
    mistakes = count_teacher_mistakes(context)
    if mistakes:
        figures["corrections"] = mistakes
    figures["confusion"] = []
    if config.collect.labeler != "none":
        figures["confusion"] = measurements.count_teacher_confusion(context)
    answers = measurements.open_teacher_answers(context)
    truth = measurements.read_test_annotations(context)
    tested = (
        _measure_test_images(context, truth, answers) if truth else MeasuredTestSet()
    )
    figures |= tested.figures
    searches = list_searches(context)
    if searches:
        figures["sweeps"] = [asdict(search) for search in searches]
    page = _build_page(context, figures, answers, tested)
    uri = storage.join(context.folder, "report.html")
    storage.write_bytes(uri, page)
    return figures | {"page": uri, "bytes": len(page)}


def _measure_test_images(
    context: Context[PipelineConfig],
    truth: dict[str, Truth],
    answers: PredictionsByMethod,
) -> MeasuredTestSet:
    config = context.config
    matches, used_matches = measurements.match_methods(context, truth)
    operating_points = measurements.measure_best_f1(used_matches)
    counts = {
        name: count_by_image(used_matches[name], point["score"])
        for name, point in operating_points.items()
    }
    annotated_rows = [
        row
        for row in read_image_rows(context.inputs["images"], "test")
        if row["image_id"] in truth
    ]
    ckg_probs = predict_ckg_probabilities(context, annotated_rows, answers)
    curves = {
        method.key: measurements.precision_recall_curves(matches[method.key])
        for method in METHODS
        if method.key in matches
    }
    figures = measurements.compute_intervals(matches, config.seed)
    figures["operating"] = operating_points
    figures |= measure_calibration(answers, ckg_probs, truth, config.labels.score_min)
    figures["precision_recall"] = {
        name: measurements.mean_curve(by_class) for name, by_class in curves.items()
    }
    return MeasuredTestSet(figures, counts, curves)


def _build_page(
    context: Context[PipelineConfig],
    figures: Metrics,
    answers: PredictionsByMethod,
    tested: MeasuredTestSet,
) -> bytes:
    """Return the page as HTML in UTF-8."""
    config = context.config
    predictions = answers | measurements.open_detector_predictions(context)
    gallery_inputs = make_gallery_inputs(
        context, predictions, figures.get("operating", {}), tested.counts
    )
    manifests = {name: read_manifest(folder) for name, folder in context.inputs.items()}
    manifests["report"] = Manifest(step="report", metrics=figures)
    summary = build_summary(config, manifests)
    class_curves = {name: by_class.tolist() for name, by_class in tested.curves.items()}
    page = build_page(
        summary,
        _read_curves(context),
        make_gallery(context, gallery_inputs),
        to_yaml(config),
        format_command(context),
        PageFigures(
            precision_recall=figures.get("precision_recall", {}),
            class_curves=class_curves,
            confusion=figures["confusion"],
            reliability=figures.get("reliability", {}),
        ),
    )
    return page.encode()


def format_command(context: Context[PipelineConfig]) -> str:
    """Return the command that repeats the run: with a preset's name where only the seed
    differs, otherwise with the config file in the run's root.
    """
    config = context.config
    baselines = " --baselines" if "oracle" in context.inputs else ""
    if isinstance(config.data, DemoScenes) and config.preset in PRESETS:
        student = config.distill.student
        student_option = "" if student == "faster-rcnn" else f" --student {student}"
        preset = with_student(PRESETS[config.preset](), student)
        if config == replace(preset, seed=config.seed):
            return (
                f"coin-ray adapt {config.preset}{student_option} --seed"
                f" {config.seed}{baselines}"
            )
    config_uri = storage.join(context.root, "config.yaml")
    return f"coin-ray adapt --config {config_uri}{baselines}"


def list_searches(context: Context[PipelineConfig]) -> list[SearchLink]:
    """Return the searches below the run's root that have a trial with the run's
    settings.
    """
    searches = []
    for uri in storage.list_files(storage.join(context.root, "search"), "/search.json"):
        folder = uri.rpartition("/")[0]
        trials = storage.read_json(uri)["trials"]
        same_settings = [
            trial["number"] for trial in trials if _has_settings(context.config, trial)
        ]
        if same_settings and storage.exists(storage.join(folder, "search.html")):
            name = folder.rpartition("/")[2]
            searches.append(
                SearchLink(
                    name,
                    trial=same_settings[0],
                    trials=len(trials),
                    link=f"../../search/{name}/search.html",
                )
            )
    return searches


def _has_settings(config: PipelineConfig, trial: Mapping[str, Any]) -> bool:
    """Return whether the config has the trial's settings.

    Trials with a schedule are those of an earlier version's population search.
    """
    for name, setting in trial["settings"].items():
        if attrgetter(name)(config) != setting:
            return False
    return not trial.get("schedule")


def describe_hardware() -> dict[str, int | float | str]:
    """Return the machine that writes the report; on a cluster another one trains."""
    return {
        "cpus": psutil.cpu_count(logical=True) or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "system": f"{platform.system()} {platform.machine()}",
    }


def _count_kept(context: Context[PipelineConfig]) -> dict[str, int]:
    """Count the cloud's boxes on the training images: all, and those above the threshold
    of training.
    """
    training_ids = read_images(context.inputs["images"], "train")["image_id"]
    score_min = context.config.labels.score_min
    uri = storage.join(context.inputs["collect"], "cloud.parquet")
    boxes = 0
    used = 0
    for block in storage.stream_table(uri, ("image_id", "scores")):
        in_training = pc.is_in(block["image_id"], value_set=training_ids)
        scores = pc.list_flatten(block["scores"].filter(in_training)).to_numpy()
        boxes += len(scores)
        used += int((scores >= score_min).sum())
    return {"boxes": boxes, "used": used}


def _read_curves(
    context: Context[PipelineConfig],
) -> list[tuple[str, int, str, float]]:
    """Return (training step, number of the step, metric, figure) of all curves."""
    rows = []
    for name, file in product(TRAINING_STEPS, (CURVE_FILE, VALIDATION_CURVE_FILE)):
        if name not in context.inputs:
            continue
        uri = storage.join(context.inputs[name], file)
        if not storage.exists(uri):
            continue
        for point in storage.read_json(uri):
            step = int(point["step"])
            rows += [
                (name, step, metric, figure)
                for metric, figure in point.items()
                if metric != "step"
            ]
    return rows
