"""Build training examples and their batches. The images of a step, and every random
draw, are a function of (seed, step) alone.

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
from coin_ray.data.pixels import IntensityRange
from coin_ray.storage import open_table, read_bytes
from coin_ray.structures import Detections

READ_THREADS = 4
"""Threads that read and decode the images of a batch; Pillow releases Python's lock."""


@dataclass(frozen=True, slots=True)
class Example:
    """One image and its detections in original pixels, by their source ("labels",
    "cloud", "clip").
    """

    image_id: str
    uri: str
    detections: Mapping[str, Detections]
    wide: bool = True
    """At least as wide as high."""
    reviewed: bool = False
    """The detections are from a person, not from the teachers."""
    intensity_range: IntensityRange | None = None
    """Of a run's deep grey images."""


LabelLookup = Callable[[str], Mapping[str, Detections]]
"""Returns the detections of an image, by its id."""


class TableExamples(Sequence[Example]):
    """Examples built from tables at each access: 8 bytes per image stay in memory
    beside what the tables need.

    ``uri``: an images table; ``rows`` [N]: its rows to use; ``lookup_labels`` is called
    at each access; ``reviewed``: ids of images that a person has labelled. Pickles by
    reference if those two do: other processes open the same tables.
    ``intensity_range``: of the run's deep grey images.
    """

    def __init__(
        self,
        uri: str,
        rows: NDArray[np.int64],
        lookup_labels: LabelLookup,
        reviewed: Container[str] = (),
        intensity_range: IntensityRange | None = None,
    ) -> None:
        self.uri, self.rows = uri, rows
        self.intensity_range = intensity_range
        self.lookup_labels, self.reviewed = lookup_labels, reviewed
        self.images = open_table(uri, ("image_id", "uri", "width", "height"))

    def __reduce__(self) -> tuple[Any, ...]:
        tables = (self.uri, self.rows, self.lookup_labels, self.reviewed)
        return TableExamples, (*tables, self.intensity_range)

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
        detections = self.lookup_labels(image_id)
        reviewed = image_id in self.reviewed
        wide = width >= height
        return Example(image_id, uri, detections, wide, reviewed, self.intensity_range)

    @property
    def wide(self) -> NDArray[np.bool_]:
        """[N] at least as wide as high."""
        flags: NDArray[np.bool_] = pc.greater_equal(
            self.images["width"], self.images["height"]
        ).to_numpy()
        return flags[self.rows]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """This worker's part of a step. ``detections[source]``: one Detections per image,
    in the frame of the augmented images.

    ``weak`` and ``strong``: the augmented images, uint8 [3, H, W]. ``generators``: one
    per image, for every draw of the training step. ``reviewed``: whether a person has
    labelled each image.
    """

    weak: list[Tensor]
    strong: list[Tensor]
    detections: dict[str, list[Detections]]
    generators: list[torch.Generator]
    reviewed: list[bool]


class ImageCache:
    """Decoded images of the set, kept while they fit into ``limit`` bytes. The first
    images stay: an epoch reads each image once. ``intensity_range``: of deep grey
    images.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self.free_bytes, self.images = limit, dict[str, Tensor]()
        self.intensity_range: IntensityRange | None = None

    def __getitem__(self, uri: str) -> Tensor:
        """Return the image, uint8 [3, H, W], upright."""
        image = self.images.get(uri)
        if image is None:
            image = pil_to_tensor(decode_rgb(read_bytes(uri), self.intensity_range))
            if image.numel() <= self.free_bytes:
                self.free_bytes -= image.numel()
                self.images[uri] = image
        return image


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
    """Yield this worker's batches of steps ``first`` .. ``config.steps - 1``; the next
    one is loaded while the last one trains.
    """
    cache = ImageCache()
    if examples:
        cache.intensity_range = _intensity_range(examples)
    wide = wide_images(examples) if config.group_aspects else None
    order = BatchOrder(len(examples), config.batch, seed, wide)

    def load(step: int) -> Batch:
        rows = order.rows_of_step(step)
        positions = range(rank, config.batch, workers)
        step_examples = [examples[rows[position]] for position in positions]
        uris = [example.uri for example in step_examples]
        images = list(readers.map(cache.__getitem__, uris))
        seeds = [[seed, 2, step, position] for position in positions]
        return _build_batch(step_examples, images, seeds, config, detector)

    with ThreadPoolExecutor(READ_THREADS) as readers, ThreadPoolExecutor(1) as pool:
        pending = pool.submit(load, first)
        for step in range(first, config.steps):
            batch = pending.result()
            if step + 1 < config.steps:
                pending = pool.submit(load, step + 1)
            yield batch


def _intensity_range(examples: Sequence[Example]) -> IntensityRange | None:
    """Return the range of all examples: a run has one."""
    if isinstance(examples, TableExamples):
        return examples.intensity_range
    return examples[0].intensity_range


def wide_images(examples: Sequence[Example]) -> NDArray[np.bool_]:
    """Return [N] whether each image is at least as wide as it is high."""
    if isinstance(examples, TableExamples):
        return examples.wide
    return np.array([example.wide for example in examples], bool)


def _build_batch(
    examples: Sequence[Example],
    images: Sequence[Tensor],
    seeds: Sequence[list[int]],
    config: TrainingConfig,
    detector: Detector,
) -> Batch:
    weak_images, strong_images, generators = [], [], []
    detections_by_source: dict[str, list[Detections]] = {
        source: [] for source in examples[0].detections
    }
    for example, original, seed in zip(examples, images, seeds, strict=True):
        state = np.random.SeedSequence(seed).generate_state(1, np.uint64)
        image_seed = int(state[0]) >> 1
        draw = random.Random(image_seed)
        resized = resize_to_fit(original, detector.short_side, detector.long_side)
        mirrored = draw.random() < 0.5
        weak = mirror_image(resized) if mirrored else resized
        weak_images.append(weak)
        strong_images.append(augment_strongly(weak, draw, config.augmentation))
        generators.append(torch.Generator().manual_seed(image_seed))
        original_size = original.shape[2], original.shape[1]
        input_size = resized.shape[2], resized.shape[1]
        for source, detections in example.detections.items():
            moved = transform_detections(
                detections, original_size, input_size, mirrored
            )
            detections_by_source[source].append(moved)
    reviewed = [example.reviewed for example in examples]
    return Batch(weak_images, strong_images, detections_by_source, generators, reviewed)
