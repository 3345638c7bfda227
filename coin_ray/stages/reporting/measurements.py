"""The figures of the report: computed from finished tables, so that an old run gets
them without any prediction.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig
from coin_ray.evaluation.bootstrap import (
    bootstrap_average_precision,
    draw_bootstrap_samples,
    mean_ap,
    percentile_interval,
)
from coin_ray.evaluation.calibration import expected_calibration_error, reliability_bins
from coin_ray.evaluation.fusion_baselines import relabel_with_clip
from coin_ray.evaluation.operating import best_f1, count_by_image
from coin_ray.evaluation.separation_accuracy import overlapped_truth_labels
from coin_ray.evaluation.teacher_agreement import ckg_agreement_rates, teacher_confusion
from coin_ray.evaluation.voc import (
    Floats,
    MatchedDetections,
    match_detections,
    mean_over_classes,
)
from coin_ray.runs.steps import Context
from coin_ray.stages.common.image_tables import open_annotations, read_images
from coin_ray.stages.common.teacher_outputs import (
    open_collected,
    open_corrections,
    select_cloud_labels,
)
from coin_ray.stages.common.teacher_outputs import relabel_with_clip as taught_by_clip
from coin_ray.stages.evaluate import (
    METHOD_OF_STEP,
    PredictionsByMethod,
    open_teacher_class_scores,
)
from coin_ray.structures import Detections
from coin_ray.tables import Truth

RECALLS = np.linspace(0, 1, 41)
NAMED_ONCE = ("cloud", "clip_labels")
"""Teachers that name each box once; at a threshold they are judged as they answer, not
with every class score."""
Verdicts = dict[str, tuple[MatchedDetections, ...]]


def held_out_truth(context: Context[PipelineConfig]) -> dict[str, Truth]:
    """Truth by id of the annotated test images."""
    folder = context.inputs["images"]
    return open_annotations(folder).of(read_images(folder, "test")["image_id"])


def students(context: Context[PipelineConfig]) -> PredictionsByMethod:
    """What the trained detectors see in the test images, as the evaluation left it."""
    found: Results = {}
    for name in METHOD_OF_STEP.values():
        path = storage.join(
            context.inputs["evaluate"], "predictions", f"{name}.parquet"
        )
        if storage.exists(path):
            found[name] = tables.open_detections(path, len(context.config.classes))
    return found


def named_once(context: Context[PipelineConfig]) -> PredictionsByMethod:
    """The teachers' answers as they are: one name for each box."""
    names = NAMED_ONCE if context.config.collect.labeler != "none" else NAMED_ONCE[:1]
    return {
        name: open_collected(context.inputs["collect"], name, context.config)
        for name in names
    }


def scored(verdicts: Verdicts, seed: int) -> dict[str, Any]:
    """95 % intervals of every mAP50 and of its difference to the cloud's, and the
    student's change by class.
    """
    images = len(verdicts["cloud"][0].required)
    draws = draw_bootstrap_samples(images, seed)
    by_class = {name: bootstrap_average_precision(classes, draws) for name, classes in verdicts.items()}
    maps = {name: mean_ap(values) for name, values in by_class.items()}
    numbers: dict[str, Any] = {
        "map50_interval": {name: _interval(values) for name, values in maps.items()},
        "vs_cloud_interval": {
            name: _interval(values - maps["cloud"])
            for name, values in maps.items()
            if name != "cloud"
        },
        "truth_boxes": [int(match_detections.required.sum()) for match_detections in verdicts["cloud"]],
    }
    if "student" in by_class:
        change = by_class["student"] - by_class["cloud"]
        numbers["class_change_interval"] = [
            list(percentile_interval(column) or (None, None)) for column in change.T
        ]
    return numbers


def at_best_threshold(verdicts: Verdicts) -> dict[str, Any]:
    points = {name: best_f1(classes) for name, classes in verdicts.items()}
    return {
        name: {k: round(v, 4) for k, v in asdict(point).items()}
        for name, point in points.items()
        if point
    }


def precision_recall(classes: tuple[MatchedDetections, ...]) -> Floats:
    """Precision [K, R] at ``RECALLS``, made to fall with recall; rows of NaN for
    classes without truth.
    """
    rows = np.full((len(classes), len(RECALLS)), np.nan)
    for row, judged_class in zip(rows, classes, strict=True):
        if not (required := judged_class.required.sum()):
            continue
        found = judged_class.right.cumsum()
        precision = np.maximum.accumulate((found / np.arange(1, len(found) + 1))[::-1])[
            ::-1
        ]
        place = np.searchsorted(found / required, RECALLS - 1e-12)
        row[:] = np.append(precision, 0.0)[np.minimum(place, len(precision))]
    return rows


def mean_curve(rows: Floats) -> list[float]:
    """Mean [R] over the classes that have truth."""
    return [round(mean_over_classes(column), 4) for column in rows.T]


def teachers_confused(context: Context[PipelineConfig]) -> list[list[int]]:
    separation = storage.stream_table(
        storage.join(context.inputs["separate"], "separation.parquet")
    )
    found: list[list[int]] = teacher_confusion(separation, len(context.config.classes)).tolist()
    return found


def opinions(
    answers: PredictionsByMethod,
    fused: Mapping[str, Tensor],
    truth: Mapping[str, Truth],
    score_min: float,
) -> dict[str, Any]:
    """How well each opinion of the cloud's test boxes is calibrated, and whom the
    fusion follows where the open_teacher_class_scores differ.
    """
    if "clip_labels" not in answers:
        return _calibrated(
            {"cloud": _probs(answers["cloud"], truth, score_min)},
            _answers(answers["cloud"], truth, score_min),
        )
    by_cloud = {
        i: answers["cloud"][i]
        for i in truth
        if i in answers["cloud"] and i in answers["clip_labels"]
    }
    used = {
        i: t for i, t in truth.items() if i in by_cloud and (not fused or i in fused)
    }
    named = _answers(by_cloud, used, score_min)
    clip = {
        i: answers["clip_labels"][i].probs[by_cloud[i].scores >= score_min]
        for i in used
    }
    said = {"cloud": _probs(by_cloud, used, score_min), "clip": _stack(clip, used)}
    found: dict[str, Any] = {}
    if fused:
        said["ckg"] = _stack(fused, used)
        found["ckg_sides"] = ckg_agreement_rates(said["cloud"], said["clip"], said["ckg"], named)
    return found | _calibrated(said, named)


def _calibrated(said: Mapping[str, Tensor], named: Tensor) -> dict[str, Any]:
    bins = {}
    for who, probs in said.items():
        if len(probs):
            confidence, choice = probs.max(1)
            bins[who] = reliability_bins(
                confidence.double().numpy(), (choice == named).numpy()
            )
    return {
        "calibration_error": {
            who: round(expected_calibration_error(found), 4) for who, found in bins.items()
        },
        "reliability": {who: [asdict(b) for b in found] for who, found in bins.items()},
    }


def _probs(
    found: Mapping[str, Detections], truth: Mapping[str, Truth], score_min: float
) -> Tensor:
    return _stack(
        {i: found[i].probs[found[i].scores >= score_min] for i in truth if i in found},
        truth,
    )


def _answers(
    found: Mapping[str, Detections], truth: Mapping[str, Truth], score_min: float
) -> Tensor:
    """True names [N] of the boxes of at least ``score_min``, background where there is
    nothing.
    """
    parts = [
        overlapped_truth_labels(
            found[i].boxes[found[i].scores >= score_min], truth[i], found[i].num_classes
        )
        for i in sorted(truth)
        if i in found
    ]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *parts])


def _stack(rows: Mapping[str, Tensor], truth: Mapping[str, Truth]) -> Tensor:
    parts = [rows[i] for i in sorted(truth) if i in rows]
    return torch.cat(parts) if parts else torch.zeros(0, 1)


def corrections(context: Context[PipelineConfig]) -> dict[str, Any]:
    """How many images people have labelled, and what each teacher would have taught
    there: ``boxes``, those ``wrong``, objects ``missed``, and ``images`` with either.
    Empty for a run without corrections.
    """
    config = context.config
    person = open_corrections(context.inputs, config)
    truth = {
        i: Truth(d.boxes, d.labels, torch.zeros(len(d), dtype=torch.bool))
        for i, d in person.items()
    }
    if not truth:
        return {}
    counts = {
        "images": len(truth),
        "boxes": sum(len(t.boxes) for t in truth.values()),
        "empty": sum(not len(t.boxes) for t in truth.values()),
    }
    teachers = {
        name: _mistakes(found, truth, len(config.classes))
        for name, found in _taught(context, list(truth)).items()
    }
    return counts | {"teachers": open_teacher_class_scores}


def _taught(context: Context[PipelineConfig], images: list[str]) -> PredictionsByMethod:
    """What propagation and separation would have got of each teacher; images without an
    answer are left out.
    """
    config, answers = context.config, named_once(context)
    clip = tables.open_detections(
        storage.join(context.inputs["separate"], "clip_detector.parquet"),
        len(config.classes),
    )
    known = [i for i in images if i in answers["cloud"]]
    found: Results = {
        "cloud": {i: select_cloud_labels(answers["cloud"][i], config.labels) for i in known}
    }
    if "clip_labels" in answers:
        found["clip_labels"] = {
            i: taught_by_clip(
                answers["cloud"][i], answers["clip_labels"][i], config.labels
            )
            for i in known
        }
    return found | {
        "clip_detector": {
            i: d[d.scores > config.separate.clip_score_min]
            for i in images
            if (d := clip.get(i)) is not None
        }
    }


def _mistakes(
    found: Mapping[str, Detections], truth: Mapping[str, Truth], classes: int
) -> dict[str, int]:
    counted = count_by_image(match_detections(found, truth, classes), 0.0)
    missed = counted.truth - counted.found
    return {
        "boxes": int((counted.found + counted.wrong).sum()),
        "wrong": int(counted.wrong.sum()),
        "missed": int(missed.sum()),
        "images": int(((missed > 0) | (counted.wrong > 0)).sum()),
    }


def judge_all(context: Context[PipelineConfig], truth: dict[str, Truth]) -> tuple[Verdicts, Verdicts]:
    """Every method with every class score, as mAP is measured; and as it is used: one
    name for each box of a teacher.
    """
    judge = partial(
        match_detections,
        truth=truth,
        num_classes=len(context.config.classes),
        plus_one=context.config.evaluate.plus_one,
    )
    ours = {name: judge(found) for name, found in students(context).items()}
    ranked = {name: judge(found) for name, found in open_teacher_class_scores(context, truth).items()}
    answered = named_once(context)
    if "clip_labels" in answered:
        cloud, clip = answered["cloud"], answered["clip_labels"]
        answered["clip_labels"] = {
            i: relabel_with_clip(cloud[i], clip[i].probs) for i in truth if i in cloud
        }
    once = {name: judge(found) for name, found in answered.items()}
    return ranked | ours, once | ours


def _interval(values: Floats) -> dict[str, float]:
    found = percentile_interval(values)
    return (
        {} if found is None else {"low": round(found[0], 4), "high": round(found[1], 4)}
    )
