"""The manners and the faults of a cloud far away: latency, a limit on calls, failures
drawn from (seed, image, how often it was asked).
"""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass
from typing import Literal

Fault = Literal["500", "503", "truncated"]
FAULTS: tuple[Fault, ...] = ("500", "503", "truncated")
REMEMBERED = 100_000


@dataclass
class Stats:
    """Calls since the start. ``billed``: a detection was made; ``duplicates``: it had
    been answered for the same image and key before; ``busy``: refused because the queue
    was full.
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
class Manners:
    """``latency``: seconds before each answer; ``rate``: calls per second before 429;
    ``faults``: share of calls that fail.
    """

    latency: float = 0.0
    rate: float = math.inf
    faults: float = 0.0
    seed: int = 0

    def fault(self, image_id: str, attempt: int) -> Fault | None:
        digest = hashlib.sha256(f"{self.seed}:{image_id}:{attempt}".encode()).digest()
        if int.from_bytes(digest[:8], "big") / 2**64 >= self.faults:
            return None
        return FAULTS[digest[8] % len(FAULTS)]


class Recent:
    """How often each of the last ``limit`` different keys was seen."""

    def __init__(self, limit: int = REMEMBERED) -> None:
        self._limit = limit
        self._counts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def again(self, key: str) -> int:
        """Count ``key`` once more; returns its count, 1 at first and after it was
        forgotten.
        """
        count = self._counts.pop(key, 0) + 1
        self._counts[key] = count
        if len(self._counts) > self._limit:
            del self._counts[next(iter(self._counts))]
        return count


class Bucket:
    """Calls per second, with a burst of a quarter second's worth."""

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate
        self._burst = max(1.0, rate / 4)
        self._next_arrival = 0.0

    def wait(self) -> float:
        """0 and the call is counted, or the seconds after which to come again."""
        now = time.monotonic()
        arrival = max(self._next_arrival, now)
        wait = arrival - now - (self._burst - 1) * self._interval
        if wait <= 1e-9:
            self._next_arrival = arrival + self._interval
        return max(0.0, wait - 1e-9)
