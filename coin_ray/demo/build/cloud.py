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
from coin_ray.demo.scenes import SIZE, Artwork, Scene, compose

Batch = tuple[Tensor, Tensor, Tensor, Tensor]
CLUTTERED_SHARE = 1 / 7
FIRST_SEED = 10_000_000
"""Seeds of the target scenes are far below."""


def training_targets(scene: Scene) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian objectness [h, w], class per cell [h, w] (-1 = none) and box per cell
    [h, w, 4]; small objects drawn last.
    """
    cells = SIZE // STRIDE
    centres = grid_centres(cells, cells)
    heat, label, box = (
        torch.zeros(cells, cells),
        torch.full((cells, cells), -1),
        torch.zeros(cells, cells, 4),
    )
    boxes = torch.from_numpy(scene.boxes)
    sizes = boxes[:, 2:] - boxes[:, :2]
    for i in sizes.prod(1).argsort(descending=True).tolist():
        middle = (boxes[i, :2] + boxes[i, 2:]) / 2
        bump = (-(((centres - middle) / (0.22 * sizes[i])) ** 2).sum(-1)).exp()
        inside = bump > 0.45 if (bump > 0.45).any() else bump == bump.max()
        heat = torch.maximum(heat, bump)
        heat[inside] = 1
        label[inside] = int(scene.labels[i])
        box[inside] = boxes[i]
    return heat, label, box


class Scenes(IterableDataset[Batch]):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def __iter__(self) -> Iterator[Batch]:
        artwork = Artwork.from_drawings(
            [d for d in load_drawings() if d.known_to_cloud]
        )
        seed = FIRST_SEED
        while True:
            rows = []
            for _ in range(self.batch):
                style = (
                    "target"
                    if (seed * 0.6180339887) % 1 < CLUTTERED_SHARE
                    else "source"
                )
                scene = compose(artwork, style, seed, objects=(2, 5))  # type: ignore[arg-type]
                rows.append(
                    (pil_to_tensor(scene.image).float() / 255, *training_targets(scene))
                )
                seed += 1
            images, heat, label, box = zip(*rows, strict=True)
            yield (
                torch.stack(images),
                torch.stack(heat),
                torch.stack(label),
                torch.stack(box),
            )


def loss(model: DemoCloud, batch: Batch) -> Tensor:
    """Focal objectness (CornerNet's variant), class cross-entropy and generalised IoU
    on the positive cells.
    """
    images, heat, label, box = batch
    objectness, classes, sides = model(images)
    probability = objectness.sigmoid().clamp(1e-4, 1 - 1e-4)
    positive = label >= 0
    focal = -((1 - probability) ** 2 * probability.log())[positive].sum()
    focal = (
        focal
        - ((1 - heat) ** 4 * probability**2 * (1 - probability).log())[~positive].sum()
    )
    centres = grid_centres(*label.shape[1:]).expand(*label.shape, 2)[positive]
    predicted = torch.cat(
        [centres - sides[positive][:, :2], centres + sides[positive][:, 2:]], 1
    )
    boxes: Tensor = generalized_box_iou_loss(predicted, box[positive], reduction="mean")
    total: Tensor = (
        focal / positive.sum()
        + F.cross_entropy(classes[positive], label[positive])
        + boxes
    )
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    minutes = parser.parse_args().minutes
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = DemoCloud().train()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    start, step = time.monotonic(), 0
    for batch in DataLoader(
        Scenes(16), batch_size=None, num_workers=1, prefetch_factor=4
    ):
        done = (time.monotonic() - start) / 60 / minutes
        if done >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = (
                3e-3 * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done))
                + 1e-5
            )
        value = loss(model, batch)
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        optimizer.step()
        step += 1
        if step % 100 == 0:
            print(f"step {step}, {done:.0%}, loss {value.item():.3f}", flush=True)
    torch.save(model.half().state_dict(), WEIGHTS)
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size / 1e6:.1f} MB after {step} steps")


if __name__ == "__main__":
    main()
