"""Clocks, sleeping and random delays of a client; tests replace them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

BACKOFF_BASE = 0.5
BACKOFF_CAP = 20.0

Sleep = Callable[[float], Awaitable[None]]


@dataclass(slots=True)
class Timing:
    """``clock``: seconds of a steady clock; ``wall_clock``: seconds since 1970."""

    sleep: Sleep = asyncio.sleep
    clock: Callable[[], float] = time.monotonic
    uniform: Callable[[float, float], float] = random.uniform
    wall_clock: Callable[[], float] = time.time

    def backoff_seconds(self, attempt: int) -> float:
        """Return a random delay after the ``attempt``-th failure (full jitter)."""
        longest = min(BACKOFF_CAP, BACKOFF_BASE * 2 ** (attempt - 1))
        return self.uniform(0, longest)
