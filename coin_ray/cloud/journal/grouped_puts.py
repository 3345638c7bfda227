"""Answers of an event loop on their way to the journal: those that arrive while the disk
is busy are written together and share one wait for it.
"""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from coin_ray.cloud.journal.base import AnswerRecord, Journal


class _PendingAnswer(NamedTuple):
    key: str
    record: AnswerRecord
    stored: asyncio.Future[None]


class GroupedPuts:
    """``Journal.put`` for the coroutines of one event loop."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._pending: list[_PendingAnswer] = []
        self._writing: asyncio.Task[None] | None = None

    async def put(self, key: str, record: AnswerRecord) -> None:
        """Store an answer; return when it is durable. A cancelled caller's answer is
        stored all the same.
        """
        if not self._journal.notes_are_fast:  # each answer is an object of its own
            await asyncio.to_thread(self._journal.put, key, record)
            return
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._pending.append(_PendingAnswer(key, record, stored))
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        await stored

    async def _write(self) -> None:
        while self._pending:
            group, self._pending = self._pending, []
            answers = [(pending.key, pending.record) for pending in group]
            error: BaseException | None = None
            try:
                await asyncio.to_thread(self._journal.put_all, answers)
            except BaseException as put_error:
                error = put_error
            for pending in group:
                if pending.stored.done():
                    continue
                if error is None:
                    pending.stored.set_result(None)
                else:
                    pending.stored.set_exception(error)
