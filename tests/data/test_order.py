from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coin_ray.data.order import BatchOrder

SIZES = (st.integers(1, 12), st.integers(1, 5), st.integers(0, 3))


def _rows_of_step(step: int, count: int, batch: int, seed: int) -> list[int]:
    return BatchOrder(count, batch, seed).rows_of_step(step)


@given(*SIZES, st.one_of(st.none(), st.lists(st.booleans(), min_size=12, max_size=12)))
def test_every_epoch_holds_each_image_once(
    count: int, batch: int, seed: int, wide: list[bool] | None
) -> None:
    epochs = 4
    order = BatchOrder(
        count, batch, seed, None if wide is None else np.array(wide[:count])
    )
    drawn_rows = [
        row
        for step in range(-(-epochs * count // batch))
        for row in order.rows_of_step(step)
    ]
    for epoch in range(epochs):
        assert sorted(drawn_rows[epoch * count : (epoch + 1) * count]) == list(
            range(count)
        )


def test_the_order_is_that_of_numpy_by_seed_and_epoch() -> None:
    """The order that runs of earlier versions have seen: golden losses and resumed runs
    depend on it."""
    expected = [
        int(np.random.default_rng([7, 1, p // 5]).permutation(5)[p % 5])
        for p in range(24)
    ]
    assert [
        row for step in range(6) for row in _rows_of_step(step, 5, 4, 7)
    ] == expected


@pytest.mark.parametrize("wide", [None, np.arange(40) % 3 == 0])
def test_steps_may_be_asked_for_in_any_order(wide: np.ndarray | None) -> None:
    forth = [BatchOrder(40, 3, 1, wide).rows_of_step(step) for step in range(60)]
    order = BatchOrder(40, 3, 1, wide)
    assert [order.rows_of_step(step) for step in reversed(range(60))] == forth[::-1]


def test_an_epoch_is_drawn_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A permutation of 10^6 images takes 36 ms; one for each image of a batch would be
    slower than training."""
    drawn = []
    original = np.random.default_rng
    monkeypatch.setattr(
        np.random,
        "default_rng",
        lambda seed: (drawn.append(tuple(seed)), original(seed))[1],
    )
    order = BatchOrder(10, 4, 0)
    for step in range(10):
        order.rows_of_step(step)
    assert drawn == [(0, 1, epoch) for epoch in range(4)]


def test_epochs_and_seeds_are_shuffled_differently() -> None:
    orders = [tuple(_rows_of_step(0, 20, 20, seed)) for seed in range(3)] + [
        tuple(_rows_of_step(1, 20, 20, 0))
    ]
    assert len(set(orders)) == 4


def test_batch_size_does_not_change_the_order() -> None:
    assert _rows_of_step(0, 9, 6, 5) == _rows_of_step(0, 9, 3, 5) + _rows_of_step(
        1, 9, 3, 5
    )


@given(st.integers(1, 60), st.integers(1, 7), st.integers(0, 3), st.integers(0, 1000))
def test_grouped_steps_see_one_kind(
    count: int, batch: int, seed: int, draw: int
) -> None:
    """Per epoch at most three steps are mixed: where it begins, where it ends, and
    where one kind runs out."""
    wide = np.random.default_rng(draw).random(count) < 0.5
    order = BatchOrder(count, batch, seed, wide)
    epochs = 5
    steps = epochs * count // batch
    mixed = sum(len(set(wide[order.rows_of_step(step)])) > 1 for step in range(steps))
    assert mixed <= 2 * epochs + 1


def test_grouped_steps_are_shuffled() -> None:
    wide = np.arange(400) < 200
    kinds = [
        bool(wide[BatchOrder(400, 4, 0, wide).rows_of_step(step)[0]])
        for step in range(100)
    ]
    assert sum(a != b for a, b in itertools.pairwise(kinds)) > 20
