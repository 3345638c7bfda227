"""Sine encodings of places and boxes, and the logit that box refinement works in."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TEMPERATURE = 10_000.0
EPSILON = 1e-5


def sine(values: Tensor, features: int) -> Tensor:
    """[..., features] of ``values`` [...]: sine and cosine in turn, wavelengths from 2
    pi to 2 pi * TEMPERATURE.
    """
    exponents = torch.arange(features, device=values.device) // 2 * 2 / features
    angles = values[..., None] / TEMPERATURE ** exponents.to(values.dtype)
    return torch.stack([angles[..., 0::2].sin(), angles[..., 1::2].cos()], -1).flatten(
        -2
    )


def map_positions(padding: Tensor, width: int) -> Tensor:
    """Encodings [B, H, W, width] of the cells of a map: row, then column, both 0..2 pi
    over the part that is not ``padding`` [B, H, W].
    """
    inside = (~padding).float()
    rows, columns = inside.cumsum(1), inside.cumsum(2)
    rows = (rows - 0.5) / (rows[:, -1:] + 1e-6) * 2 * math.pi
    columns = (columns - 0.5) / (columns[:, :, -1:] + 1e-6) * 2 * math.pi
    return torch.cat([sine(rows, width // 2), sine(columns, width // 2)], -1)


def box_positions(boxes: Tensor, width: int) -> Tensor:
    """Encodings [..., 2 * width] of boxes [..., 4] (cxcywh in 0..1), a quarter for each
    coordinate.
    """
    return sine(boxes * 2 * math.pi, width // 2).flatten(-2)


def logit(values: Tensor) -> Tensor:
    """Inverse of the sigmoid, finite: ``values`` are held in EPSILON..1 - EPSILON."""
    return values.clamp(EPSILON, 1 - EPSILON).logit()
