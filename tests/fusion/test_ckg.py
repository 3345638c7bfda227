from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from coin_ray.fusion.ckg import ConsistentKnowledge, PrototypeAttention

ROWS, SIZE, CLASSES, HEADS = 5, 16, 3, 4


def _network(size: int = SIZE, heads: int = HEADS) -> ConsistentKnowledge:
    torch.manual_seed(1)
    return ConsistentKnowledge(size, CLASSES, heads).double()


def _inputs(
    rows: int = ROWS, size: int = SIZE
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    features, prototypes = (
        F.normalize(normal(rows, size), dim=-1),
        [F.normalize(normal(CLASSES + 1, size), dim=-1) for _ in range(2)],
    )
    return (
        features,
        (prototypes[0], prototypes[1]),
        normal(rows, CLASSES + 1).softmax(-1),
        normal(rows, CLASSES + 1).softmax(-1),
    )


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _weights_by_hand(
    attention: PrototypeAttention, features: np.ndarray, prototypes: np.ndarray
) -> np.ndarray:
    """Paper eq. 6, head by head."""
    query_weight, key_weight, value_weight, output_weight = (
        getattr(attention, n).weight.detach().numpy()
        for n in ("query", "key", "value", "output")
    )
    width, parts = SIZE // HEADS, []
    for head in range(HEADS):
        rows = slice(head * width, (head + 1) * width)
        scores = (
            (features @ query_weight[rows].T)
            @ (prototypes @ key_weight[rows].T).T
            / np.sqrt(width)
        )
        parts.append(_softmax(scores) @ (prototypes @ value_weight[rows].T))
    return (
        np.concatenate(parts, 1) @ output_weight.T
        + attention.output.bias.detach().numpy()
    )


def test_forward_by_hand() -> None:
    ckg, (features, prototypes, cloud, clip) = _network(), _inputs()
    torch.nn.init.normal_(ckg.cloud.output.bias)
    by_hand = _softmax(
        _weights_by_hand(ckg.cloud, features.numpy(), prototypes[0].numpy())
        * cloud.numpy()
        + _weights_by_hand(ckg.clip, features.numpy(), prototypes[1].numpy())
        * clip.numpy()
    )
    np.testing.assert_allclose(
        ckg(features, prototypes, cloud, clip).detach().numpy(), by_hand, rtol=1e-12
    )


def test_weights_are_those_of_forward() -> None:
    ckg, (features, prototypes, cloud, clip) = _network(), _inputs()
    weights = ckg.weights(features, prototypes)
    assert weights.shape == (2, ROWS, CLASSES + 1)
    torch.testing.assert_close(
        (weights[0] * cloud + weights[1] * clip).softmax(-1),
        ckg(features, prototypes, cloud, clip),
    )


def test_ckg_rows_are_probabilities() -> None:
    fused = _network()(*_inputs(50))
    torch.testing.assert_close(fused.sum(-1), torch.ones(50, dtype=torch.float64))
    assert bool((fused > 0).all())


def test_no_rows() -> None:
    features, prototypes, cloud, clip = _inputs(0)
    fused = _network()(features, prototypes, cloud, clip)
    assert fused.shape == (0, CLASSES + 1)
    fused.sum().backward()


def test_at_the_start_weights_hardly_depend_on_the_roi() -> None:
    """Published observation: with a real embedding size CKG begins as one constant
    weight per class."""
    features, prototypes, _, _ = _inputs(64, 512)
    weights = _network(512, 8).weights(features, prototypes).detach()
    assert float(weights.std(1).max()) < 5e-3 * float(weights.abs().max())


def test_published_parameters() -> None:
    """q, k, v without bias; the output with a bias that starts at zero."""
    attention = _network().cloud
    assert {n for n, _ in attention.named_parameters()} == {
        "query.weight",
        "key.weight",
        "value.weight",
        "output.weight",
        "output.bias",
    }
    assert bool((attention.output.bias == 0).all())
    assert float(attention.query.weight.detach().std()) == pytest.approx(
        (2 / (2 * SIZE)) ** 0.5, rel=0.2
    )


def test_features_are_not_differentiated() -> None:
    features, prototypes, cloud, clip = _inputs()
    features.requires_grad_()
    _network()(features, prototypes, cloud, clip)[:, 0].sum().backward()
    assert features.grad is None
