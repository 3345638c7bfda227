"""Emulation of a remote service: latency, a rate limit, and failures drawn from (seed,
image, number of attempts).
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from typing import Literal

Fault = Literal["500", "503", "truncated"]
FAULTS: tuple[Fault, ...] = ("500", "503", "truncated")
KEYS_MAX = 100_000
ROUNDING = 1e-9


@dataclass
class CallStatistics:
    """Calls since the start. ``billed``: a detection was made; ``duplicates``: answered
    before for the same image and key; ``busy``: refused because the queue was full.
    """

    received: int = 0
    answered: int = 0
    billed: int = 0
    throttled: int = 0
    faults: int = 0
    rejected: int = 0
    unauthorized: int = 0
    duplicates: int = 0
    busy: int = 0


@dataclass(frozen=True)
class FaultInjection:
    """``latency``: seconds before each answer; ``rate``: calls per second before 429;
    ``faults``: share of calls that fail.
    """

    latency: float = 0.0
    rate: float = math.inf
    faults: float = 0.0
    seed: int = 0

    def draw_fault(self, image_id: str, attempt: int) -> Fault | None:
        """Return how this attempt fails, or None; the same arguments, the same fault."""
        digest = hashlib.sha256(f"{self.seed}:{image_id}:{attempt}".encode()).digest()
        if int.from_bytes(digest[:8], "big") / 2**64 >= self.faults:
            return None
        return FAULTS[digest[8] % len(FAULTS)]


class RecentKeyCounts:
    """How often each of the last ``limit`` different keys occurred."""

    def __init__(self, limit: int = KEYS_MAX) -> None:
        self._limit = limit
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def increment(self, key: str) -> int:
        """Count ``key`` once more and return its count, which starts again at 1 after
        the key was dropped.
        """
        count = self._counts.pop(key, 0) + 1
        self._counts[key] = count
        if len(self._counts) > self._limit:
            oldest = next(iter(self._counts))
            del self._counts[oldest]
        return count


class TokenBucket:
    """A limit of ``rate`` calls per second, with a burst of a quarter second's worth."""

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate
        self._burst = max(1.0, rate / 4)
        self._next_arrival = 0.0

    def take(self) -> float:
        """Count a call and return 0, or return the seconds until one is allowed."""
        now = time.monotonic()
        arrival = max(self._next_arrival, now)
        wait = arrival - now - (self._burst - 1) * self._interval
        if wait <= ROUNDING:
            self._next_arrival = arrival + self._interval
        return max(0.0, wait - ROUNDING)
