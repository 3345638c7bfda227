"""The retry engine: attempts at one image until it is answered, or attempts, time or
the retries of all workers run out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress

from coin_ray import storage
from coin_ray.cloud.call import Call
from coin_ray.cloud.first_call import FirstCall
from coin_ray.cloud.governor import Outcome
from coin_ray.cloud.http.connections import Reply
from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.journal.grouped_puts import GroupedPuts
from coin_ray.cloud.protocol import (
    FieldRefused,
    Pending,
    PreparedRequest,
    RawDetections,
)
from coin_ray.cloud.session import ServiceSession
from coin_ray.cloud.task_polling import TaskPoller, limit_poll_wait, may_retry
from coin_ray.errors import (
    BadRequest,
    CloudError,
    DeadlineExceeded,
    ProtocolError,
    QuotaExhausted,
    StorageUnavailable,
    Throttled,
    Transient,
)

logger = logging.getLogger(__name__)


class RetryEngine:
    """Sends requests of one service, with a lease and a note in the journal for each."""

    def __init__(
        self,
        session: ServiceSession,
        poller: TaskPoller,
        journal: Journal,
        account: str,
    ) -> None:
        self._config = session.config
        self._adapter = session.adapter
        self._connections = session.connections
        self._replies = session.replies
        self._admission = session.admission
        self._timing = session.timing
        self._poller = poller
        self._journal = journal
        self._puts = GroupedPuts(journal)
        self._is_asynchronous = session.adapter.capabilities.asynchronous
        self._account = account
        self.first_call = FirstCall()

    async def send_until_answered(
        self, call: Call, request: PreparedRequest
    ) -> RawDetections:
        """Return the service's detections. Raises ``TimeoutError`` after the deadline,
        which begins with the first lease: with many images, waiting for that is
        queueing.
        """
        async with self.first_call.turn(call.stops_before):
            request = await self._without_refused_fields(call, request)
            lease = await self._admission.acquire_lease(call)
            try:
                self._replies.versions.check()
            except BadRequest:
                await self._admission.governor.settle(lease, "unsent", billed=False)
                raise
            async with asyncio.timeout(call.seconds_left) as call.timeout:
                return await self._retry(call, request, lease)

    async def _without_refused_fields(
        self, call: Call, request: PreparedRequest
    ) -> PreparedRequest:
        """Return the request without the fields that the service has refused since it was
        encoded.
        """
        if call.refused_fields == self._replies.refused_fields:
            return request
        return await asyncio.to_thread(self._replies.encode_request, call)

    async def _retry(
        self, call: Call, request: PreparedRequest, lease: int
    ) -> RawDetections:
        call.give_up_at = self._timing.clock() + call.seconds_left
        malformed = 0
        while True:
            try:
                return await self._attempt(call, request, lease)
            except FieldRefused as error:
                if error.field in call.refused_fields:
                    raise BadRequest(str(error)) from None
                self._leave_out_field(error)
                request = await asyncio.to_thread(self._replies.encode_request, call)
                call.attempts -= 1
                failure: CloudError | None = None
            except CloudError as error:
                call.last_error = self._admission.last_error = str(error)
                self._admission.raise_if_wait_is_too_long(error)
                malformed += isinstance(error, ProtocolError)
                if call.task is not None or not may_retry(error, malformed):
                    raise
                if call.attempts >= self._config.attempts:
                    raise self._admission.final_error(error) from None
                await self._back_off(error, call)
                failure = error
            lease = await self._admission.acquire_lease(call, failure)

    def _leave_out_field(self, error: FieldRefused) -> None:
        """Leave out the field that the service refused, in this run's further requests
        too.
        """
        if error.field not in self._replies.refused_fields:
            self._replies.leave_out_field(error.field)
            logger.warning(
                "the service refuses the field %r of a request, it is left out from now"
                " on: %s",
                error.field,
                error,
            )

    async def _back_off(self, error: CloudError, call: Call) -> None:
        """Wait a random time, or as long as the service asked all workers to wait."""
        requested = await self._admission.pause_if_throttled(error)
        delay = (
            self._timing.backoff_seconds(call.attempts)
            if requested is None
            else requested
        )
        if self._timing.clock() + delay >= call.give_up_at:
            raise DeadlineExceeded(
                f"cloud.deadline={self._config.deadline:g} s leaves no time for attempt"
                f" {call.attempts + 1} after: {error}"
            )
        await self._timing.sleep(delay)

    async def _attempt(
        self, call: Call, request: PreparedRequest, lease: int
    ) -> RawDetections:
        """Make one call. Unless the service certainly did not bill it, it counts as
        spent: also if it is cancelled or the process dies.

        Polls belong to the call: they keep its lease and cost nothing more.
        """
        outcome: Outcome = "failed"
        billed = True
        reply: RawDetections | Pending | None = None
        failure: CloudError | None = None
        call.attempts += 1
        call.calls += 1
        try:
            await self._note_attempt(call)
            reply = await self._exchange(call, request, lease)
            self.first_call.mark_answered()
            if isinstance(reply, Pending):
                wait = limit_poll_wait(reply.seconds)
                detections = await self._poller.poll_until_done(call, wait)
            else:
                detections = reply
            outcome = "answered"
            return detections
        except CloudError as error:
            self._connections.explain_refusal(error)
            failure = None if isinstance(error, FieldRefused) else error
            billed = error.may_have_billed or reply is not None
            outcome = _call_outcome(error)
            if outcome == "answered" and not error.stops_run:
                self.first_call.mark_answered()
            if isinstance(error, QuotaExhausted):
                # before the lease goes to an image that waits for it
                self._admission.quota_message = str(error)
            raise
        finally:
            if not billed:
                call.calls -= 1
                await self._note_refund(call)
            await self._admission.governor.settle(lease, outcome, billed, failure)

    async def _exchange(
        self, call: Call, request: PreparedRequest, lease: int
    ) -> RawDetections | Pending:
        """Send the request once. A service that has answered gets the next one while
        the answer goes to the journal; a task keeps its lease.
        """
        call.started = self._timing.clock()
        reply = await self._connections.send(request, call.idempotency_key)
        call.latency_ms = (self._timing.clock() - call.started) * 1000
        if not 200 <= reply.status < 300:
            raise self._adapter.classify_error(reply.status, reply.headers, reply.body)
        if not self._is_asynchronous:
            await self._admission.governor.arrived(lease)
        async with call.stopped_clock(self._timing.clock):
            return await self._receive(call, reply)

    async def _receive(self, call: Call, reply: Reply) -> RawDetections | Pending:
        """Store a 2xx reply, then decode it."""
        record = self._replies.new_record(call, reply)
        await self._puts.put(self._replies.storage_key(call), record)
        answer = self._replies.decode_answer(call, reply)
        if answer is not None:
            return answer
        return await asyncio.to_thread(
            self._replies.receive_stored, call, reply, record
        )

    async def _note_attempt(self, call: Call) -> None:
        usd, account = self._config.usd_per_call, self._account
        moment = self._timing.wall_clock()
        image_id = call.image.image_id
        await self._write_note(
            call,
            lambda: self._journal.attempt(call.key, usd, account, moment, image_id),
        )

    async def _note_refund(self, call: Call) -> None:
        usd, account = self._config.usd_per_call, self._account
        await self._write_note(
            call, lambda: self._journal.refund(call.key, usd, account)
        )

    async def _write_note(self, call: Call, write: Callable[[], None]) -> None:
        """Write a note in the journal; a thread per call costs more than writing to a
        disk's cache. A disk that can't be reached is waited for in a thread.
        """
        if self._journal.notes_are_fast:
            with suppress(StorageUnavailable), storage.without_waiting():
                write()
                return
        async with call.stopped_clock(self._timing.clock):
            await asyncio.to_thread(write)


def _call_outcome(error: CloudError) -> Outcome:
    if isinstance(error, Throttled):
        return "throttled"
    if isinstance(error, (Transient, DeadlineExceeded)):
        return "failed"
    return "answered"
