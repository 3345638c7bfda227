"""Boxes of many images one after another: those of image i are the rows from
``starts[i]`` up to ``starts[i + 1]``.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]


def starts_of(counts: Integers) -> Integers:
    """Return where the boxes of each image begin, and the end [N + 1], from the number
    of boxes of each image [N].
    """
    starts: Integers = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    return starts


def image_of_boxes(starts: Integers) -> Integers:
    """Return the image of each box."""
    return np.repeat(np.arange(len(starts) - 1), np.diff(starts))


def rows_of_images(starts: Integers, images: Integers) -> Integers:
    """Return the rows of the boxes of ``images``, one image after another."""
    counts = np.diff(starts)[images]
    new_starts = starts_of(counts)
    offsets = np.repeat(starts[images] - new_starts[:-1], counts)
    rows: Integers = np.arange(new_starts[-1]) + offsets
    return rows


def count_boxes(starts: Integers, mask: NDArray[np.bool_]) -> Integers:
    """Return how many boxes of each image ``mask`` selects."""
    sums = starts_of(mask.astype(np.int64))
    counts: Integers = sums[starts[1:]] - sums[starts[:-1]]
    return counts
