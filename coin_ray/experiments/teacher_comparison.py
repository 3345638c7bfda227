"""Compare teachers before all images are paid for: each configured cloud, rendering and
set of phrases on a few images, without labels.

No figure says who is right. Agreement says whose boxes others confirm; calibration, how
well scores say so. Answers are kept in the run's journal, so a collection with the chosen
teacher does not pay for them again.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from coin_ray import storage
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.detections import AnswerConverter
from coin_ray.cloud.ensemble import cloud_names
from coin_ray.cloud.probabilities import CloudDetections
from coin_ray.cloud.question_client import questions_for
from coin_ray.config import Cloud, PipelineConfig
from coin_ray.config.yaml_files import with_class_file
from coin_ray.errors import ConfigError
from coin_ray.evaluation.calibration import (
    expected_calibration_error,
    reliability_bins,
)
from coin_ray.experiments.rendering_comparison import (
    MIN_SCORE,
    ImageAnswers,
    choose_drawn,
    draw_columns,
    query_clouds,
)
from coin_ray.fusion.box_clusters import pairwise_ious
from coin_ray.runs.graph import build_steps
from coin_ray.runs.lease import hold_root
from coin_ray.runs.runner import open_tracker, run_missing_steps
from coin_ray.runs.steps import with_found_range
from coin_ray.stages.common.image_tables import read_image_rows

MATCH_IOU = 0.5
"""Boxes of two teachers that overlap at least so much are the same object."""


@dataclass(frozen=True)
class Teacher:
    """One of a configuration's clouds, with its rendering."""

    name: str
    config: PipelineConfig
    cloud: Cloud


@dataclass(frozen=True)
class TeacherFigures:
    """What one teacher's answers show.

    ``boxes``: per image from ``MIN_SCORE`` on; ``best_score``: mean over images of the
    highest score; ``agreement``: share of boxes that another teacher confirms by an
    overlapping box of the same class, F1, mean over the others; ``calibration_error``:
    between scores and whether at least half of the others confirm a box; both NaN for a
    single teacher. ``latency_ms``: median of the answers that were asked for now, NaN if
    all were on record; ``usd_per_1000``: images, at ``cloud.usd_per_call``.
    """

    name: str
    boxes: float
    best_score: float
    agreement: float
    calibration_error: float
    latency_ms: float
    usd_per_1000: float
    failed: int


def compare_teachers(
    config: PipelineConfig,
    root: str,
    sample_size: int,
    class_files: Sequence[str] = (),
) -> list[TeacherFigures]:
    """Ask each cloud of ``config``, and with each file of classes, about ``sample_size``
    training images; print the figures of each and write ROOT/teachers.png.

    Raises ConfigError for a file with other classes.
    """
    with hold_root(root):
        return _compare_teachers(config, root, sample_size, class_files)


def configs_by_phrases(
    config: PipelineConfig, class_files: Sequence[str]
) -> list[tuple[str, PipelineConfig]]:
    """Return the config itself, without a name, and a name and the config for each file
    of classes, which must hold the same classes in the same order.
    """
    configs = [("", config)]
    for file in class_files:
        with_phrases = with_class_file(config, file)
        if with_phrases.classes != config.classes:
            raise ConfigError(
                f"{file} has the classes {', '.join(with_phrases.classes)}, expected"
                f" those of --classes in their order: {', '.join(config.classes)}"
            )
        configs.append((os.path.basename(file), with_phrases))
    return configs


def _compare_teachers(
    config: PipelineConfig, root: str, sample_size: int, class_files: Sequence[str]
) -> list[TeacherFigures]:
    configs = configs_by_phrases(config, class_files)
    step = build_steps(configs[0][1])["images"]
    tracker = open_tracker([step], configs[0][1], root)
    run_missing_steps([step], configs[0][1], root, tracker=tracker)
    rows = read_image_rows(step.folder(root), "train")
    count = min(sample_size, len(rows))
    uris = [str(rows[n * len(rows) // count]["uri"]) for n in range(count)]
    teachers: list[Teacher] = []
    columns: list[list[Answer | None]] = []
    for phrases, phrase_config in configs:
        phrase_config = with_found_range(phrase_config, step.folder(root))
        answers = asyncio.run(query_clouds(phrase_config, uris, root))
        names = cloud_names(phrase_config.clouds)
        for number, cloud in enumerate(phrase_config.clouds):
            name = f"{names[number]} {phrases}".strip()
            teachers.append(Teacher(name, phrase_config, cloud))
            columns.append([image_answers[number] for image_answers in answers])
    figures = measure_teachers(teachers, columns)
    sheet_uri = storage.join(root, "teachers.png")
    storage.write_bytes(sheet_uri, _draw(teachers, uris, columns))
    _print_figures(figures, count, sheet_uri)
    return figures


def measure_teachers(
    teachers: Sequence[Teacher], columns: Sequence[Sequence[Answer | None]]
) -> list[TeacherFigures]:
    """Return the figures of each teacher from its answers [teacher][image]; images that
    one of two teachers has no answer about count in no comparison of the two.
    """
    detections = [
        _convert(teacher, answers)
        for teacher, answers in zip(teachers, columns, strict=True)
    ]
    return [
        _measure(teacher, columns[number], detections, number)
        for number, teacher in enumerate(teachers)
    ]


def _convert(
    teacher: Teacher, answers: Sequence[Answer | None]
) -> list[CloudDetections | None]:
    """Return the detections from ``MIN_SCORE`` on, as a collection would have them."""
    config = replace(teacher.config, cloud=teacher.cloud, more_clouds=())
    converter = AnswerConverter(config)
    converted: list[CloudDetections | None] = []
    for answer in answers:
        if answer is None or answer.raw is None:
            converted.append(None)
            continue
        detections = converter.convert(answer)
        confident = np.flatnonzero(detections.scores >= MIN_SCORE)
        converted.append(
            CloudDetections(
                detections.boxes[confident],
                detections.scores[confident],
                detections.labels[confident],
                detections.probs[confident],
                tuple(detections.prob_sources[row] for row in confident.tolist()),
            )
        )
    return converted


def _measure(
    teacher: Teacher,
    answers: Sequence[Answer | None],
    detections: Sequence[Sequence[CloudDetections | None]],
    number: int,
) -> TeacherFigures:
    own = [d for d in detections[number] if d is not None]
    others = [d for k, d in enumerate(detections) if k != number]
    agreements = [_agreement(detections[number], other) for other in others]
    scores, confirmed = _confirmations(detections[number], others)
    best_scores = [
        float(answer.raw.class_scores.max(initial=0))
        for answer in answers
        if answer is not None and answer.raw is not None
    ]
    asked = [a for a in answers if a is not None and a.attempts > 0]
    calls_per_image = len(questions_for(teacher.config, teacher.cloud))
    calibration_error = expected_calibration_error(reliability_bins(scores, confirmed))
    return TeacherFigures(
        teacher.name,
        float(np.mean([len(d) for d in own])) if own else 0.0,
        float(np.mean(best_scores)) if best_scores else 0.0,
        float(np.mean(agreements)) if agreements else float("nan"),
        calibration_error if others else float("nan"),
        float(np.median([a.latency_ms for a in asked])) if asked else float("nan"),
        1000 * calls_per_image * teacher.cloud.usd_per_call,
        len(answers) - len(own),
    )


def _agreement(
    first: Sequence[CloudDetections | None], second: Sequence[CloudDetections | None]
) -> float:
    """Return 2 x matched boxes / all boxes of two teachers in the images that both
    answered; 1 if neither found anything.
    """
    matched = total = 0
    for own, other in zip(first, second, strict=True):
        if own is None or other is None:
            continue
        total += len(own) + len(other)
        matched += int(_is_confirmed(own, other).sum())
        matched += int(_is_confirmed(other, own).sum())
    return matched / total if total else 1.0


def _confirmations(
    own: Sequence[CloudDetections | None],
    others: Sequence[Sequence[CloudDetections | None]],
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return the score of each box [N], and whether at least half of the others that
    answered confirm it.
    """
    scores, confirmed = [np.zeros(0)], [np.zeros(0, bool)]
    for image, detections in enumerate(own):
        if detections is None:
            continue
        votes = []
        for other in others:
            opinion = other[image]
            if opinion is not None:
                votes.append(_is_confirmed(detections, opinion))
        if votes:
            scores.append(detections.scores.astype(np.float64))
            confirmed.append(np.mean(votes, axis=0) >= 0.5)
    return np.concatenate(scores), np.concatenate(confirmed)


def _is_confirmed(own: CloudDetections, other: CloudDetections) -> NDArray[np.bool_]:
    """Return for each box [N] whether the other has one of the same class there."""
    if not len(own) or not len(other):
        return np.zeros(len(own), bool)
    boxes = np.concatenate([own.boxes, other.boxes])
    ious = np.nan_to_num(pairwise_ious(boxes))[: len(own), len(own) :]
    same_class = own.labels[:, None] == other.labels
    confirmed: NDArray[np.bool_] = ((ious >= MATCH_IOU) & same_class).any(1)
    return confirmed


def _draw(
    teachers: Sequence[Teacher],
    uris: Sequence[str],
    columns: Sequence[Sequence[Answer | None]],
) -> bytes:
    answers: list[ImageAnswers] = []
    for image in range(len(uris)):
        raws = []
        for column in columns:
            answer = column[image]
            raws.append(None if answer is None else answer.raw)
        answers.append(raws)
    drawn = choose_drawn(answers)
    return draw_columns(
        teachers[0].config,
        [uris[index] for index in drawn],
        [answers[index] for index in drawn],
        [(teacher.name, teacher.cloud.views[0]) for teacher in teachers],
    )


def _print_figures(
    figures: Sequence[TeacherFigures], count: int, sheet_uri: str
) -> None:
    table = Table(title=f"{count} images, {len(figures)} teachers, without labels")
    table.add_column("teacher")
    for column in (
        f"boxes from {MIN_SCORE} on",
        "best score",
        "agreement",
        "calibration error",
        "ms",
        "USD / 1000",
        "no answer",
    ):
        table.add_column(column, justify="right")
    for teacher in figures:
        table.add_row(
            teacher.name,
            f"{teacher.boxes:.2f}",
            f"{teacher.best_score:.3f}",
            _or_dash(teacher.agreement, "{:.3f}"),
            _or_dash(teacher.calibration_error, "{:.3f}"),
            _or_dash(teacher.latency_ms, "{:.0f}"),
            f"{teacher.usd_per_1000:.2f}",
            str(teacher.failed or ""),
        )
    Console().print(table)
    print(
        "Agreement and calibration compare a teacher with the others, not with the"
        f" truth: look at the pictures in {sheet_uri}"
    )


def _or_dash(number: float, pattern: str) -> str:
    return "-" if np.isnan(number) else pattern.format(number)
