"""Sine encodings of locations and boxes, and the logit that box refinement works in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10_000.0
EPSILON = 1e-5


def sine_encoding(coordinates: Tensor, features: int) -> Tensor:
    """Return [..., features] for ``coordinates`` [...]: sine and cosine in turn,
    wavelengths from 2 pi to 2 pi * TEMPERATURE.
    """
    exponents = torch.arange(features, device=coordinates.device) // 2 * 2 / features
    wavelengths = TEMPERATURE ** exponents.to(coordinates.dtype)
    angles = coordinates[..., None] / wavelengths
    pairs = torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1)
    return pairs.flatten(-2)


def map_positions(padding: Tensor, width: int) -> Tensor:
    """Return encodings [B, H, W, width] of the cells of a map: row, then column, both
    0..2 pi over the part that is not ``padding`` [B, H, W].
    """
    inside = (~padding).float()
    rows, columns = inside.cumsum(1), inside.cumsum(2)
    rows = (rows - 0.5) / (rows[:, -1:] + 1e-6) * 2 * math.pi
    columns = (columns - 0.5) / (columns[:, :, -1:] + 1e-6) * 2 * math.pi
    half = width // 2
    return torch.cat([sine_encoding(rows, half), sine_encoding(columns, half)], -1)


def box_positions(boxes: Tensor, width: int) -> Tensor:
    """Return encodings [..., 2 * width] of boxes [..., 4] (cxcywh in 0..1), a quarter
    for each coordinate.
    """
    return sine_encoding(boxes * 2 * math.pi, width // 2).flatten(-2)


def inverse_sigmoid(shares: Tensor) -> Tensor:
    """Return the logit of ``shares``, clamped to EPSILON..1 - EPSILON so that it is
    finite.
    """
    return shares.clamp(EPSILON, 1 - EPSILON).logit()
