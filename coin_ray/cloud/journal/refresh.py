"""Reading of what other processes have written to a journal, beside an event loop."""

from __future__ import annotations

import asyncio

from coin_ray.cloud.journal.base import Journal


class JournalRefresh:
    """``Journal.refresh`` for the coroutines of one event loop: those that wait for one
    share the next.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._lock = asyncio.Lock()
        self._started = 0

    async def run(self) -> None:
        """Return after a refresh that began after this call."""
        started_before = self._started
        async with self._lock:
            if self._started == started_before:
                self._started += 1
                await asyncio.to_thread(self._journal.refresh)
