"""Training examples and their batches. Which images a step sees, and every random draw,
is a function of (seed, step) alone.

So a resumed run needs no sampler state, and n workers see together what one worker
would see.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from coin_ray.config import Detector, TrainingConfig
from coin_ray.data.augmentation import (
    augment_strongly,
    mirror_image,
    resize_to_fit,
    transform_detections,
)
from coin_ray.data.canonical import decode_rgb
from coin_ray.data.order import BatchOrder
from coin_ray.storage import open_table, read_bytes
from coin_ray.structures import Detections

READERS = 4
"""Threads that read and decode the images of a batch; Pillow decodes beside Python."""


@dataclass(frozen=True, slots=True)
class Example:
    """One image and what is known of it, by name ("labels", "cloud", "clip"), in
    original pixels.
    """

    image_id: str
    uri: str
    detections: Mapping[str, Detections]
    wide: bool = True
    """At least as wide as high."""
    reviewed: bool = False
    """What is known is a person's word, not the teachers'."""


LabelLookup = Callable[[str], Mapping[str, Detections]]
"""What is known of an image, by its id."""


class TableExamples(Sequence[Example]):
    """Examples built from tables when they are asked for: 8 bytes an image stay in
    memory beside what the tables need.

    ``uri``: an images table; ``rows`` [N]: those of its rows that take part; ``know``
    is called for each access; ``reviewed``: ids of images that a person has labelled.
    Goes to other processes by reference if those two do: they open the same tables.
    """

    def __init__(
        self,
        uri: str,
        rows: NDArray[np.int64],
        know: LabelLookup,
        reviewed: Container[str] = (),
    ) -> None:
        self.uri, self.rows, self.know, self.reviewed = uri, rows, know, reviewed
        self.images = open_table(uri, ("image_id", "uri", "width", "height"))

    def __reduce__(self) -> tuple[Any, ...]:
        return TableExamples, (self.uri, self.rows, self.know, self.reviewed)

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = int(self.rows[index])
        image_id, uri, width, height = (
            self.images[name][row].as_py()
            for name in ("image_id", "uri", "width", "height")
        )
        return Example(
            image_id,
            uri,
            self.know(image_id),
            width >= height,
            image_id in self.reviewed,
        )

    @property
    def wide(self) -> NDArray[np.bool_]:
        """[N] at least as wide as high."""
        flags: NDArray[np.bool_] = pc.greater_equal(
            self.images["width"], self.images["height"]
        ).to_numpy()
        return flags[self.rows]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """This worker's part of a step. ``detections_by_name[name]``: one Detections per image, in
    the frame of the views.

    ``weak`` and ``strong``: uint8 [3, H, W]. ``generators``: one per image, for every
    draw the training step makes. ``reviewed``: of which images a person's word is
    known.
    """

    weak: list[Tensor]
    strong: list[Tensor]
    detections: dict[str, list[Detections]]
    generators: list[torch.Generator]
    reviewed: list[bool]


class ImageCache:
    """Decoded images of the set, kept while they fit into ``limit`` bytes. What came
    first stays: an epoch asks for each image once.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self.left, self.images = limit, dict[str, Tensor]()

    def __getitem__(self, uri: str) -> Tensor:
        """uint8 [3, H, W], upright."""
        found = self.images.get(uri)
        if found is None:
            found = pil_to_tensor(decode_rgb(read_bytes(uri)))
            if found.numel() <= self.left:
                self.left -= found.numel()
                self.images[uri] = found
        return found


def iterate_batches(
    examples: Sequence[Example],
    config: TrainingConfig,
    detector: Detector,
    *,
    seed: int,
    first: int,
    rank: int,
    workers: int,
) -> Iterator[Batch]:
    """This worker's batches of steps ``first`` .. ``config.steps - 1``; the next one is
    loaded while the last one trains.
    """
    cache = ImageCache()
    order = BatchOrder(
        len(examples),
        config.batch,
        seed,
        wide_images(examples) if config.group_aspects else None,
    )

    def load(step: int) -> Batch:
        rows = order.rows_of_step(step)
        positions = range(rank, config.batch, workers)
        chosen = [examples[rows[p]] for p in positions]
        images = list(readers.map(cache.__getitem__, [e.uri for e in chosen]))
        return _batch(
            chosen, images, [[seed, 2, step, p] for p in positions], config, detector
        )

    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(load, first)
        for step in range(first, config.steps):
            ready = waiting.result()
            if step + 1 < config.steps:
                waiting = pool.submit(load, step + 1)
            yield ready


def wide_images(examples: Sequence[Example]) -> NDArray[np.bool_]:
    """[N] whether each image is at least as wide as it is high."""
    return (
        examples.wide
        if isinstance(examples, TableExamples)
        else np.array([e.wide for e in examples], bool)
    )


def _batch(
    examples: Sequence[Example],
    images: Sequence[Tensor],
    seeds: Sequence[list[int]],
    config: TrainingConfig,
    detector: Detector,
) -> Batch:
    weak_views, strong_views, generators = [], [], []
    detections_by_name: dict[str, list[Detections]] = {
        name: [] for name in examples[0].detections
    }
    for example, original, seed in zip(examples, images, seeds, strict=True):
        number = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0]) >> 1
        draw = random.Random(number)
        view = resize_to_fit(original, detector.short_side, detector.long_side)
        mirrored = draw.random() < 0.5
        weak = mirror_image(view) if mirrored else view
        weak_views.append(weak)
        strong_views.append(augment_strongly(weak, draw, config.augmentation))
        generators.append(torch.Generator().manual_seed(number))
        sizes = (original.shape[2], original.shape[1]), (view.shape[2], view.shape[1])
        for name, detections in example.detections.items():
            detections_by_name[name].append(
                transform_detections(detections, *sizes, mirrored)
            )
    return Batch(
        weak_views,
        strong_views,
        detections_by_name,
        generators,
        [e.reviewed for e in examples],
    )
