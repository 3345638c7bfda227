from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from coin_ray.models.co_detr.attention import (
    DeformableAttention,
    SelfAttention,
    sample_maps,
    sampling_locations,
)
from models.co_detr.scenes import SHAPES, rand, randn

TOKENS = sum(h * w for h, w in SHAPES)


def _new_attention(
    width: int = 16, heads: int = 4, points: int = 3
) -> DeformableAttention:
    torch.manual_seed(0)
    module = DeformableAttention(width, heads, len(SHAPES), points)
    for layer in (module.offsets, module.weights):
        torch.nn.init.normal_(layer.weight, std=0.3)
    return module


def _pixel_or_zero(grid: Tensor, row: int, column: int) -> Tensor:
    """Return the cell, zeros outside the map."""
    height, width = grid.shape[:2]
    return (
        grid[row, column]
        if 0 <= row < height and 0 <= column < width
        else torch.zeros_like(grid[0, 0])
    )


def _bilinear_sample(grid: Tensor, x: float, y: float) -> Tensor:
    """Return the sample at x, y in 0..1 of a map [H, W, D] whose cells have their centres at (i +
    0.5) / W."""
    column, row = x * grid.shape[1] - 0.5, y * grid.shape[0] - 0.5
    left_column, top_row = math.floor(column), math.floor(row)
    total = torch.zeros_like(grid[0, 0])
    for r, c in itertools.product(
        (top_row, top_row + 1), (left_column, left_column + 1)
    ):
        total = total + (1 - abs(row - r)) * (1 - abs(column - c)) * _pixel_or_zero(
            grid, r, c
        )
    return total


def test_sampling_equals_loops_over_queries_heads_levels_and_points() -> None:
    batch, queries, heads, points, depth = 2, 5, 2, 3, 4
    features = randn(batch, TOKENS, heads * depth).double()
    locations = (
        rand(batch, queries, heads, len(SHAPES), points, 2) * 1.4 - 0.2
    ).double()
    weights = rand(batch, queries, heads, len(SHAPES), points, seed=1).double()
    expected = torch.zeros(batch, queries, heads, depth, dtype=torch.float64)
    starts = [0, *itertools.accumulate(h * w for h, w in SHAPES)]
    for b, q, h, level, p in itertools.product(
        *(range(n) for n in (batch, queries, heads, len(SHAPES), points))
    ):
        head_map = features[b, starts[level] : starts[level + 1]].view(
            *SHAPES[level], heads, depth
        )[:, :, h]
        x, y = locations[b, q, h, level, p].tolist()
        expected[b, q, h] += weights[b, q, h, level, p] * _bilinear_sample(
            head_map, x, y
        )
    torch.testing.assert_close(
        sample_maps(features, SHAPES, locations, weights),
        expected.flatten(2),
        atol=1e-12,
        rtol=0,
    )


def test_offsets_are_cells_around_points_and_half_sides_around_boxes() -> None:
    offsets = torch.zeros(1, 1, 1, len(SHAPES), 2, 2)
    offsets[..., 0], offsets[..., 1] = 1.0, -2.0
    points = torch.full((1, 1, len(SHAPES), 2), 0.5)
    boxes = torch.cat([points, torch.tensor([0.4, 0.2]).expand_as(points)], -1)
    around_points = sampling_locations(points, offsets, SHAPES)
    around_boxes = sampling_locations(boxes, offsets, SHAPES)
    for level, (height, width) in enumerate(SHAPES):
        torch.testing.assert_close(
            around_points[0, 0, 0, level, 0],
            torch.tensor([0.5 + 1 / width, 0.5 - 2 / height]),
        )
        torch.testing.assert_close(
            around_boxes[0, 0, 0, level, 0],
            torch.tensor([0.5 + 0.4 / 4, 0.5 - 2 * 0.2 / 4]),
        )


@pytest.mark.parametrize("coordinates", [2, 4])
def test_gradients_are_right_in_double_precision(coordinates: int) -> None:
    module = _new_attention(width=8, heads=2, points=2).double()
    queries = randn(1, 3, 8).double().requires_grad_()
    tokens = randn(1, TOKENS, 8, seed=1).double().requires_grad_()
    references = (
        (rand(1, 3, len(SHAPES), coordinates, seed=2) * 0.6 + 0.2)
        .double()
        .requires_grad_()
    )
    padding = torch.zeros(1, TOKENS, dtype=torch.bool)
    assert torch.autograd.gradcheck(
        lambda q, r, t: module(q, r, t, SHAPES, padding), (queries, references, tokens)
    )


def test_padded_tokens_are_never_seen() -> None:
    module = _new_attention()
    queries, references = randn(2, 7, 16), rand(2, 7, len(SHAPES), 2)
    tokens, padding = randn(2, TOKENS, 16, seed=1), rand(2, TOKENS, seed=2) < 0.4
    other_tokens = torch.where(padding[..., None], torch.tensor(1e3), tokens)
    attended = module(queries, references, tokens, SHAPES, padding)
    assert torch.equal(
        attended, module(queries, references, other_tokens, SHAPES, padding)
    )
    assert not torch.equal(
        attended,
        module(queries, references, other_tokens, SHAPES, torch.zeros_like(padding)),
    )


def test_heads_start_out_looking_in_different_directions() -> None:
    module = DeformableAttention(16, 4, 2, 3)
    offsets = module.offsets(torch.zeros(16)).view(4, 2, 3, 2)
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for point in range(3):
        torch.testing.assert_close(
            offsets[:, 1, point], expected * (point + 1), atol=1e-6, rtol=0
        )


@pytest.mark.parametrize("coordinates", [2, 4])
def test_attention_equals_transformers_with_the_same_weights(coordinates: int) -> None:
    hf = pytest.importorskip(
        "transformers.models.deformable_detr.modeling_deformable_detr"
    )
    config = pytest.importorskip("transformers").DeformableDetrConfig(
        d_model=16, num_feature_levels=len(SHAPES), disable_custom_kernels=True
    )
    attention = _new_attention()
    reference = hf.DeformableDetrMultiscaleDeformableAttention(
        config, num_heads=4, n_points=3
    )
    names = {
        "sampling_offsets": "offsets",
        "attention_weights": "weights",
        "value_proj": "value",
        "output_proj": "output",
    }
    for reference_name, layer_name in names.items():
        getattr(reference, reference_name).load_state_dict(
            getattr(attention, layer_name).state_dict()
        )
    queries, references = randn(2, 7, 16), rand(2, 7, len(SHAPES), coordinates)
    tokens, padding = randn(2, TOKENS, 16, seed=1), rand(2, TOKENS, seed=2) < 0.3
    expected, _ = reference(
        queries,
        attention_mask=~padding,
        encoder_hidden_states=tokens,
        reference_points=references,
        spatial_shapes=torch.tensor(SHAPES),
        spatial_shapes_list=list(SHAPES),
        level_start_index=None,
    )
    torch.testing.assert_close(
        attention(queries, references, tokens, SHAPES, padding),
        expected,
        atol=1e-5,
        rtol=0,
    )


def test_self_attention_equals_torch_with_the_same_weights() -> None:
    torch.manual_seed(0)
    attention = SelfAttention(16, 4)
    reference = torch.nn.MultiheadAttention(16, 4, batch_first=True)
    with torch.no_grad():
        reference.in_proj_weight.copy_(
            torch.cat(
                [
                    layer.weight
                    for layer in (attention.query, attention.key, attention.value)
                ]
            )
        )
        reference.in_proj_bias.zero_()
        reference.out_proj.load_state_dict(attention.output.state_dict())
    content, positions = randn(2, 6, 16), randn(2, 6, 16, seed=1)
    mask = (rand(2, 6, 6, seed=2) < 0.5) | torch.eye(6, dtype=torch.bool)
    expected, _ = reference(
        content + positions,
        content + positions,
        content,
        attn_mask=~mask.repeat_interleave(4, 0),
    )
    torch.testing.assert_close(
        attention(content, positions, mask), expected, atol=1e-6, rtol=0
    )
