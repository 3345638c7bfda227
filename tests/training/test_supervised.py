from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from coin_ray.config import Detector
from coin_ray.config.co_detr import tiny
from coin_ray.config.detector_presets import small
from coin_ray.config.detector_training import DetectorConfig
from coin_ray.data.examples import Batch, Example, iterate_batches
from coin_ray.stages.train_detector import build_supervised_task, new_co_detr
from coin_ray.structures import Detections
from coin_ray.training.supervised import SupervisedTraining, parameter_groups
from tests.builders import CLASSES, examples

VIEWS = Detector(short_side=64, long_side=96)


def config(**changes: Any) -> DetectorConfig:
    fit = replace(small().fit, steps=6, batch=2, warmup=0)
    return replace(small(), classes=CLASSES, fit=fit, **changes)


def labelled(folder: Path) -> list[Example]:
    found = examples(folder)
    empty = Detections.empty(3)
    return [
        Example(
            e.image_id,
            e.uri,
            {"labels": replace_scores(e.detections["labels"]), "ignored": empty},
        )
        for e in found
    ]


def replace_scores(found: Detections) -> Detections:
    return Detections(
        found.boxes, torch.ones_like(found.scores), found.labels, found.probs
    )


def steps(task: SupervisedTraining, given: list[Example], count: int) -> list[dict[str, float]]:
    source = iterate_batches(given, task.fit, VIEWS, seed=0, first=0, rank=0, workers=1)
    return [
        {n: float(v) for n, v in task.train_step(next(source), step).items()}
        for step in range(count)
    ]


def task(settings: DetectorConfig, epoch: int = 2) -> SupervisedTraining:
    return build_supervised_task(settings, settings.fit, epoch)


def test_components_are_the_parts_of_the_objective(tmp_path: Path) -> None:
    settings = config(co_detr=tiny(denoising=4))
    (found,) = steps(task(settings), labelled(tmp_path), 1)
    assert set(found) == {
        "decoder",
        "proposals",
        "rcnn",
        "atss",
        "rcnn_queries",
        "atss_queries",
        "denoising",
    }
    model = new_co_detr(settings)
    batch = next(
        iterate_batches(
            labelled(tmp_path), settings.fit, VIEWS, seed=0, first=0, rank=0, workers=1
        )
    )
    from coin_ray.training.supervised import training_targets

    targets = [
        training_targets(a, b)
        for a, b in zip(
            batch.detections["labels"], batch.detections["ignored"], strict=True
        )
    ]
    whole = model.objective(
        model.base.prepare(batch.strong),
        targets,
        torch.Generator().manual_seed(batch.generators[0].initial_seed()),
    )
    assert sum(found.values()) == pytest.approx(float(whole.total.detach()), rel=1e-4)


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    given = labelled(tmp_path)
    totals = [sum(found.values()) for found in steps(task(config()), given, 6)]
    assert totals[-1] < totals[0]


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"average": 0.9}])
def test_parts_and_averages_train_as_well(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = config(**changes)
    own = task(settings)
    before = {n: v.clone() for n, v in own.final_model.state_dict().items()}
    assert all(
        value < float("inf")
        for found in steps(own, labelled(tmp_path), 3)
        for value in found.values()
    )
    assert any(
        not torch.equal(v, before[n]) for n, v in own.final_model.state_dict().items()
    )


def test_half_precision_trains(tmp_path: Path) -> None:
    settings = config()
    settings = replace(settings, fit=replace(settings.fit, amp=True))
    assert all(
        value < float("inf")
        for found in steps(task(settings), labelled(tmp_path), 2)
        for value in found.values()
    )


def test_an_average_follows_the_trained_weights_and_is_what_is_shipped(
    tmp_path: Path,
) -> None:
    own = task(config(average=0.5))
    steps(own, labelled(tmp_path), 1)
    assert own.average is not None
    assert all(
        torch.equal(a, b)
        for a, b in zip(own.average.parameters(), own.model.parameters(), strict=True)
    )  # the first step counts whole
    steps(own, labelled(tmp_path), 2)
    assert own.final_model is own.average
    assert not all(
        torch.equal(a, b)
        for a, b in zip(own.average.parameters(), own.model.parameters(), strict=True)
    )


def test_a_state_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    given, settings = labelled(tmp_path), config(average=0.9)
    whole, first, second = task(settings), task(settings), task(settings)
    source = list(
        iterate_batches(given, settings.fit, VIEWS, seed=0, first=0, rank=0, workers=1)
    )
    again = list(
        iterate_batches(given, settings.fit, VIEWS, seed=0, first=0, rank=0, workers=1)
    )
    for step, batch in enumerate(source[:4]):
        whole.train_step(batch, step)
    for step, batch in enumerate(again[:2]):
        first.train_step(batch, step)
    second.load_state_dict(first.state_dict())
    for step, batch in enumerate(again[2:4], start=2):
        second.train_step(batch, step)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            whole.final_model.state_dict().values(),
            second.final_model.state_dict().values(),
            strict=True,
        )
    )
    assert whole.positive_counts == second.positive_counts


def nothing(count: int = 2) -> Batch:
    empty = [Detections.empty(3)] * count
    generators = [torch.Generator().manual_seed(i) for i in range(count)]
    images = [torch.zeros(3, 64, 64, dtype=torch.uint8)] * count
    return Batch(
        images,
        images,
        {"labels": empty, "ignored": empty},
        generators,
        [False] * len(images),
    )


def test_an_epoch_without_a_positive_warns_with_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = task(config(co_detr=tiny()), epoch=2)
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            found = own.train_step(nothing(), step)
            assert all(bool(torch.isfinite(v)) for v in found.values())
            assert sum(float(v) for v in found.values()) > 0
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "epoch 1: atss and rcnn saw no positive. Objects: 0; positives: atss 0, rcnn 0."
    )


def test_an_epoch_with_positives_does_not_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        steps(task(config()), labelled(tmp_path), 4)
    assert not caplog.records


def test_backbone_and_offsets_have_rates_of_their_own() -> None:
    settings = config()
    fit = replace(settings.fit, lr=1e-3, visual_lr_factor=0.5)
    model = new_co_detr(settings)
    rates = {float(g["lr"]): g["params"] for g in parameter_groups(model, fit)}  # type: ignore[arg-type]
    assert set(rates) == {1e-3, 5e-4, 1e-4}
    names = {p: n for n, p in model.named_parameters() if p.requires_grad}
    assert all("backbone" in names[p] for p in rates[5e-4])  # type: ignore[attr-defined]
    assert all("offsets" in names[p] for p in rates[1e-4])  # type: ignore[attr-defined]
    assert sum(len(p) for p in rates.values()) == len(names)  # type: ignore[arg-type,misc]


def test_arms_start_from_the_same_detector() -> None:
    plain, both = (
        new_co_detr(config(co_detr=tiny(auxiliary=()))),
        new_co_detr(config(co_detr=tiny())),
    )
    assert all(
        torch.equal(v, both.base.state_dict()[n])
        for n, v in plain.base.state_dict().items()
    )
