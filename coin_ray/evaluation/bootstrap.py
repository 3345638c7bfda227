"""Estimate the uncertainty of a figure by the bootstrap over images.

A draw takes as many test images as there are, with replacement; whole images, because
boxes of one image are alike. All methods are measured on the same draws, so a
difference between two methods is paired.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from coin_ray.evaluation.voc import Floats, Integers, Mask, MatchedDetections

DRAWS = 1000
INTERVAL = (2.5, 97.5)
"""Percentiles of a 95 % interval."""
MAX_CELLS = 2_000_000
"""Largest number of entries of one intermediate array."""


def draw_bootstrap_samples(images: int, seed: int, draws: int = DRAWS) -> Integers:
    """Draw how often each image is in each draw [draws, images]; the same for the same
    seed.
    """
    generator = np.random.default_rng(seed)
    probabilities = np.full(images, 1 / images)
    return generator.multinomial(images, probabilities, draws).astype(np.int64)


def bootstrap_average_precision(
    classes: Sequence[MatchedDetections], draws: Integers
) -> Floats:
    """Return the VOC AP [B, K] of each class on each of the draws [B, I]; NaN where a
    draw has no truth of the class.
    """
    columns = [_average_precision(matched, draws) for matched in classes]
    return np.stack(columns, axis=1)


def mean_ap(class_ap: Floats) -> Floats:
    """Average [B, K] over the classes that are not NaN: [B]; NaN if all are."""
    has_truth = ~np.isnan(class_ap)
    count = has_truth.sum(1)
    total: Floats = np.where(has_truth, class_ap, 0.0).sum(1)
    nan = np.full(len(class_ap), np.nan)
    mean: Floats = np.divide(total, count, out=nan, where=count > 0)
    return mean


def percentile_interval(figures: Floats) -> tuple[float, float] | None:
    """Return the 95 % percentile interval of figures [B]; None if all are NaN."""
    defined = figures[~np.isnan(figures)]
    if not len(defined):
        return None
    low, high = np.percentile(defined, INTERVAL)
    return float(low), float(high)


def _average_precision(matched: MatchedDetections, draws: Integers) -> Floats:
    """Return the AP [B] of one class. An image drawn w times counts each of its boxes w
    times, which is what w copies of the image would give.
    """
    required = draws @ matched.required
    # detections after the last correct one do not change the area
    length = (
        int(np.flatnonzero(matched.correct)[-1]) + 1 if matched.correct.any() else 0
    )
    image, correct = matched.image[:length], matched.correct[:length]
    chunk = max(1, MAX_CELLS // max(length, 1))
    areas = [
        _area(draws[start : start + chunk, image], correct)
        for start in range(0, len(draws), chunk)
    ]
    nan = np.full(len(draws), np.nan)
    precision: Floats = np.divide(
        np.concatenate(areas), required, out=nan, where=required > 0
    )
    return precision


def _area(weight: Integers, correct: Mask) -> Floats:
    """Sum correct detections times their enveloped precision: [B]; weight [B, D]."""
    hits = weight[:, correct]
    true_positives = hits.cumsum(1)
    detections = weight.cumsum(1)[:, correct]
    precision = np.divide(
        true_positives,
        detections,
        out=np.zeros(true_positives.shape),
        where=detections > 0,
    )
    envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    area: Floats = (hits * envelope).sum(1)
    return area
