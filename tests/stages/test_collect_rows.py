"""What becomes of a service's answers on the way into the tables; without a cluster."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from coin_ray import storage, tables
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.detections import AnswerConverter
from coin_ray.cloud.protocol import BoxCounts, RawDetections, ScoreKind
from coin_ray.config import PipelineConfig
from coin_ray.config.presets import folder
from coin_ray.runs.steps import Context
from coin_ray.stages.collect import _merge, _print_box_counts
from coin_ray.stages.collecting.cloud_actor import (
    ANSWER_SCHEMA,
    STOPPED,
    AnsweredImage,
    answer_table,
)
from coin_ray.stages.collecting.labeler_actor import LabelerActor
from coin_ray.stages.collecting.parts import PART_SCHEMA, CollectedParts
from tests.cloud.tensors import merge_duplicates, to_detections

CLASSES = ("car", "bus", "dog")
LEFT, RIGHT = [0.0, 0.0, 20.0, 20.0], [40.0, 0.0, 60.0, 20.0]


def _config(label_map: str | None = None) -> PipelineConfig:
    preset = folder()
    cloud = replace(
        preset.cloud, url="https://detector.example.com", label_map=label_map
    )
    return replace(
        preset,
        classes=CLASSES,
        cloud=cloud,
        collect=replace(preset.collect, labeler="none"),
    )


def _answer(kind: ScoreKind, *rows: tuple[list[float], list[float]]) -> Answer:
    boxes = np.array([box for box, _ in rows], np.float32).reshape(-1, 4)
    scores = np.array([s for _, s in rows], np.float32).reshape(-1, len(CLASSES))
    return Answer(
        "ok" if rows else "empty",
        RawDetections(boxes, scores, kind),
        1,
        2.0,
        0.5,
        calls=1,
    )


def _context(tmp_path: Path, config: PipelineConfig) -> Context[PipelineConfig]:
    step_folder = storage.join(str(tmp_path), "collect")
    return Context(config, str(tmp_path), step_folder, {}, {}, "collect")


def _parts_folder(tmp_path: Path) -> str:
    return storage.join(str(tmp_path), "collect", "parts")


def _answer_batch(config: PipelineConfig, image_id: str, answer: Answer) -> pa.Table:
    return answer_table([AnsweredImage(image_id, b"", answer)], AnswerConverter(config))


def _collect_rows(
    tmp_path: Path, config: PipelineConfig, **answers: Answer
) -> list[dict[str, Any]]:
    """Rows of ``cloud.parquet``; the answers take the way of a run."""
    parts_folder = _parts_folder(tmp_path)
    labeler = LabelerActor(config, parts_folder)
    for image_id, answer in answers.items():
        labeler(_answer_batch(config, image_id, answer))
    assert set(CollectedParts(parts_folder).answered_ids.to_pylist()) == {
        image_id for image_id, answer in answers.items() if answer.raw is not None
    }
    context = _context(tmp_path, config)
    _merge(context, pa.array(list(answers)))
    table = storage.read_table(storage.join(context.folder, "cloud.parquet"))
    assert table.schema == tables.DETECTIONS
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def test_each_box_is_marked_with_the_source_of_its_probabilities(
    tmp_path: Path,
) -> None:
    rows = _collect_rows(
        tmp_path,
        _config(),
        scored=_answer("per_class", (LEFT, [0.9, 0.1, 0.0])),
        named=_answer(
            "label", (LEFT, [0.9, 0, 0]), (RIGHT, [0, 0.8, 0]), (RIGHT, [0, 0, 0.7])
        ),
        written=_answer("self_reported", (LEFT, [0.9, 0, 0])),
        bare=_answer("none", (LEFT, [0, 1, 0]), (LEFT, [0, 1, 0])),
        nothing=_answer("none"),
        failed=Answer("error", None, 3, error="busy"),
    )
    assert [r["prob_source"] for r in rows] == [
        ["native"],
        ["label_prior", "grouped"],
        ["self_reported"],
        ["assumed"],
        [],
        [],
    ]
    assert [len(r["boxes"]) for r in rows] == [1, 2, 1, 1, 0, 0]
    assert rows[3]["scores"] == [0.5]
    parts = storage.read_table(_parts_folder(tmp_path)).to_pylist()
    assert {row["image_id"]: row["score_kind"] for row in parts} == {
        "scored": "per_class",
        "named": "label",
        "written": "self_reported",
        "bare": "none",
        "nothing": "none",
        "failed": None,
    }


def test_the_label_map_s_priors_are_used(tmp_path: Path) -> None:
    file = tmp_path / "map.yaml"
    file.write_text(
        "service: http\nmap: {car: car}\nprecision: {bus: 0.8}\nconfusion: {bus: {car:"
        " 1}}\n"
    )
    rows = _collect_rows(
        tmp_path,
        _config(str(file)),
        bare=_answer("none", (LEFT, [0, 1, 0])),
        named=_answer("label", (LEFT, [0, 0.6, 0]), (RIGHT, [0.6, 0, 0])),
    )
    assert [r["prob_source"] for r in rows] == [
        ["precision"],
        ["label_confusion", "label_prior"],
    ]
    assert rows[0]["probs"][0] == pytest.approx([0.2, 0.8, 0, 0])
    assert rows[1]["probs"][0] == pytest.approx([0.4, 0.6, 0, 0])


def test_class_scores_become_what_they_always_became(tmp_path: Path) -> None:
    answer = _answer(
        "per_class",
        (LEFT, [0.9, 0.1, 0.0]),
        ([1.0, 0.0, 20.0, 20.0], [0.7, 0.2, 0.1]),
        (LEFT, [0.3, 0.5, 0.0]),
    )
    config = _config()
    (row,) = _collect_rows(tmp_path, config, a=answer)
    assert answer.raw is not None
    unmerged, _ = to_detections(answer.raw)
    expected, _ = merge_duplicates(unmerged, config.collect.fuse_iou)
    detections = tables.detections_by_image(
        pa.Table.from_pylist([row], schema=tables.DETECTIONS), len(CLASSES)
    )["a"]
    assert all(
        torch.equal(getattr(detections, name), getattr(expected, name))
        for name in ("boxes", "scores", "labels", "probs")
    )


def test_images_that_were_not_asked_about_are_in_no_part(tmp_path: Path) -> None:
    config = _config()
    images = [
        AnsweredImage("a", b"", _answer("label", (LEFT, [0.9, 0, 0]))),
        AnsweredImage("b", b"", Answer("error", None, error="{}"), stopped=True),
    ]
    batch = answer_table(images, AnswerConverter(config))
    assert batch.schema == ANSWER_SCHEMA
    progress = LabelerActor(config, _parts_folder(tmp_path))(batch)
    assert progress["status"].to_pylist() == ["ok", STOPPED]
    parts = storage.read_table(_parts_folder(tmp_path))
    assert parts.schema == PART_SCHEMA
    assert parts["image_id"].to_pylist() == ["a"]


def test_boxes_that_are_not_used_as_they_came_are_counted_by_image(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config()
    counted = _answer("label", (LEFT, [0.9, 0, 0]))
    assert counted.raw is not None
    counts = BoxCounts(swapped=1, outside=3)
    counted = replace(counted, raw=replace(counted.raw, counts=counts))
    images = [
        AnsweredImage("a", b"", counted),
        AnsweredImage("b", b"", _answer("label", (LEFT, [0.9, 0, 0]))),
        AnsweredImage("c", b"", Answer("error", None, error="Refused: no")),
    ]
    labeler = LabelerActor(config, _parts_folder(tmp_path))
    labeler(answer_table(images, AnswerConverter(config)))
    labeler(_answer_batch(config, "d", counted))
    parts = CollectedParts(_parts_folder(tmp_path))
    assert parts.box_counts == {"a": counts, "d": counts}
    metrics = _merge(_context(tmp_path, config), pa.array(list("abcd")))
    assert metrics["box_counts"] == {"swapped": 2, "outside": 6}
    image_table = pa.table({"image_id": list("abcd"), "uri": list("ABCD")})
    _print_box_counts(parts.box_counts, image_table)
    printed = capsys.readouterr().out
    assert "2 with corners the other way round (put right), 6 outside" in printed


def test_parts_of_an_older_version_are_still_read(tmp_path: Path) -> None:
    parts_folder = _parts_folder(tmp_path)
    old_schema = pa.schema(
        [f for f in PART_SCHEMA if f.name not in ("prob_source", "score_kind")]
    )
    row = {
        "image_id": "old",
        "boxes": [LEFT],
        "scores": [0.5],
        "labels": [0],
        "probs": [[0.5, 0, 0, 0.5]],
        "status": "ok",
        "calls": 1,
        "source": "cloud",
        "attempts": 1,
        "latency_ms": 1.0,
        "cost_usd": 0.0,
        "error": None,
        "clip_probs": [],
    }
    storage.write_table(
        storage.join(parts_folder, "0.parquet"),
        pa.Table.from_pylist([row], schema=old_schema),
    )
    config = _config()
    answer = _answer("label", (LEFT, [0.9, 0, 0]))
    LabelerActor(config, parts_folder)(_answer_batch(config, "new", answer))
    context = _context(tmp_path, config)
    _merge(context, pa.array(["old", "new"]))
    rows = storage.read_table(storage.join(context.folder, "cloud.parquet"))
    assert rows["prob_source"].to_pylist() == [None, ["label_prior"]]
    assert set(tables.detections_by_image(rows, len(CLASSES))) == {"old", "new"}
