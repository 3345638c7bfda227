"""Training with targets: the parts of a student that learn, its average, resuming."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from builders import CLASSES, tiny_fit, training_batches
from torch import nn

from coin_ray.config import Distill, Separate, TrainingConfig
from coin_ray.models.students.yolox import YoloxStudent
from coin_ray.training.direct import (
    TargetTraining,
    plain_targets,
    separation_targets,
    target_parameter_groups,
)


def _student_settings() -> Distill:
    return Distill(student="yolox-nano", fusion="average")


def fit(**changes: object) -> TrainingConfig:
    return tiny_fit(optimizer="adamw", lr=1e-3, warmup=0, **changes)


def _make_task(frozen: bool = True, seed: int = 0, **changes: object) -> TargetTraining:
    torch.manual_seed(seed)
    student = YoloxStudent("yolox-nano", len(CLASSES), 64)
    return TargetTraining(
        student,
        separation_targets(_student_settings(), Separate()),
        fit(**changes),
        average_rate=0.25,
        frozen_norms=frozen,
    )


def copy_state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def test_frozen_norms_keep_their_statistics_and_all_else_learns(tmp_path: Path) -> None:
    task = _make_task()
    before = copy_state(task.student)
    for step, batch in enumerate(training_batches(tmp_path, task.fit)[:2]):
        losses = task.train_step(batch, step)
        assert {"boxes", "objectness", "classes", "count_consistent"} <= set(losses)
        assert all(torch.isfinite(loss) for loss in losses.values())
    after = task.student.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    statistics = {n for n in before if "running_" in n or "num_batches" in n}
    assert len(statistics) > 100
    assert not changed & statistics
    for part in (
        "backbone.backbone.stem.conv.conv",
        "head.stems.0.bn",
        "head.obj_preds.2",
    ):
        assert f"network.{part}.weight" in changed


def test_live_norms_learn_their_statistics(tmp_path: Path) -> None:
    task = _make_task(frozen=False)
    before = copy_state(task.student)
    task.train_step(training_batches(tmp_path, task.fit)[0], 0)
    name = "network.backbone.backbone.stem.conv.bn.running_mean"
    assert not torch.equal(before[name], task.student.state_dict()[name])


def test_the_average_follows_the_student(tmp_path: Path) -> None:
    task = _make_task()
    name = "network.head.obj_preds.0.bias"
    weights = []
    for step, batch in enumerate(training_batches(tmp_path, task.fit)[:2]):
        task.train_step(batch, step)
        weights.append(task.student.state_dict()[name].clone())
    # the plain mean of the first two steps
    expected = (weights[0] + weights[1]) / 2
    torch.testing.assert_close(task.average.state_dict()[name], expected)
    assert not task.average.training


def test_the_trunk_learns_more_slowly() -> None:
    torch.manual_seed(0)
    student = YoloxStudent("yolox-nano", 3, 64)
    groups = target_parameter_groups(student, fit(visual_lr_factor=0.1))
    rates = {}
    for group in groups:
        for parameter in group["params"]:  # type: ignore[attr-defined]
            rates[parameter] = (group["lr"], group["weight_decay"])
    network = student.network
    assert len(rates) == len(list(student.parameters()))
    stem = network.backbone.backbone.stem.conv
    assert rates[stem.conv.weight] == (pytest.approx(1e-4), 1e-4)
    assert rates[stem.bn.weight] == (pytest.approx(1e-4), 0.0)
    assert rates[network.head.cls_preds[0].weight] == (pytest.approx(1e-3), 1e-4)
    frozen = target_parameter_groups(student, fit(visual_lr_factor=0.0))
    assert {g["lr"] for g in frozen} == {1e-3}


def test_a_resumed_training_is_the_same(tmp_path: Path) -> None:
    task = _make_task()
    batches = training_batches(tmp_path, task.fit)
    task.train_step(batches[0], 0)
    resumed = _make_task(seed=1)
    resumed.load_state_dict(copy.deepcopy(task.state_dict()))
    first = task.train_step(batches[0], 1)
    second = resumed.train_step(batches[0], 1)
    for name, loss in first.items():
        assert torch.equal(loss, second[name]), name
    for part in ("student", "average"):
        expected = task.state_dict()[part]
        for name, tensor in resumed.state_dict()[part].items():
            assert torch.equal(tensor, expected[name])


def test_plain_labels_teach_without_separation(tmp_path: Path) -> None:
    task = _make_task()
    batch = training_batches(tmp_path, task.fit)[0]
    batch.detections["labels"] = batch.detections["cloud"]
    targets, figures = plain_targets(batch)
    assert [len(t) for t in targets] == [len(d) for d in batch.detections["cloud"]]
    assert figures == {}
    task.make_batch_targets = plain_targets
    assert "classes" in task.train_step(batch, 0)


def test_dawid_skene_needs_annotators() -> None:
    with pytest.raises(ValueError, match="annotators"):
        separation_targets(Distill(fusion="dawid_skene"), Separate())
