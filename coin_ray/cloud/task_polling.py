"""Polling of services that answer with a task.

The task's id is on record before the first poll, so that a task once paid is asked for
until it is done or lost.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace

from coin_ray.cloud.call import Call, TaskLost
from coin_ray.cloud.protocol import Pending, RawDetections
from coin_ray.cloud.session import ServiceSession
from coin_ray.errors import (
    BadRequest,
    CloudError,
    DeadlineExceeded,
    ProtocolError,
    UnusableBoxes,
)

POLL_MIN, POLL_CAP, POLL_GROWTH = 0.25, 10.0, 1.5
"""Least and longest seconds between polls, and the factor by which they grow."""
TASK_GONE = (404, 410)
TASK_SECONDS = 86_400.0
"""A task older than this that gives no result is given up."""


class TaskPoller:
    """Polls the tasks of one service. Polls cost nothing and need no lease of their
    own.
    """

    def __init__(self, session: ServiceSession) -> None:
        self._config = session.config
        self._adapter = session.adapter
        self._connections = session.connections
        self._replies = session.replies
        self._admission = session.admission
        self._timing = session.timing

    async def resume_task(self, call: Call) -> RawDetections | None:
        """Return the result of a task that an earlier run did not wait for; None if the
        service no longer has it.
        """
        call.started = self._timing.clock()
        call.give_up_at = call.started + call.seconds_left
        try:
            async with asyncio.timeout(call.seconds_left) as call.timeout:
                return await self.poll_until_done(call, 0.0)
        except CloudError as error:
            age = self._timing.wall_clock() - call.task_time
            is_too_old = age > TASK_SECONDS and not error.stops_run
            # a poll that is refused does not mean that the image would be
            if not (is_too_old or isinstance(error, (TaskLost, BadRequest))):
                raise
            if call.task is not None:
                await asyncio.to_thread(self._replies.forget_task, call, str(error))
        call.seconds_left -= self._timing.clock() - call.started
        if call.seconds_left <= 0:
            raise DeadlineExceeded(call.deadline_message(self._config.deadline))
        return None

    async def poll_until_done(self, call: Call, wait: float) -> RawDetections:
        """Return the result of the task on record, first asked for after ``wait``
        seconds. Raises ``TaskLost`` if there will be none.

        A failed poll is repeated, ``cloud.attempts`` times in a row.
        """
        interval = POLL_MIN
        failures = malformed = 0
        while call.task is not None:
            if self._timing.clock() + wait >= call.give_up_at:
                raise DeadlineExceeded(call.deadline_message(self._config.deadline))
            await self._timing.sleep(wait)
            requested_wait = 0.0
            try:
                reply = await self._poll(call)
            except CloudError as error:
                self._connections.explain_refusal(error)
                call.last_error = self._admission.last_error = str(error)
                self._admission.raise_if_wait_is_too_long(error)
                failures += 1
                malformed += isinstance(error, ProtocolError)
                if call.task is None or not may_retry(error, malformed):
                    raise
                if failures >= self._config.attempts:
                    raise self._admission.final_error(error) from None
                requested_wait = await self._admission.pause_if_throttled(error) or 0.0
            else:
                if not isinstance(reply, Pending):
                    return reply
                call.task = replace(reply, request=reply.request or call.task.request)
                failures = malformed = 0
            grown = max(
                limit_poll_wait(call.task.seconds), POLL_GROWTH * max(wait, interval)
            )
            interval = min(POLL_CAP, grown)
            wait = max(interval, requested_wait)
        raise TaskLost("the service's task is lost", may_have_billed=True)

    async def _poll(self, call: Call) -> RawDetections | Pending:
        assert call.task is not None
        assert call.task.request is not None
        reply = await self._connections.send(call.task.request)
        if reply.status in TASK_GONE:
            reason = f"the service no longer knows its task (answered {reply.status})"
            await asyncio.to_thread(self._replies.forget_task, call, reason)
            raise TaskLost(reason, may_have_billed=True)
        if not 200 <= reply.status < 300:
            raise self._adapter.classify_error(reply.status, reply.headers, reply.body)
        latency_ms = (self._timing.clock() - call.started) * 1000
        async with call.stopped_clock(self._timing.clock):
            return await asyncio.to_thread(
                self._replies.receive_poll, call, reply, latency_ms
            )


def limit_poll_wait(seconds: float) -> float:
    """Limit the seconds before a poll that a service asked for."""
    return min(max(POLL_MIN, seconds), POLL_CAP)


def may_retry(error: CloudError, malformed: int) -> bool:
    """Return whether to repeat a call; ``malformed``: how many of its replies could not
    be read, of which only the first is repeated. A whole one would be the same.
    """
    if isinstance(error, UnusableBoxes):
        return False
    return error.retryable or (isinstance(error, ProtocolError) and malformed == 1)
