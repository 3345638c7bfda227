from __future__ import annotations

import math

import pytest
import torch
from builders import tiny_co_detr, tiny_detector, tiny_fit

from coin_ray.config import TrainingConfig
from coin_ray.training.schedule import (
    learning_rate_factor,
    make_optimizer,
    set_learning_rate,
)

PUBLISHED = TrainingConfig(
    steps=65_000,
    milestones=(40_000, 45_000, 60_000),
    factors=(0.1, 0.5, 0.1),
    warmup=400,
)


@pytest.mark.parametrize(
    ("step", "factor"),
    [
        (0, 0.001),
        (200, 0.5005),
        (400, 1.0),
        (39_999, 1.0),
        (40_000, 0.1),
        (44_999, 0.1),
        (45_000, 0.5),
        (59_999, 0.5),
        (60_000, 0.1),
    ],
)
def test_factors_are_absolute_and_rise_again(step: int, factor: float) -> None:
    assert learning_rate_factor(step, PUBLISHED) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("step", "factor"),
    [(0, 1.0), (25, 0.5 + 0.5 * math.cos(math.pi / 4)), (50, 0.5), (100, 0.0)],
)
def test_cosine(step: int, factor: float) -> None:
    config = TrainingConfig(
        steps=100, schedule="cosine", warmup=0, milestones=(), factors=()
    )
    assert learning_rate_factor(step, config) == pytest.approx(factor)


def test_warmup_multiplies_the_cosine() -> None:
    config = TrainingConfig(
        steps=100, schedule="cosine", warmup=50, milestones=(), factors=()
    )
    assert learning_rate_factor(25, config) == pytest.approx(
        (0.001 + 0.999 / 2) * (0.5 + 0.5 * math.cos(math.pi / 4))
    )


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_groups(optimizer: str) -> None:
    detector = tiny_detector()
    config = tiny_fit(
        optimizer=optimizer, lr=0.01, visual_lr_factor=0.1, weight_decay=0.3
    )
    groups = make_optimizer(detector, config).param_groups
    by_parameter = {id(p): g for g in groups for p in g["params"]}
    trained = {n: p for n, p in detector.named_parameters() if p.requires_grad}
    assert len(by_parameter) == len(trained)
    for name, parameter in trained.items():
        group = by_parameter[id(parameter)]
        assert group["lr"] == pytest.approx(
            0.001 if name.startswith("tower.") else 0.01
        )
        assert group["weight_decay"] == (0.3 if parameter.ndim > 1 else 0.0)


def test_setting_the_rate_keeps_the_ratio_of_groups() -> None:
    config = tiny_fit(
        lr=0.01, visual_lr_factor=0.1, warmup=0, milestones=(2, 4), factors=(0.1, 0.5)
    )
    optimizer = torch.optim.SGD(
        [
            {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": r, "base_lr": r}
            for r in (0.01, 0.001)
        ]
    )
    rates = []
    for step in range(5):
        set_learning_rate(optimizer, step, config)
        rates.append([g["lr"] for g in optimizer.param_groups])
    assert rates == [
        pytest.approx([0.01 * f, 0.001 * f]) for f in (1, 1, 0.1, 0.1, 0.5)
    ]


def test_a_detr_s_tower_and_sampling_offsets_learn_slower() -> None:
    student, fit = tiny_co_detr(), tiny_fit(visual_lr_factor=0.5)
    rates = {
        id(p): g["base_lr"]
        for g in make_optimizer(student, fit).param_groups
        for p in g["params"]
    }
    trained = {
        name: rates[id(p)] for name, p in student.named_parameters() if p.requires_grad
    }
    assert len(trained) == len(rates)
    assert {
        rate for name, rate in trained.items() if name.startswith("base.backbone.")
    } == {fit.lr * 0.5}
    assert {rate for name, rate in trained.items() if ".offsets." in name} == {
        fit.lr * 0.1
    }
    assert (
        trained["head.embed.weight"]
        == trained["base.neck.lateral.0.0.weight"]
        == fit.lr
    )
