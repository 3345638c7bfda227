"""Small models, images, targets and feature maps that tests of Co-DETR share."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from coin_ray.config.co_detr import CoDetr, tiny
from coin_ray.models.base import Images
from coin_ray.models.co_detr.backbone import TinyBackbone
from coin_ray.models.co_detr.collaborative import CollaborativeDetr
from coin_ray.models.co_detr.model import DeformableDetr
from coin_ray.models.co_detr.pyramid import Maps
from coin_ray.models.co_detr.targets import DetrTargets
from coin_ray.structures import Detections

M = TypeVar("M", bound=torch.nn.Module)
SHAPES = ((6, 8), (3, 4), (2, 2))
CLASSES = 3
DETECTION_FIELDS = ("boxes", "scores", "labels", "probs")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise_batch(
    sizes: tuple[tuple[int, int], ...] = ((64, 96), (50, 70)),
    padded: tuple[int, int] = (64, 96),
    seed: int = 0,
) -> Images:
    """Return noise inside each image, zeros in the padding."""
    pixels = torch.zeros(len(sizes), 3, *padded)
    generator = seeded(seed)
    for image, (height, width) in zip(pixels, sizes, strict=True):
        noise = torch.randn(3, height, width, generator=generator)
        image[:, :height, :width] = noise
    return Images(pixels, sizes)


def make_targets(*rows: tuple[float, float, float, float, int]) -> DetrTargets:
    """Make the targets of one image of rows (x1, y1, x2, y2, label)."""
    boxes = torch.tensor([row[:4] for row in rows]).reshape(-1, 4)
    return DetrTargets(boxes, torch.tensor([row[4] for row in rows], dtype=torch.int64))


def make_crowd() -> DetrTargets:
    """Make eighty objects of 8 x 6 pixels in rows of ten."""
    rows = []
    for number in range(80):
        x, y = number % 10 * 9, number // 10 * 7
        rows.append((float(x), float(y), x + 8.0, y + 6.0, number % 3))
    return make_targets(*rows)


TWO_IMAGES = [
    make_targets((4, 6, 40, 44, 0), (50, 10, 90, 60, 2)),
    make_targets((10, 10, 60, 40, 1)),
]


def new_detr(config: CoDetr | None = None, seed: int = 0) -> DeformableDetr:
    torch.manual_seed(seed)
    return fill_zero_weights(
        DeformableDetr(TinyBackbone((16, 16, 32)), CLASSES, config or tiny())
    )


def new_collaborative(config: CoDetr | None = None, seed: int = 0) -> CollaborativeDetr:
    torch.manual_seed(seed)
    return fill_zero_weights(
        CollaborativeDetr(TinyBackbone((16, 16, 32)), CLASSES, config or tiny())
    )


def fill_zero_weights(model: M) -> M:
    """Draw the weights that start at zero, so that nothing is switched off."""
    generator = seeded()
    with torch.no_grad():
        for weight in model.parameters():
            if not bool(weight.any()):
                weight.normal_(std=0.1, generator=generator)
    return model


def objective_losses(
    model: CollaborativeDetr, targets: list[DetrTargets]
) -> dict[str, float]:
    objective = model.objective(noise_batch(), targets, seeded())
    return {name: float(loss.detach()) for name, loss in objective.losses.items()}


def have_same_fields(first: Detections, second: Detections) -> bool:
    """Compare all fields of two images' detections bit for bit."""
    return all(
        torch.equal(getattr(first, field), getattr(second, field))
        for field in DETECTION_FIELDS
    )


def rand(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed))


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def noise_maps(
    maps: int = 3,
    sizes: tuple[tuple[int, int], ...] = ((64, 96), (50, 70)),
    width: int = 64,
) -> Maps:
    """Return a pyramid of noise under images of 64 x 96 pixels."""
    sides = [(8, 12), (4, 6), (2, 3), (1, 2), (1, 1)][:maps]
    return Maps(
        [randn(len(sizes), width, *side, seed=i) for i, side in enumerate(sides)],
        [8 * 2**i for i in range(maps)],
        sizes,
    )
