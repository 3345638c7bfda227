"""Train the demo's cloud: ``python -m coin_ray.demo.build.cloud`` (about ten minutes on
one core).

It sees source drawings and its seeded half of the target drawings, in plain scenes; one
scene in seven is a cluttered, hazy one, as any public data set has some. It never sees
a scene of the target split.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset
from torchvision.ops import generalized_box_iou_loss
from torchvision.transforms.functional import pil_to_tensor

from coin_ray.demo.detector import STRIDE, WEIGHTS, DemoCloud, grid_centres
from coin_ray.demo.drawings import load_drawings
from coin_ray.demo.scenes import SIZE, Artwork, Scene, Style, compose

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
CLUTTERED_SHARE = 1 / 7
FIRST_SEED = 10_000_000
"""The seeds of target scenes are far smaller."""


def training_targets(scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """Return Gaussian objectness [h, w], class per cell [h, w] (-1 = none) and box per
    cell [h, w, 4]; small objects drawn last.
    """
    cells = SIZE // STRIDE
    centres = grid_centres(cells, cells)
    heat = torch.zeros(cells, cells)
    label = torch.full((cells, cells), -1)
    box = torch.zeros(cells, cells, 4)
    boxes = torch.from_numpy(scene.boxes)
    sizes = boxes[:, 2:] - boxes[:, :2]
    for i in sizes.prod(1).argsort(descending=True).tolist():
        middle = (boxes[i, :2] + boxes[i, 2:]) / 2
        offsets = (centres - middle) / (0.22 * sizes[i])
        bump = (-(offsets**2).sum(-1)).exp()
        inside = bump > 0.45
        if not inside.any():
            inside = bump == bump.max()
        heat = torch.maximum(heat, bump)
        heat[inside] = 1
        label[inside] = int(scene.labels[i])
        box[inside] = boxes[i]
    return heat, label, box


class SceneBatches(IterableDataset[Batch]):
    """Endless batches of fresh scenes with their training targets."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        drawings = [drawing for drawing in load_drawings() if drawing.known_to_cloud]
        artwork = Artwork.from_drawings(drawings)
        seed = FIRST_SEED
        while True:
            rows = []
            for _ in range(self.batch):
                rows.append(_training_row(artwork, seed))
                seed += 1
            images, heat, label, box = zip(*rows, strict=True)
            yield (
                torch.stack(images),
                torch.stack(heat),
                torch.stack(label),
                torch.stack(box),
            )


def _training_row(artwork: Artwork, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # multiples of the golden ratio spread the cluttered scenes evenly
    is_cluttered = (seed * 0.6180339887) % 1 < CLUTTERED_SHARE
    style: Style = "target" if is_cluttered else "source"
    scene = compose(artwork, style, seed, objects=(2, 5))
    heat, label, box = training_targets(scene)
    return pil_to_tensor(scene.image).float() / 255, heat, label, box


def demo_cloud_loss(model: DemoCloud, batch: Batch) -> Tensor:
    """Sum focal objectness (CornerNet's variant), class cross-entropy and generalised
    IoU on the positive cells.
    """
    images, heat, label, box = batch
    objectness, class_logits, sides = model(images)
    probability = objectness.sigmoid().clamp(1e-4, 1 - 1e-4)
    positive = label >= 0
    positive_terms = (1 - probability) ** 2 * probability.log()
    negative_terms = (1 - heat) ** 4 * probability**2 * (1 - probability).log()
    focal = -positive_terms[positive].sum() - negative_terms[~positive].sum()
    centres = grid_centres(*label.shape[1:]).expand(*label.shape, 2)[positive]
    upper_left = centres - sides[positive][:, :2]
    lower_right = centres + sides[positive][:, 2:]
    predicted = torch.cat([upper_left, lower_right], 1)
    box_loss: Tensor = generalized_box_iou_loss(
        predicted, box[positive], reduction="mean"
    )
    class_loss = F.cross_entropy(class_logits[positive], label[positive])
    total: Tensor = focal / positive.sum() + class_loss + box_loss
    return total


def main() -> None:
    """Train the demo's cloud and write its weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DemoCloud().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    loader = DataLoader(
        SceneBatches(16), batch_size=None, num_workers=1, prefetch_factor=4
    )
    start, step = time.monotonic(), 0
    for batch in loader:
        progress = (time.monotonic() - start) / 60 / minutes
        if progress >= 1:
            break
        warm_up = min(1, (step + 1) / 50)
        decay = 0.5 + 0.5 * math.cos(math.pi * progress)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * warm_up * decay + 1e-5
        loss = demo_cloud_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {progress:.0%}, loss {loss.item():.3f}", flush=True)
    torch.save(model.half().state_dict(), WEIGHTS)
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size / 1e6:.1f} MB after {step} steps")


if __name__ == "__main__":
    main()
