"""Train the demo's starting student: ``python -m coin_ray.demo.build.student`` (half an
hour on one core).

It stands for the public weights of a detector. It sees labelled scenes of the drawings
of the *source* share alone, one in seven of them cluttered and hazy, as any public data
set has some. It never sees a drawing of the target's share, which the cloud and CLIP
each know in part.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset
from torchvision.transforms import v2
from torchvision.transforms.functional import pil_to_tensor

from coin_ray.boxes import mirror_boxes
from coin_ray.demo.drawings import ASSETS, CLASSES, load_drawings
from coin_ray.demo.scenes import SIZE, Artwork, Style, compose
from coin_ray.models.students.yolox import YoloxStudent
from coin_ray.structures import Targets

WEIGHTS = ASSETS / "student.pt"
NAME = "yolox-nano"
CLUTTERED_SHARE = 1 / 7
FIRST_SEED = 50_000_000
"""The seeds of target scenes, and of the cloud's training scenes, are smaller."""
BATCH = 32
LEARNING_RATE = 2e-3
AVERAGE_DECAY = 0.998
WARM_UP_STEPS = 100
Batch = tuple[list[Tensor], list[Targets]]


class LabelledSourceScenes(IterableDataset[Batch]):
    """Endless batches of fresh scenes with their truth."""

    def __iter__(self) -> Iterator[Batch]:
        drawings = [drawing for drawing in load_drawings() if drawing.share == "source"]
        artwork = Artwork.from_drawings(drawings)
        change_colours = v2.ColorJitter(0.4, 0.4, 0.4, 0.05)
        seed = FIRST_SEED
        while True:
            images, targets = [], []
            for _ in range(BATCH):
                image, truth = _labelled_scene(artwork, seed)
                images.append(change_colours(image))
                targets.append(truth)
                seed += 1
            yield images, targets


def _labelled_scene(artwork: Artwork, seed: int) -> tuple[Tensor, Targets]:
    # multiples of the golden ratio spread the cluttered scenes evenly
    is_cluttered = (seed * 0.6180339887) % 1 < CLUTTERED_SHARE
    style: Style = "target" if is_cluttered else "source"
    scene = compose(artwork, style, seed, objects=(2, 5))
    image = pil_to_tensor(scene.image)
    boxes = torch.from_numpy(scene.boxes)
    if seed % 2:
        image, boxes = image.flip(2), mirror_boxes(boxes, SIZE)
    labels = torch.from_numpy(scene.labels)
    return image, Targets.from_labels(boxes, labels, len(CLASSES))


def _write_weights(average: AveragedModel) -> None:
    """Write the moving average in half precision, which halves the file."""
    weights = average.module.state_dict()
    halves = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in weights.items()
        if name.startswith("network.")
    }
    torch.save(halves, WEIGHTS)


def main() -> None:
    """Train the starting student and write its weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="of processor time")
    minutes = parser.parse_args().minutes
    torch.set_num_threads(1)
    torch.manual_seed(0)
    student = YoloxStudent(NAME, len(CLASSES), SIZE).train()
    student.to(memory_format=torch.channels_last)  # faster on processors
    average = AveragedModel(
        student, multi_avg_fn=get_ema_multi_avg_fn(AVERAGE_DECAY), use_buffers=True
    )
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.02)
    # one process composes the scenes, so that the order of their seeds is fixed
    loader = DataLoader(LabelledSourceScenes(), batch_size=None, num_workers=1)
    start, step = time.process_time(), 0
    for images, targets in loader:
        progress = (time.process_time() - start) / 60 / minutes
        if progress >= 1:
            break
        warm_up = min(1, (step + 1) / WARM_UP_STEPS)
        decay = 0.5 + 0.5 * math.cos(math.pi * progress)
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * warm_up * decay + 1e-5
        # half precision halves the time of a step where the processor has it
        with torch.autocast("cpu", torch.bfloat16):
            losses = student.losses(images, targets)
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(student.parameters(), 10.0)
        optimizer.step()
        step += 1
        average.update_parameters(student)
        if step % 100 == 0:
            parts = {name: round(float(loss), 2) for name, loss in losses.items()}
            print(f"step {step}, {progress:.0%}, {parts}", flush=True)
            _write_weights(average)
    _write_weights(average)
    print(f"{WEIGHTS}: {WEIGHTS.stat().st_size / 1e6:.1f} MB after {step} steps")


if __name__ == "__main__":
    main()
