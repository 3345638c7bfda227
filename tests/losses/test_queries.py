from __future__ import annotations

import pytest
import torch
from torchvision.ops import sigmoid_focal_loss

from coin_ray.losses.queries import soft_focal, soft_matching_cost
from coin_ray.models.co_detr import criterion

LOGITS = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))


def test_certain_targets_give_the_sigmoid_focal_loss() -> None:
    targets = (
        torch.eye(4)[[0, 1, 2, 3, 0, 1, 2]]
        * torch.tensor([1.0, 1, 1, 1, 1, 0, 0])[:, None]
    )
    torch.testing.assert_close(
        soft_focal(LOGITS, targets),
        sigmoid_focal_loss(LOGITS, targets, criterion.ALPHA, criterion.GAMMA),
    )


@pytest.mark.parametrize("target", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_the_loss_is_least_where_the_score_is_the_target(target: float) -> None:
    scores = torch.linspace(0.01, 0.99, 99)
    losses = soft_focal(scores.logit(), torch.full_like(scores, target))
    assert float(scores[losses.argmin()]) == pytest.approx(
        min(max(target, 0.01), 0.99), abs=0.006
    )
    assert bool((losses >= 0).all())


def test_certain_objects_cost_what_they_cost_elsewhere() -> None:
    draw = torch.Generator().manual_seed(1)
    boxes, truth = (
        torch.rand(7, 4, generator=draw) / 2 + 0.2,
        torch.rand(3, 4, generator=draw) / 2 + 0.2,
    )
    labels = torch.tensor([2, 0, 0])
    expected = criterion.matching_cost(LOGITS, boxes, labels, truth)
    torch.testing.assert_close(
        soft_matching_cost(LOGITS, boxes, torch.eye(4)[labels], truth), expected
    )


def test_an_object_of_two_names_costs_their_mean() -> None:
    boxes, truth = torch.full((7, 4), 0.3), torch.full((3, 4), 0.4)
    targets = torch.stack(
        [torch.eye(4)[0], torch.eye(4)[1], (torch.eye(4)[0] + torch.eye(4)[1]) / 2]
    )
    cost = soft_matching_cost(LOGITS, boxes, targets, truth)
    torch.testing.assert_close(cost[:, 2], cost[:, :2].mean(1))


def test_a_broken_box_costs_most_instead_of_stopping_the_run() -> None:
    boxes = torch.full((7, 4), 0.3)
    boxes[2] = torch.nan
    cost = soft_matching_cost(LOGITS, boxes, torch.eye(4)[:1], torch.full((1, 4), 0.4))
    assert bool(torch.isfinite(cost).all())
    assert int(cost[:, 0].argmax()) == 2
