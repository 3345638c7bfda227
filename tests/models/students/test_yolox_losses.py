"""The losses of YOLOX: equal to the reference implementation's, and what weights, soft
classes and ignored regions change.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.ops import box_convert

from coin_ray.models.students.yolox import YoloxStudent
from coin_ray.models.students.yolox_losses import yolox_losses
from coin_ray.models.students.yolox_network import cell_grid
from coin_ray.structures import Targets

CLASSES = 5
SIDE = 128


def _make_student() -> YoloxStudent:
    torch.manual_seed(3)
    student = YoloxStudent("yolox-nano", CLASSES, SIDE)
    # larger logits than the initial ones, so that the assignment has choices
    for predictor in student.network.head.obj_preds:
        torch.nn.init.zeros_(predictor.bias)
    return student.eval()


def _make_targets(count: int, seed: int = 0) -> Targets:
    draw = torch.Generator().manual_seed(seed)
    corners = torch.rand(count, 2, generator=draw) * 90
    sizes = 8 + torch.rand(count, 2, generator=draw) * 60
    boxes = torch.cat([corners, (corners + sizes).clamp(max=SIDE)], 1)
    labels = torch.randint(CLASSES, (count,), generator=draw)
    return Targets.from_labels(boxes, labels, CLASSES)


def _make_images(count: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(9)
    shape = (3, SIDE, SIDE)
    return [
        torch.randint(256, shape, dtype=torch.uint8, generator=draw)
        for _ in range(count)
    ]


def reference_model(student: YoloxStudent) -> Any:
    config = pytest.importorskip("yolox.config")
    settings = config.YoloxConfig.get_named_config("yolox_nano")
    settings.num_classes = CLASSES
    model = settings.get_model()
    model.load_state_dict(student.network.state_dict())
    return model


def reference_labels(targets: list[Targets]) -> Tensor:
    """[B, 120, 5]: class, centre and size, as the reference implementation takes it."""
    labels = torch.zeros(len(targets), 120, 5)
    for row, target in enumerate(targets):
        labels[row, : len(target), 0] = target.labels.float()
        boxes = box_convert(target.boxes, "xyxy", "cxcywh")
        labels[row, : len(target), 1:] = boxes
    return labels


@pytest.mark.parametrize("counts", [(3, 0, 7), (1, 1, 1), (0, 0, 0), (30, 12, 25)])
def test_losses_equal_the_reference_implementation(counts: tuple[int, ...]) -> None:
    student = _make_student().train()
    reference = reference_model(student).train()
    images = _make_images(len(counts))
    targets = [_make_targets(count, seed) for seed, count in enumerate(counts)]
    pixels = torch.stack(images).float().flip(1)
    expected = reference(pixels, reference_labels(targets))
    losses = student.losses(images, targets)
    assert float(losses["boxes"]) == pytest.approx(
        float(expected["iou_loss"]), rel=1e-5
    )
    for name, theirs in (("objectness", "conf_loss"), ("classes", "cls_loss")):
        assert float(losses[name]) == pytest.approx(float(expected[theirs]), rel=1e-5)
    sum(losses.values()).backward()
    expected["total_loss"].backward()
    their_gradients = dict(reference.named_parameters())
    for name, parameter in student.network.named_parameters():
        theirs = their_gradients[name].grad
        if theirs is None:
            assert parameter.grad is None or not parameter.grad.any()
        else:
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-3, atol=1e-4)


def outputs_and_losses(targets: Targets) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)
    cells, strides = cell_grid(torch.zeros(1, 3, SIDE, SIDE))
    outputs = torch.randn(1, len(cells), 5 + CLASSES, requires_grad=True)
    losses = yolox_losses(outputs, cells, strides, [targets])
    sum(losses.values()).backward()
    return outputs, losses


def test_an_ignored_region_has_no_gradient_and_no_loss() -> None:
    region = torch.tensor([[32.0, 32.0, 96.0, 96.0]])
    nothing = _make_targets(0)
    outputs, losses = outputs_and_losses(
        Targets(nothing.boxes, nothing.probs, nothing.weights, region)
    )
    cells, strides = cell_grid(torch.zeros(1, 3, SIDE, SIDE))
    centres = (cells + 0.5) * strides[:, None]
    is_inside = ((centres > 32) & (centres < 96)).all(1)
    assert is_inside.sum() == 64 + 16 + 4
    gradient = outputs.grad[0]
    assert (gradient[is_inside] == 0).all()
    assert (gradient[~is_inside, 4] != 0).all()
    _, with_background = outputs_and_losses(nothing)
    assert losses["objectness"] < with_background["objectness"]


def test_a_whole_ignored_image_costs_nothing_and_is_finite() -> None:
    student = _make_student().train()
    images = _make_images(2)
    nothing = _make_targets(0)
    region = torch.tensor([[0.0, 0.0, SIDE, SIDE]])
    targets = Targets(nothing.boxes, nothing.probs, nothing.weights, region)
    losses = student.losses(images, [targets, targets])
    assert [float(loss) for loss in losses.values()] == [0.0, 0.0, 0.0]
    sum(losses.values()).backward()
    assert all(not p.grad.any() for p in student.parameters() if p.grad is not None)


def test_a_box_in_an_ignored_region_is_learned() -> None:
    certain = _make_targets(1)
    region = torch.tensor([[0.0, 0.0, SIDE, SIDE]])
    outputs, losses = outputs_and_losses(
        Targets(certain.boxes, certain.probs, certain.weights, region)
    )
    assert losses["boxes"] > 0
    learned = outputs.grad[0, :, 4] != 0
    assert (outputs.grad[0, learned, 4] < 0).all()  # towards "object"
    assert learned.any()


def test_half_the_weight_of_a_lone_cell_halves_its_gradient() -> None:
    # far from all predictions a box gets one cell whatever its weight
    box, probs = torch.tensor([[60.0, 60.0, 60.5, 60.5]]), _make_targets(1).probs
    nowhere = torch.zeros(0, 4)
    others = _make_targets(1, seed=5)  # a second box, so that the total is above 1
    gradients = []
    for weight in (1.0, 0.5):
        weights = torch.tensor([weight, 1.0])
        targets = Targets(
            torch.cat([box, others.boxes]),
            torch.cat([probs, others.probs]),
            weights,
            nowhere,
        )
        outputs, _ = outputs_and_losses(targets)
        cell = int((outputs.grad[0, :, 5:].abs().sum(1) > 0).nonzero()[0])
        gradients.append(outputs.grad[0, cell, 5:])
    ratio = gradients[1].norm() / gradients[0].norm()
    assert 0.5 < float(ratio) < 1.0  # half the loss, over a smaller total weight


def test_an_uncertain_box_gets_fewer_cells() -> None:
    torch.manual_seed(1)
    cells, strides = cell_grid(torch.zeros(1, 3, SIDE, SIDE))
    box = torch.tensor([[40.0, 40.0, 104.0, 104.0]])
    centre, size = torch.tensor([72.0, 72.0]), torch.tensor([64.0, 64.0])
    outputs = torch.zeros(1, len(cells), 5 + CLASSES)
    outputs[0, :, :2] = centre / strides[:, None] - cells
    outputs[0, :, 2:4] = (size / strides[:, None]).log()
    counts = []
    for weight in (1.0, 0.35):
        target = Targets(
            box, _make_targets(1).probs, torch.tensor([weight]), torch.zeros(0, 4)
        )
        leaf = outputs.clone().requires_grad_()
        losses = yolox_losses(leaf, cells, strides, [target])
        losses["classes"].backward()
        counts.append(int((leaf.grad[0, :, 5:].abs().sum(1) > 0).sum()))
    assert counts == [10, 3]


def test_soft_classes_are_learned_as_distributions() -> None:
    box = torch.tensor([[40.0, 40.0, 80.0, 80.0]])
    probs = torch.tensor([[0.6, 0.2, 0.0, 0.0, 0.0, 0.2]])
    target = Targets(box, probs, torch.ones(1), torch.zeros(0, 4))
    cells, strides = cell_grid(torch.zeros(1, 3, SIDE, SIDE))
    outputs = torch.zeros(1, len(cells), 5 + CLASSES)
    outputs[0, :, :2] = torch.tensor([60.0, 60.0]) / strides[:, None] - cells
    outputs[0, :, 2:4] = (torch.tensor([40.0, 40.0]) / strides[:, None]).log()
    leaf = outputs.clone().requires_grad_()
    losses = yolox_losses(leaf, cells, strides, [target])
    sum(losses.values()).backward()
    learned = (leaf.grad[0, :, 5:].abs().sum(1) > 0).nonzero()[:, 0]
    count = len(learned)
    # the gradient of a cross entropy is probability (.5) - target; IoU is 1
    expected = torch.tensor([0.5 - 0.75, 0.5 - 0.25, 0.5, 0.5, 0.5]) / count
    for cell in learned.tolist():
        torch.testing.assert_close(leaf.grad[0, cell, 5:], expected)
        # objectness: 1 less the probability of background
        torch.testing.assert_close(leaf.grad[0, cell, 4] * count, torch.tensor(-0.3))
