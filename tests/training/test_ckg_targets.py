"""CKG on a student that was a detector before: an auxiliary region head, in training
only."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CLASSES, detections, tiny_config, tiny_fit, training_batches
from torch import nn

from coin_ray.config import Distill, Separate
from coin_ray.errors import ConfigError
from coin_ray.models.students.base import PyramidMaps
from coin_ray.models.students.region_head import AuxiliaryRegionHead
from coin_ray.models.students.yolox import YoloxStudent
from coin_ray.structures import Pairs, Separation
from coin_ray.training.ckg_targets import CkgTargetTraining, draw_proposals
from coin_ray.training.direct import TargetTraining, separation_targets
from coin_ray.training.targets import region_targets

RULES = Separate(iou_min=0.2, clip_score_min=0.0)
A, B = (4.0, 4, 30, 28), (34.0, 8, 58, 34)
B_OTHER = (34.0, 8, 58, 33)


def make_task(seed: int = 0, **changes: Any) -> CkgTargetTraining:
    torch.manual_seed(seed)
    fit = tiny_fit(optimizer="adamw", lr=1e-3, warmup=0)
    settings: dict[str, Any] = {"prototypes_from": 0, "ckg_lr": 0.1, "ckg_heads": 2}
    config = Distill(student="yolox-nano", fit=fit, **(settings | changes))
    student = YoloxStudent("yolox-nano", len(CLASSES), 64)
    return CkgTargetTraining(student, config, RULES, tiny_config())


def train_steps(task: CkgTargetTraining, folder: Path, steps: int = 2) -> list[Any]:
    """Train on images with one pair of each kind."""
    all_losses = []
    for step, batch in enumerate(training_batches(folder, task.fit)[:steps]):
        count = len(batch.weak)
        batch.detections.update(
            cloud=[detections((A, 0, 0.9), (B, 0, 0.8))] * count,
            clip=[detections((A, 0, 0.9), (B_OTHER, 2, 0.7))] * count,
        )
        batch.detections["clip_labels"] = [detections()] * count
        all_losses.append(task.train_step(batch, step))
    return all_losses


def copy_state(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def has_moved(before: dict[str, torch.Tensor], module: nn.Module) -> bool:
    after = module.state_dict()
    return any(not torch.equal(before[name], after[name]) for name in before)


def test_student_region_head_ckg_and_prototypes_learn(tmp_path: Path) -> None:
    task = make_task()
    parts = (
        task.student,
        task.region_head,
        task.fusion.ckg,
        task.fusion.cloud_prototypes,
    )
    before = [copy_state(part) for part in parts]
    losses, _ = train_steps(task, tmp_path)
    assert {"boxes", "region_classes", "region_boxes", "region_inconsistent"} < set(
        losses
    )
    assert {"ckg_consistent", "ckg_gradient", "gradient_angle"} < set(losses)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert [has_moved(b, p) for b, p in zip(before, parts, strict=True)] == [True] * 4


def test_the_region_head_teaches_the_student_s_maps(tmp_path: Path) -> None:
    """The same training with and without the head's losses: the maps differ."""
    name = "network.backbone.C3_n4.conv3.conv.weight"
    weights = []
    for weight in (0.0, 1.0):
        task = make_task(region_head_weight=weight)
        train_steps(task, tmp_path, steps=1)
        weights.append(task.student.state_dict()[name])
    assert not torch.equal(*weights)


def test_the_region_head_leaves_no_trace(tmp_path: Path) -> None:
    """What is delivered is the base alone, with the weights and outputs of one that
    never had the head."""
    task = make_task()
    train_steps(task, tmp_path)
    delivered = task.average.state_dict()
    base = YoloxStudent("yolox-nano", len(CLASSES), 64).eval()
    assert set(delivered) == set(base.state_dict())
    base.load_state_dict(delivered)
    base.to(memory_format=torch.channels_last)  # as in training: equal to the last bit
    pixels = torch.rand(1, 3, 64, 64) * 255
    with torch.no_grad():
        boxes, scores = base.detect_tensors(pixels)
        expected_boxes, expected_scores = task.average.detect_tensors(pixels)
    assert torch.equal(boxes, expected_boxes)
    assert torch.equal(scores, expected_scores)


def test_before_ckg_is_trained_the_targets_are_those_of_the_mean(
    tmp_path: Path,
) -> None:
    """With no weight for the head, a step is that of the rule ``average``."""
    task = make_task(prototypes_from=5, region_head_weight=0.0)
    torch.manual_seed(0)
    plain = TargetTraining(
        YoloxStudent("yolox-nano", len(CLASSES), 64),
        separation_targets(Distill(student="yolox-nano", fusion="average"), RULES),
        task.fit,
        average_rate=task.average_rate,
        frozen_norms=True,
    )
    losses = train_steps(task, tmp_path, steps=1)[0]
    expected = train_steps(plain, tmp_path, steps=1)[0]  # type: ignore[arg-type]
    for name, loss in expected.items():
        assert torch.equal(loss, losses[name]), name
    assert not {"ckg_gradient", "region_inconsistent"} & set(losses)


def test_a_resumed_training_is_the_same(tmp_path: Path) -> None:
    task = make_task()
    train_steps(task, tmp_path, steps=1)
    resumed = make_task(seed=1)
    resumed.load_state_dict(copy.deepcopy(task.state_dict()))
    first = train_steps(task, tmp_path, steps=1)[0]
    second = train_steps(resumed, tmp_path, steps=1)[0]
    for name, loss in first.items():
        assert torch.equal(loss, second[name]), name


def test_without_pairs_the_losses_are_finite(tmp_path: Path) -> None:
    task = make_task()
    batch = training_batches(tmp_path, task.fit)[0]
    for name in ("cloud", "clip", "clip_labels"):
        batch.detections[name] = [detections()] * len(batch.weak)
    losses = task.train_step(batch, 0)
    assert all(torch.isfinite(loss) for loss in losses.values())
    assert all(
        bool(torch.isfinite(t).all())
        for module in (task.student, task.region_head, task.fusion.ckg)
        for t in module.state_dict().values()
    )


def test_boxes_are_described_where_they_are_on_the_maps() -> None:
    """Maps of which the left half is 1 and the right half 0; an image twice the size of
    the network's input."""
    student = YoloxStudent("yolox-nano", len(CLASSES), 64)
    head = AuxiliaryRegionHead(student, tiny_config())
    maps = []
    for channels, stride in zip(student.map_channels, student.map_strides, strict=True):
        side = 512 // stride
        level = torch.zeros(1, channels, side, side)
        level[..., : side // 2] = 1.0
        maps.append(level)
    extracted = PyramidMaps(torch.zeros(1, 3, 512, 512), maps, [(512, 512)])
    images = [torch.zeros(3, 1024, 1024, dtype=torch.uint8)]
    boxes = torch.tensor([[0.0, 0, 400, 400], [640, 0, 1000, 400]])
    regions = head(extracted, images, [boxes])
    left, right = regions.pooled
    torch.testing.assert_close(left, torch.ones_like(left))
    torch.testing.assert_close(right, torch.zeros_like(right))
    assert regions.logits.shape == (2, len(CLASSES) + 1)


def test_proposals_hold_positives_and_background() -> None:
    labels = detections((A, 0, 0.9))
    other = detections((B, 1, 0.9))
    separation = Separation(
        Pairs(labels.boxes, labels, labels), Pairs.empty(len(CLASSES)), other
    )
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    proposals = draw_proposals(separation, image, generator)
    assert proposals.min() >= 0
    assert proposals.max() <= 64
    config = tiny_config()
    targets = region_targets(proposals, separation, config, generator)
    assert 0 < targets.positives < len(targets.proposals)


def test_a_ckg_that_is_never_trained_is_named() -> None:
    with pytest.raises(ConfigError, match="never trained"):
        make_task(prototypes_from=10_000)
    with pytest.raises(ConfigError, match="YOLOX"):
        Distill(student="d-fine-n")
