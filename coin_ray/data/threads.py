"""Map a function over many files: on an object store reading is mostly waiting."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

THREADS = 8

Input = TypeVar("Input")
Output = TypeVar("Output")


def map_in_threads(
    function: Callable[[Input], Output], inputs: Iterable[Input]
) -> list[Output]:
    """Call ``function`` with each input, several at once; return in input order."""
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, inputs))
