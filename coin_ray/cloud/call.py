"""The state of one image that is being asked about."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from coin_ray.cloud.protocol import Frame, Pending
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import Transient


class TaskLost(Transient):
    """The service no longer knows the task, or the task failed for no lasting reason:
    the image must be sent again.
    """


class AnsweredElsewhere(Exception):
    """Another process has called about the same image: look into the journal again."""


@dataclass(slots=True)
class Call:
    """One image under way, and what it has cost so far."""

    key: str
    """The journal's key of the answer."""
    image: CanonicalImage
    """The image as it is sent."""
    seconds_left: float
    """What is left of the deadline once the first lease was granted; waiting for that
    does not count."""
    wait_for_breaker: bool = True
    give_up_at: float = 0.0
    started: float = 0.0
    timeout: asyncio.Timeout | None = None
    """Ends the call at its deadline."""
    task: Pending | None = None
    """A task of the service that is under way and on record: nothing is sent again."""
    task_time: float = 0.0
    """Seconds since 1970 at which the task was accepted."""
    lost_tasks: int = 0
    attempts: int = 0
    calls: int = 0
    latency_ms: float = 0.0
    stops_before: int = 0
    """How many errors had stopped the run when this call began (``FirstCall``)."""
    paid_by_this_run: bool = False
    """The answer on record was paid by an earlier process of the same run."""
    refused_fields: frozenset[str] = frozenset()
    """Fields that the service has refused and that its request was encoded without."""
    last_error: str = ""
    """What the service said when an attempt or a poll failed."""

    @property
    def frame(self) -> Frame:
        """Return the sizes that an answer's boxes refer to."""
        return Frame(
            (self.image.width, self.image.height),
            self.image.original,
            self.image.visible_size,
            self.image.mirrored,
        )

    @property
    def idempotency_key(self) -> str:
        """Return the key that the service is sent; another one after a lost task, since
        a service that remembers keys would return the lost task again.
        """
        return f"{self.key}-{self.lost_tasks}" if self.lost_tasks else self.key

    @asynccontextmanager
    async def stopped_clock(self, clock: Callable[[], float]) -> AsyncIterator[None]:
        """Move the deadline by the time that the block takes: waiting for the journal's
        storage is no fault of the service.
        """
        loop = asyncio.get_running_loop()
        start, loop_start = clock(), loop.time()
        deadline = None if self.timeout is None else self.timeout.when()
        if self.timeout is not None:
            self.timeout.reschedule(None)
        try:
            yield
        finally:
            self.give_up_at += clock() - start
            if self.timeout is not None and deadline is not None:
                self.timeout.reschedule(deadline + loop.time() - loop_start)

    def deadline_message(self, deadline: float) -> str:
        """Return the message for a call that had no answer in ``deadline`` seconds."""
        text = f"no answer within cloud.deadline={deadline:g} s in {self.attempts} attempts"
        if self.last_error:
            text += f"; the last failed: {self.last_error}"
        if self.task is None:
            return text
        return (
            f"{text}; the service's task stays on record, run again to ask for its"
            " result"
        )
