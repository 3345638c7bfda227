"""How far a figure could be chance: the bootstrap over images.

A draw takes as many test images as there are, with replacement; whole images, because
boxes of one image are alike. All methods are measured on the same draws, so a
difference between two methods is paired.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coin_ray.evaluation.voc import Floats, Integers, MatchedDetections

DRAWS = 1000
INTERVAL = (2.5, 97.5)
"""Percentiles of a 95 % interval."""
CELLS = 2_000_000
"""Most entries of one intermediate array."""


def draw_bootstrap_samples(images: int, seed: int, draws: int = DRAWS) -> Integers:
    """How often each image is in each draw [draws, images]; the same for the same seed."""
    return (
        np.random.default_rng(seed)
        .multinomial(images, np.full(images, 1 / images), draws)
        .astype(np.int64)
    )


def bootstrap_average_precision(
    classes: Sequence[MatchedDetections], draws: Integers
) -> Floats:
    """VOC AP [B, K] of each class on each of the draws [B, I]; NaN where a draw has no
    truth of the class.
    """
    return np.stack([_average_precision(judged, draws) for judged in classes], axis=1)


def mean_ap(values: Floats) -> Floats:
    """Mean [B] over the classes of [B, K] that are not NaN; NaN if all are."""
    known = ~np.isnan(values)
    count = known.sum(1)
    total: Floats = np.where(known, values, 0.0).sum(1)
    mean: Floats = np.divide(
        total, count, out=np.full(len(values), np.nan), where=count > 0
    )
    return mean


def percentile_interval(values: Floats) -> tuple[float, float] | None:
    """The 95 % percentile interval of values [B]; None where no draw knows the figure."""
    known = values[~np.isnan(values)]
    if not len(known):
        return None
    low, high = np.percentile(known, INTERVAL)
    return float(low), float(high)


def _average_precision(judged: MatchedDetections, draws: Integers) -> Floats:
    """[B]. An image drawn w times counts each of its boxes w times, which is what w
    copies of the image would give.
    """
    required = draws @ judged.required
    last = int(np.flatnonzero(judged.right)[-1]) + 1 if judged.right.any() else 0
    image, right = judged.image[:last], judged.right[:last]
    size = max(1, CELLS // max(last, 1))
    area = np.concatenate(
        [
            _area(draws[start : start + size, image], right)
            for start in range(0, len(draws), size)
        ]
    )
    precision: Floats = np.divide(
        area, required, out=np.full(len(draws), np.nan), where=required > 0
    )
    return precision


def _area(
    weight: Integers, right: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]
) -> Floats:
    """Right detections [B] times their enveloped precision; weight [B, D]."""
    hits = weight[:, right]
    found = hits.cumsum(1)
    shown = weight.cumsum(1)[:, right]
    precision = np.divide(found, shown, out=np.zeros(found.shape), where=shown > 0)
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    area: Floats = (hits * envelope).sum(1)
    return area
