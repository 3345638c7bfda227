from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from builders import SIZES, examples, tiny_config, tiny_fit

from coin_ray.data.examples import Batch, ImageCache, iterate_batches

FIT, DETECTOR = tiny_fit(steps=4, batch=4), tiny_config()


def _load_batches(
    folder: Path, *, first: int = 0, rank: int = 0, workers: int = 1, seed: int = 3
) -> list[Batch]:
    return list(
        iterate_batches(
            examples(folder),
            FIT,
            DETECTOR,
            seed=seed,
            first=first,
            rank=rank,
            workers=workers,
        )
    )


def _assert_same(a: Batch, b: Batch, positions: list[int]) -> None:
    """Batch ``a`` holds what batch ``b`` has at ``positions``."""
    for name in ("weak", "strong"):
        assert all(
            torch.equal(x, getattr(b, name)[p])
            for x, p in zip(getattr(a, name), positions, strict=True)
        )
    for name, detections in a.detections.items():
        assert all(
            torch.equal(x.boxes, b.detections[name][p].boxes)
            for x, p in zip(detections, positions, strict=True)
        )
    for generator, position in zip(a.generators, positions, strict=True):
        assert torch.equal(generator.get_state(), b.generators[position].get_state())


@pytest.mark.parametrize("workers", [2, 4])
def test_workers_see_together_what_one_sees(tmp_path: Path, workers: int) -> None:
    alone = _load_batches(tmp_path)
    for rank in range(workers):
        for part, whole in zip(
            _load_batches(tmp_path, rank=rank, workers=workers), alone, strict=True
        ):
            _assert_same(part, whole, list(range(rank, FIT.batch, workers)))


def test_a_resumed_run_sees_the_same(tmp_path: Path) -> None:
    for resumed, whole in zip(
        _load_batches(tmp_path, first=2), _load_batches(tmp_path)[2:], strict=True
    ):
        _assert_same(resumed, whole, list(range(FIT.batch)))


def test_steps_and_seeds_differ(tmp_path: Path) -> None:
    batches, other_batches = _load_batches(tmp_path), _load_batches(tmp_path, seed=4)
    states = [g.get_state() for b in [*batches, *other_batches] for g in b.generators]
    assert len({s.numpy().tobytes() for s in states}) == len(states)


def test_augmented_images_have_one_geometry_and_boxes_follow(tmp_path: Path) -> None:
    """The first cloud box begins at (4, 4) of the original: after a mirror it ends 4
    original pixels before the right edge."""
    mirrored = 0
    for batch in _load_batches(tmp_path):
        for weak, strong, cloud in zip(
            batch.weak, batch.strong, batch.detections["cloud"], strict=True
        ):
            assert weak.shape == strong.shape
            height, width = weak.shape[1:]
            assert min(height, width) <= DETECTOR.short_side
            assert max(height, width) <= DETECTOR.long_side
            originals = [s for s in SIZES if abs(s[0] / s[1] - width / height) < 0.02]
            x1, x2 = float(cloud.boxes[0, 0]), float(cloud.boxes[0, 2])
            factors = [width / s[0] for s in originals]
            unmirrored = any(abs(x1 - 4 * f) < 1e-3 for f in factors)
            assert unmirrored or any(abs(width - x2 - 4 * f) < 1e-3 for f in factors)
            mirrored += not unmirrored
    assert 0 < mirrored < 16


def test_without_augmentation_both_images_are_the_same(tmp_path: Path) -> None:
    fit = replace(FIT, augmentation=0.0)
    for batch in iterate_batches(
        examples(tmp_path), fit, DETECTOR, seed=0, first=0, rank=0, workers=1
    ):
        assert all(
            torch.equal(a, b) for a, b in zip(batch.weak, batch.strong, strict=True)
        )


def test_cache_keeps_what_fits(tmp_path: Path) -> None:
    uris = [e.uri for e in examples(tmp_path)]
    cache = ImageCache(limit=3 * SIZES[0][0] * SIZES[0][1])
    assert cache[uris[0]].shape == (3, SIZES[0][1], SIZES[0][0])
    assert cache[uris[1]].shape == (3, SIZES[1][1], SIZES[1][0])
    assert list(cache.images) == [uris[0]]
    assert cache[uris[0]] is cache[uris[0]]
