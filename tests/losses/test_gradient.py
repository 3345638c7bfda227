from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coin_ray.fusion.ckg import ConsistentKnowledge
from coin_ray.losses.gradient import gradient_misalignment, squared_error


def _vector(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def _losses_with_gradients(
    *pairs: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor, list[nn.Parameter]]:
    """Two losses whose gradients with respect to the returned parameters are given."""
    parameters = [nn.Parameter(torch.zeros_like(a)) for a, _ in pairs]
    first, second = (
        torch.stack(
            [(p * pair[side]).sum() for p, pair in zip(parameters, pairs, strict=True)]
        ).sum()
        for side in (0, 1)
    )
    return first, second, parameters


def test_squared_error() -> None:
    logits = torch.zeros(2, 2, dtype=torch.float64)
    assert float(
        squared_error(
            logits, torch.tensor([[1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
        )
    ) == pytest.approx(0.5 / 4)


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (_vector(1, 0), _vector(2, 0), 0.0),
        (_vector(1, 0), _vector(0, 5), 1.0),
        (_vector(1, 0), _vector(-3, 0), 2.0),
        (_vector(3, 4), _vector(4, 3), 1 - 24 / 25),
    ],
)
def test_biases_are_compared_whole(a: Tensor, b: Tensor, expected: float) -> None:
    assert float(
        gradient_misalignment(*_losses_with_gradients((a, b)))
    ) == pytest.approx(expected, abs=1e-9)


def test_matrices_are_compared_row_by_row() -> None:
    """Rows: equal directions, and orthogonal ones: 1 - (1 + 0) / 2. Flattened it would
    be 1 - 100 / (sqrt(101) sqrt(101))."""
    a, b = (
        torch.stack([_vector(10, 0), _vector(1, 0)]),
        torch.stack([_vector(10, 0), _vector(0, 1)]),
    )
    misalignment = float(gradient_misalignment(*_losses_with_gradients((a, b))))
    assert misalignment == pytest.approx(0.5)
    assert misalignment != pytest.approx(1 - 100 / 101, abs=0.1)


def test_parameters_count_alike() -> None:
    misalignment = gradient_misalignment(
        *_losses_with_gradients(
            (_vector(1, 0), _vector(1, 0)), (_vector(9, 0, 0), _vector(0, 9, 0))
        )
    )
    assert float(misalignment) == pytest.approx(0.5)


class _Setup:
    """CKG, a transformation and a head in float64, as in training."""

    def __init__(self, consistent: int = 3, inconsistent: int = 4) -> None:
        torch.manual_seed(0)
        self.ckg = ConsistentKnowledge(8, 2, 2).double()
        self.transformation = nn.Sequential(
            nn.Linear(6, 5), nn.LeakyReLU(), nn.Linear(5, 6)
        ).double()
        self.head = nn.Linear(6, 3).double()
        self.pooled = torch.randn(consistent + inconsistent, 6, dtype=torch.float64)
        self.consistent = consistent
        self.features = nn.functional.normalize(
            torch.randn(inconsistent, 8, dtype=torch.float64), dim=-1
        )
        self.banks = (
            torch.randn(3, 8, dtype=torch.float64),
            torch.randn(3, 8, dtype=torch.float64),
        )
        self.cloud, self.clip = (
            torch.randn(inconsistent, 3, dtype=torch.float64).softmax(-1)
            for _ in range(2)
        )
        self.labels = nn.functional.one_hot(torch.arange(consistent) % 2, 3).double()

    def loss(self) -> Tensor:
        return gradient_misalignment(
            *self.losses(), list(self.transformation.parameters())
        )

    def losses(self) -> tuple[Tensor, Tensor]:
        fused = self.ckg(self.features, self.banks, self.cloud, self.clip)
        logits = self.head(self.transformation(self.pooled))
        # squared_error takes logits to float32, too coarse for finite differences
        consistent_loss = (
            (logits[: self.consistent].softmax(-1) - self.labels) ** 2
        ).sum() / max(self.labels.numel(), 1)
        inconsistent_loss = (
            (logits[self.consistent :].softmax(-1) - fused) ** 2
        ).sum() / max(fused.numel(), 1)
        return consistent_loss, inconsistent_loss


def test_against_a_loop_over_rows_in_float64() -> None:
    setup = _Setup()
    cosines = []
    for parameter in setup.transformation.parameters():
        a, b = (
            torch.autograd.grad(loss, parameter, retain_graph=True)[0].numpy()
            for loss in setup.losses()
        )
        rows = list(zip(a, b, strict=True)) if a.ndim == 2 else [(a, b)]
        cosines.append(np.mean([x @ y / np.sqrt((x @ x) * (y @ y)) for x, y in rows]))
    assert len(cosines) == 4
    assert float(setup.loss().detach()) == pytest.approx(
        np.mean(1 - np.array(cosines)), rel=1e-9
    )


@pytest.mark.parametrize(
    "name",
    [
        "cloud.output.bias",
        "cloud.value.weight",
        "clip.output.weight",
        "clip.query.weight",
    ],
)
def test_double_backward_against_finite_differences(name: str) -> None:
    setup = _Setup()
    parameter = dict(setup.ckg.named_parameters())[name]
    (gradient,) = torch.autograd.grad(setup.loss(), [parameter])
    step = 1e-6
    index = int(gradient.abs().argmax())
    flat = parameter.data.view(-1)
    losses = []
    for sign in (1, -1):
        flat[index] += sign * step
        losses.append(float(setup.loss().detach()))
        flat[index] -= sign * step
    assert gradient.flatten()[index].item() != 0
    assert gradient.flatten()[index].item() == pytest.approx(
        (losses[0] - losses[1]) / (2 * step), rel=1e-4, abs=1e-9
    )


def test_descending_aligns() -> None:
    setup = _Setup()
    optimizer = torch.optim.Adam(setup.ckg.parameters(), lr=0.02)
    history = []
    for _ in range(40):
        loss = setup.loss()
        optimizer.zero_grad()
        gradients = torch.autograd.grad(loss, list(setup.ckg.parameters()))
        for parameter, gradient in zip(setup.ckg.parameters(), gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        history.append(float(loss.detach()))
    assert history[-1] < history[0] - 0.05


def test_the_consistent_direction_is_fixed() -> None:
    """No gradient flows into what made the targets of the consistent loss."""
    weights = nn.Parameter(torch.ones(2, dtype=torch.float64))
    consistent_target, inconsistent_target = (
        _vector(1, 2).requires_grad_(),
        _vector(2, 1).requires_grad_(),
    )
    misalignment = gradient_misalignment(
        ((weights - consistent_target) ** 2).sum(),
        ((weights - inconsistent_target) ** 2).sum() * 0.5,
        [weights],
    )
    gradients = torch.autograd.grad(
        misalignment, [consistent_target, inconsistent_target], allow_unused=True
    )
    assert gradients[0] is None
    assert gradients[1] is not None


@pytest.mark.parametrize(("consistent", "inconsistent"), [(0, 3), (3, 0), (0, 0)])
def test_without_one_kind_it_stays_finite(consistent: int, inconsistent: int) -> None:
    setup = _Setup(consistent, inconsistent)
    loss = setup.loss()
    assert float(loss.detach()) == pytest.approx(1)
    gradients = torch.autograd.grad(
        loss, list(setup.ckg.parameters()), allow_unused=True
    )
    assert all(g is None or bool(torch.isfinite(g).all()) for g in gradients)


def test_scale_of_losses_cancels() -> None:
    a, b = (
        torch.stack([_vector(1, 2), _vector(3, -1)]),
        torch.stack([_vector(2, 2), _vector(1, 0)]),
    )
    plain = gradient_misalignment(*_losses_with_gradients((a, b)))
    tiny = gradient_misalignment(*_losses_with_gradients((1e-6 * a, 1e-6 * b)))
    assert float(tiny) == pytest.approx(float(plain), rel=1e-6)
