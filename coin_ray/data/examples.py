"""Training examples and their batches. Which images a step sees, and every random draw, is a function of (seed, step) alone.

So a resumed run needs no sampler state, and n workers see together what one worker would see.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from coin_ray.config import Detector, Optimize
from coin_ray.data.canonical import decode_rgb
from coin_ray.data.views import fit, into_view, mirror_image, strong
from coin_ray.storage import read_bytes
from coin_ray.structures import Detections


@dataclass(frozen=True, slots=True)
class Example:
    """One image and what is known of it, by name ("labels", "cloud", "clip"), in original pixels."""

    image_id: str
    uri: str
    knowledge: Mapping[str, Detections]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """This worker's part of a step. ``knowledge[name]``: one Detections per image, in the frame of the views.

    ``weak`` and ``strong``: uint8 [3, H, W]. ``generators``: one per image, for every draw the training step makes.
    """

    weak: list[Tensor]
    strong: list[Tensor]
    knowledge: dict[str, list[Detections]]
    generators: list[torch.Generator]


@dataclass(frozen=True)
class ImageCache:
    """Decoded images of the set, kept while they fit into ``limit`` bytes."""

    limit: int = 1 << 30
    images: dict[str, Tensor] = field(default_factory=dict)

    def __getitem__(self, uri: str) -> Tensor:
        """uint8 [3, H, W], upright."""
        found = self.images.get(uri)
        if found is None:
            found = pil_to_tensor(decode_rgb(read_bytes(uri)))
            if sum(i.numel() for i in self.images.values()) + found.numel() <= self.limit:
                self.images[uri] = found
        return found


def rows_of_step(step: int, count: int, batch: int, seed: int) -> list[int]:
    """The images of a step: consecutive parts of endless reshuffled epochs of ``count`` images."""
    rows = []
    for position in range(step * batch, (step + 1) * batch):
        epoch, offset = divmod(position, count)
        rows.append(int(_epoch_order(epoch, count, seed)[offset]))
    return rows


def _epoch_order(epoch: int, count: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.random.default_rng([seed, 1, epoch]).permutation(count)


def batches(
    examples: Sequence[Example], config: Optimize, detector: Detector, *, seed: int, first: int, rank: int, workers: int
) -> Iterator[Batch]:
    """This worker's batches of steps ``first`` .. ``config.steps - 1``; the next one is decoded while the last one trains."""
    cache = ImageCache()

    def load(step: int) -> Batch:
        rows = rows_of_step(step, len(examples), config.batch, seed)
        positions = range(rank, config.batch, workers)
        return _batch([examples[rows[p]] for p in positions], [[seed, 2, step, p] for p in positions], cache, config, detector)

    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(load, first)
        for step in range(first, config.steps):
            ready = waiting.result()
            if step + 1 < config.steps:
                waiting = pool.submit(load, step + 1)
            yield ready


def _batch(examples: Sequence[Example], seeds: Sequence[list[int]], cache: ImageCache, config: Optimize, detector: Detector) -> Batch:
    weak_views, strong_views, generators = [], [], []
    knowledge: dict[str, list[Detections]] = {name: [] for name in examples[0].knowledge}
    for example, seed in zip(examples, seeds, strict=True):
        number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]) >> 1
        draw = random.Random(number)
        original = cache[example.uri]
        view = fit(original, detector.short_side, detector.long_side)
        mirrored = draw.random() < 0.5
        weak = mirror_image(view) if mirrored else view
        weak_views.append(weak)
        strong_views.append(strong(weak, draw, config.augmentation))
        generators.append(torch.Generator().manual_seed(number))
        sizes = (original.shape[2], original.shape[1]), (view.shape[2], view.shape[1])
        for name, detections in example.knowledge.items():
            knowledge[name].append(into_view(detections, *sizes, mirrored))
    return Batch(weak_views, strong_views, knowledge, generators)
