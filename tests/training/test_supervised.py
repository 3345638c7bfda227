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
from coin_ray.training.supervised import (
    SupervisedTraining,
    parameter_groups,
    supervised_targets,
)
from tests.builders import CLASSES, examples, loss_values

VIEWS = Detector(short_side=64, long_side=96)


def _config(**changes: Any) -> DetectorConfig:
    fit = replace(small().fit, steps=6, batch=2, warmup=0)
    return replace(small(), classes=CLASSES, fit=fit, **changes)


def _labelled(folder: Path) -> list[Example]:
    labelled_examples = []
    for example in examples(folder):
        labels = example.detections["labels"]
        labels = replace(labels, scores=torch.ones_like(labels.scores))
        detections = {"labels": labels, "ignored": Detections.empty(3)}
        labelled_examples.append(Example(example.image_id, example.uri, detections))
    return labelled_examples


def _train_steps(
    task: SupervisedTraining, labelled_examples: list[Example], count: int
) -> list[dict[str, float]]:
    batches = iterate_batches(
        labelled_examples, task.fit, VIEWS, seed=0, first=0, rank=0, workers=1
    )
    losses = []
    for step in range(count):
        losses.append(loss_values(task.train_step(next(batches), step)))
    return losses


def _build(settings: DetectorConfig, epoch: int = 2) -> SupervisedTraining:
    return build_supervised_task(settings, settings.fit, epoch)


def test_components_are_the_parts_of_the_objective(tmp_path: Path) -> None:
    settings = _config(co_detr=tiny(denoising=4))
    (losses,) = _train_steps(_build(settings), _labelled(tmp_path), 1)
    assert set(losses) == {
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
            _labelled(tmp_path), settings.fit, VIEWS, seed=0, first=0, rank=0, workers=1
        )
    )
    targets = [
        supervised_targets(a, b)
        for a, b in zip(
            batch.detections["labels"], batch.detections["ignored"], strict=True
        )
    ]
    objective = model.objective(
        model.base.prepare(batch.strong),
        targets,
        torch.Generator().manual_seed(batch.generators[0].initial_seed()),
    )
    assert sum(losses.values()) == pytest.approx(
        float(objective.total.detach()), rel=1e-4
    )


def test_training_lowers_the_loss(tmp_path: Path) -> None:
    labelled_examples = _labelled(tmp_path)
    totals = [
        sum(losses.values())
        for losses in _train_steps(_build(_config()), labelled_examples, 6)
    ]
    assert totals[-1] < totals[0]


@pytest.mark.parametrize("changes", [{"accumulate": 2}, {"average": 0.9}])
def test_parts_and_averages_train_as_well(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    settings = _config(**changes)
    training = _build(settings)
    before = {n: v.clone() for n, v in training.final_model.state_dict().items()}
    assert all(
        loss < float("inf")
        for losses in _train_steps(training, _labelled(tmp_path), 3)
        for loss in losses.values()
    )
    assert any(
        not torch.equal(v, before[n])
        for n, v in training.final_model.state_dict().items()
    )


def test_half_precision_trains(tmp_path: Path) -> None:
    settings = _config()
    settings = replace(settings, fit=replace(settings.fit, amp=True))
    assert all(
        loss < float("inf")
        for losses in _train_steps(_build(settings), _labelled(tmp_path), 2)
        for loss in losses.values()
    )


def test_the_final_model_is_the_average_of_the_trained_weights(
    tmp_path: Path,
) -> None:
    training = _build(_config(average=0.5))
    _train_steps(training, _labelled(tmp_path), 1)
    assert training.average is not None
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            training.average.parameters(), training.model.parameters(), strict=True
        )
    )  # the first step counts whole
    _train_steps(training, _labelled(tmp_path), 2)
    assert training.final_model is training.average
    assert not all(
        torch.equal(a, b)
        for a, b in zip(
            training.average.parameters(), training.model.parameters(), strict=True
        )
    )


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    labelled_examples, settings = _labelled(tmp_path), _config(average=0.9)
    uninterrupted, first, resumed = _build(settings), _build(settings), _build(settings)
    batches = list(
        iterate_batches(
            labelled_examples, settings.fit, VIEWS, seed=0, first=0, rank=0, workers=1
        )
    )
    resumed_batches = list(
        iterate_batches(
            labelled_examples, settings.fit, VIEWS, seed=0, first=0, rank=0, workers=1
        )
    )
    for step, batch in enumerate(batches[:4]):
        uninterrupted.train_step(batch, step)
    for step, batch in enumerate(resumed_batches[:2]):
        first.train_step(batch, step)
    resumed.load_state_dict(first.state_dict())
    for step, batch in enumerate(resumed_batches[2:4], start=2):
        resumed.train_step(batch, step)
    assert all(
        torch.equal(a, b)
        for a, b in zip(
            uninterrupted.final_model.state_dict().values(),
            resumed.final_model.state_dict().values(),
            strict=True,
        )
    )
    assert uninterrupted.positive_counts == resumed.positive_counts


def _empty_batch(count: int = 2) -> Batch:
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
    training = _build(_config(co_detr=tiny()), epoch=2)
    with caplog.at_level(logging.WARNING):
        for step in range(2):
            losses = training.train_step(_empty_batch(), step)
            assert all(bool(torch.isfinite(v)) for v in losses.values())
            assert sum(float(v) for v in losses.values()) > 0
    (record,) = caplog.records
    assert record.getMessage().startswith(
        "epoch 1: atss and rcnn saw no positive. Objects: 0; positives: atss 0, rcnn 0."
    )


def test_an_epoch_with_positives_does_not_warn(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        _train_steps(_build(_config()), _labelled(tmp_path), 4)
    assert not caplog.records


def test_backbone_and_offsets_have_rates_of_their_own() -> None:
    settings = _config()
    fit = replace(settings.fit, lr=1e-3, visual_lr_factor=0.5)
    model = new_co_detr(settings)
    groups: list[Any] = parameter_groups(model, fit)
    rates = {group["lr"]: group["params"] for group in groups}
    assert set(rates) == {1e-3, 5e-4, 1e-4}
    names = {p: n for n, p in model.named_parameters() if p.requires_grad}
    assert all("backbone" in names[p] for p in rates[5e-4])
    assert all("offsets" in names[p] for p in rates[1e-4])
    assert sum(len(p) for p in rates.values()) == len(names)


def test_arms_start_from_the_same_detector() -> None:
    plain, collaborative = (
        new_co_detr(_config(co_detr=tiny(auxiliary=()))),
        new_co_detr(_config(co_detr=tiny())),
    )
    assert all(
        torch.equal(v, collaborative.base.state_dict()[n])
        for n, v in plain.base.state_dict().items()
    )
