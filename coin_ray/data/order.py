"""The images that each training step sees: consecutive parts of endless reshuffled
epochs, as a function of (seed, step) alone.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class BatchOrder:
    """The order of ``count`` images in steps of ``batch``. Each epoch is drawn once and
    kept while it and the next one are read.

    ``wide`` [count] bool groups images by orientation: all steps of an epoch but its
    first, its last and one between see images of one orientation.
    """

    def __init__(
        self, count: int, batch: int, seed: int, wide: NDArray[np.bool_] | None = None
    ) -> None:
        self.count, self.batch, self.seed, self.wide = count, batch, seed, wide
        self.epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def rows_of_step(self, step: int) -> list[int]:
        """Return the rows of the images of a step, all workers together."""
        rows = []
        for position in range(step * self.batch, (step + 1) * self.batch):
            epoch, offset = divmod(position, self.count)
            rows.append(int(self.epoch(epoch)[offset]))
        return rows

    def _draw_epoch(self, epoch: int) -> NDArray[np.int64]:
        rows = np.random.default_rng([self.seed, 1, epoch]).permutation(self.count)
        return rows if self.wide is None else self._group_steps(rows, epoch)

    def _group_steps(self, rows: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Cut whole steps out of the rows sorted by orientation and shuffle the steps;
        the rows of an epoch before and after its whole steps stay as drawn.
        """
        assert self.wide is not None
        start = min(-epoch * self.count % self.batch, self.count)
        stop = start + (self.count - start) // self.batch * self.batch
        whole_steps = rows[start:stop]
        by_orientation = np.argsort(~self.wide[whole_steps], kind="stable")
        steps = whole_steps[by_orientation].reshape(-1, self.batch)
        shuffled = np.random.default_rng([self.seed, 3, epoch]).permutation(len(steps))
        return np.concatenate([rows[:start], steps[shuffled].ravel(), rows[stop:]])
