"""Which images a step sees: consecutive parts of endless reshuffled epochs, as a
function of (seed, step) alone.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


class BatchOrder:
    """The order of ``count`` images in steps of ``batch``. Each epoch is drawn once and
    kept while it and the next one are read.

    ``wide`` [count] bool groups by it: all steps of an epoch but its first, its last
    and one between see images of one kind.
    """

    def __init__(
        self, count: int, batch: int, seed: int, wide: NDArray[np.bool_] | None = None
    ) -> None:
        self.count, self.batch, self.seed, self.wide = count, batch, seed, wide
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def rows_of_step(self, step: int) -> list[int]:
        """The images of a step, all workers together."""
        places = (
            divmod(position, self.count)
            for position in range(step * self.batch, (step + 1) * self.batch)
        )
        return [int(self.epoch(epoch)[offset]) for epoch, offset in places]

    def _epoch(self, epoch: int) -> NDArray[np.int64]:
        rows = np.random.default_rng([self.seed, 1, epoch]).permutation(self.count)
        return rows if self.wide is None else self._grouped(rows, epoch)

    def _grouped(self, rows: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Whole steps are cut out of the images sorted by kind, and shuffled; what an
        epoch has before and behind them stays as drawn.
        """
        assert self.wide is not None
        before = min(-epoch * self.count % self.batch, self.count)
        behind = before + (self.count - before) // self.batch * self.batch
        whole = rows[before:behind]
        steps = whole[np.argsort(~self.wide[whole], kind="stable")].reshape(
            -1, self.batch
        )
        shuffled = np.random.default_rng([self.seed, 3, epoch]).permutation(len(steps))
        return np.concatenate([rows[:before], steps[shuffled].ravel(), rows[behind:]])
