"""Report: one page with the figures, the curves and pictures of what each method saw."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, replace
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
from coin_ray.report.page import build_page
from coin_ray.runs.steps import Context
from coin_ray.runs.summary import build_summary
from coin_ray.stages.common import validation
from coin_ray.stages.common.image_tables import read_image_rows, read_images
from coin_ray.stages.reporting import measurements as measures
from coin_ray.stages.reporting.ckg_probabilities import predict_ckg_probabilities
from coin_ray.stages.reporting.pictures import gallery, seen

FITS = ("propagate", "distill", "pseudo_label", "oracle")


def run(context: Context[PipelineConfig]) -> dict[str, Any]:
    """Write ``report.html``; the metrics hold its figures."""
    config = context.config
    manifests = {
        name: storage.read_json(storage.join(folder, "manifest.json"))
        for name, folder in context.inputs.items()
    }
    figures: dict[str, Any] = {"hardware": hardware(), "kept": _kept(context)}
    if corrections := measures.corrections(context):
        figures["corrections"] = corrections
    figures["confusion"] = (
        measures.teachers_confused(context) if config.collect.labeler != "none" else []
    )
    truth = measures.held_out_truth(context)
    answers, students = measures.named_once(context), measures.students(context)
    tallies: dict[str, ImageCounts] = {}
    curves: dict[str, Floats] = {}
    if truth:
        verdicts, used = measures.judge_all(context, truth)
        figures |= measures.scored(verdicts, config.seed) | {
            "operating": measures.at_best_threshold(used)
        }
        tallies = {
            n: count_by_image(used[n], point["score"])
            for n, point in figures["operating"].items()
        }
        fused = predict_ckg_probabilities(
            context,
            [
                i
                for i in read_image_rows(context.inputs["images"], "test")
                if i["image_id"] in truth
            ],
            answers,
        )
        figures |= measures.opinions(answers, fused, truth, config.labels.score_min)
        curves = {
            m.key: measures.precision_recall(verdicts[m.key])
            for m in METHODS
            if m.key in verdicts
        }
        figures["precision_recall"] = {
            name: measures.mean_curve(rows) for name, rows in curves.items()
        }
    if searches := list_searches(context):
        figures["sweeps"] = searches
    pictures = gallery(
        context,
        seen(context, answers | students, figures.get("operating", {}), tallies),
    )
    summary = build_summary(
        config, manifests | {"report": {"metrics": figures, "seconds": 0.0}}
    )
    per_class = {
        name: [float("nan") if v is None else v for v in values]
        for name, values in summary.get("per_class", {}).items()
    }
    shapes = figures | {
        "class_curves": {name: rows.tolist() for name, rows in curves.items()}
    }
    page = build_page(
        summary,
        per_class,
        _curves(context),
        pictures,
        to_yaml(config),
        command(context),
        shapes,
    )
    path = storage.join(context.folder, "report.html")
    storage.write_bytes(path, page.encode())
    return figures | {"page": path, "bytes": len(page.encode())}


def command(context: Context[PipelineConfig]) -> str:
    """A preset by its name where only the seed differs; anything else is in the config
    beside the steps.
    """
    config = context.config
    baselines = " --baselines" if "oracle" in context.inputs else ""
    if isinstance(config.data, DemoScenes) and config.preset in PRESETS:
        student = (
            ""
            if config.distill.student == "faster-rcnn"
            else f" --student {config.distill.student}"
        )
        preset = with_student(PRESETS[config.preset](), config.distill.student)
        if config == replace(preset, seed=config.seed):
            return (
                f"python pipelines/full.py {config.preset}{student} --seed"
                f" {config.seed}{baselines}"
            )
    return (
        "python pipelines/full.py --config"
        f" {storage.join(context.root, 'config.yaml')}{baselines}"
    )


def list_searches(context: Context[PipelineConfig]) -> list[dict[str, Any]]:
    """Searches below the run's root that have a trial with the run's settings:
    ``name``, ``trial`` of ``trials``, ``link`` to their page.
    """
    found = []
    for uri in storage.list_files(storage.join(context.root, "search"), "/search.json"):
        folder = uri.rpartition("/")[0]
        trials = storage.read_json(uri)["trials"]
        mine = [t["number"] for t in trials if _has_settings_of(context.config, t)]
        if mine and storage.exists(storage.join(folder, "search.html")):
            name = folder.rpartition("/")[2]
            found.append(
                {
                    "name": name,
                    "trial": mine[0],
                    "trials": len(trials),
                    "link": f"../../search/{name}/search.html",
                }
            )
    return found


def _has_settings_of(config: PipelineConfig, trial: Mapping[str, Any]) -> bool:
    changes = [asdict(change) for change in config.distill.schedule]
    same = all(
        attrgetter(name)(config) == value for name, value in trial["settings"].items()
    )
    return same and changes == trial.get("schedule", [])


def hardware() -> dict[str, Any]:
    """The machine that writes the report, which on a cluster is not the one that
    trains.
    """
    return {
        "cpus": psutil.cpu_count(logical=True) or 0,
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "system": f"{platform.system()} {platform.machine()}",
    }


def _kept(context: Context[PipelineConfig]) -> dict[str, int]:
    """The cloud's boxes on the training images: all of them, and those above the
    threshold of training.
    """
    ids = read_images(context.inputs["images"], "train")["image_id"]
    boxes, used = 0, 0
    for rows in storage.stream_table(
        storage.join(context.inputs["collect"], "cloud.parquet"), ("image_id", "scores")
    ):
        scores = pc.list_flatten(
            rows["scores"].filter(pc.is_in(rows["image_id"], value_set=ids))
        ).to_numpy()
        boxes, used = (
            boxes + len(scores),
            used + int((scores >= context.config.labels.score_min).sum()),
        )
    return {"boxes": boxes, "used": used}


def _curves(context: Context[PipelineConfig]) -> list[tuple[str, int, str, float]]:
    rows = []
    for name, file in product(FITS, ("curve.json", validation.VALIDATION_CURVE_FILE)):
        place = storage.join(context.inputs.get(name, ""), file)
        for point in (
            storage.read_json(place)
            if name in context.inputs and storage.exists(place)
            else []
        ):
            rows += [
                (name, int(point["step"]), metric, value)
                for metric, value in point.items()
                if metric != "step"
            ]
    return rows
