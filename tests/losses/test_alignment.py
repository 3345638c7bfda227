from __future__ import annotations

import pytest
import torch

from coin_ray.losses.alignment import prompt_alignment


def test_mean_distance_of_unit_vectors() -> None:
    """[3, 4] / 5 against [0, 2] / 2: .6 and .2; equal directions: 0."""
    embeddings = torch.tensor([[3.0, 4.0], [1.0, 0.0]], dtype=torch.float64)
    prototypes = torch.tensor([[0.0, 2.0], [7.0, 0.0]], dtype=torch.float64)
    assert float(prompt_alignment(embeddings, prototypes)) == pytest.approx(0.8 / 4)


def test_prototypes_stay() -> None:
    embeddings, prototypes = (torch.randn(3, 4, requires_grad=True) for _ in range(2))
    prompt_alignment(embeddings, prototypes).backward()
    assert prototypes.grad is None
    assert embeddings.grad is not None
