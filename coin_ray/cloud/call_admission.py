"""Permission to call a service: leases of the governor, pauses that the service asks
for, and the errors of a service that can't be called.
"""

from __future__ import annotations

import asyncio
import json
from datetime import UTC, datetime

from coin_ray import errors
from coin_ray.cloud.call import AnsweredElsewhere, Call
from coin_ray.cloud.governor import AsyncGovernor, Grant
from coin_ray.cloud.http.connections import Connections, NotConnected
from coin_ray.cloud.timing import BACKOFF_BASE, Timing
from coin_ray.config import Cloud
from coin_ray.errors import (
    BudgetExhausted,
    CloudError,
    CloudUnreachable,
    QuotaExhausted,
    Throttled,
)


class CallAdmission:
    """Asks the governor for leases, one per HTTP call."""

    def __init__(
        self,
        config: Cloud,
        governor: AsyncGovernor,
        connections: Connections,
        timing: Timing,
    ) -> None:
        self._config = config
        self.governor = governor
        self._connections = connections
        self._timing = timing
        self.quota_message = ""
        """What the service said when it refused a call for its quota."""
        self.last_error = ""
        """What the service said when a call last failed."""

    async def acquire_lease(self, call: Call, failure: CloudError | None = None) -> int:
        """Return a lease once its wait is over; ``failure``: the error after which this
        is a retry.

        Raises ``BudgetExhausted``, ``QuotaExhausted``, ``CloudUnreachable``, or
        ``failure`` itself if there have been too many retries.
        """
        while True:
            grant = await self.governor.reserve(
                self._config.usd_per_call, failure is not None, call.key
            )
            if grant.answered_elsewhere:
                raise AnsweredElsewhere
            # the service may have refused another image while this one waited
            if self.quota_message:
                await self._return_lease(grant)
                raise QuotaExhausted(self.quota_message)
            self._raise_refusal(grant, failure)
            if grant.breaker_open and not call.wait_for_breaker:
                raise self.unreachable(
                    "too many of its answers failed, the breaker is open"
                )
            if grant.lease is None:
                await self._timing.sleep(grant.wait)
                continue
            try:
                if grant.wait > 0:
                    await self._timing.sleep(grant.wait)
            except asyncio.CancelledError:
                await self._return_lease(grant)
                raise
            return grant.lease

    def _raise_refusal(self, grant: Grant, failure: CloudError | None) -> None:
        if grant.refusal == "budget":
            last = f"; the last call failed: {failure}" if failure is not None else ""
            raise BudgetExhausted(
                f"{grant.reason}; raise the limit and run again, answers that could be"
                f" read are kept{last}"
            )
        if grant.refusal == "stopped":
            stop_error = json.loads(grant.reason)
            raise getattr(errors, stop_error["type"])(stop_error["message"])
        if grant.refusal == "unreachable":
            raise self.unreachable(grant.reason)
        if grant.refusal == "retries" and failure is not None:
            failure.args = (f"{failure}; not tried again: {grant.reason}",)
            raise self.final_error(failure)

    async def _return_lease(self, grant: Grant) -> None:
        if grant.lease is not None:
            await self.governor.settle(grant.lease, "unsent", billed=False)

    async def pause_if_throttled(self, error: CloudError) -> float | None:
        """Pause all workers if the service asked for it; return the seconds this call
        has to wait, a little more, or None if it did not ask.
        """
        if not isinstance(error, Throttled) or error.retry_after is None:
            return None
        seconds = max(error.retry_after, 0.0)
        await self.governor.pause(seconds)
        return seconds + self._timing.uniform(0, BACKOFF_BASE)

    def raise_if_wait_is_too_long(self, error: CloudError) -> None:
        """Raise ``QuotaExhausted``, with the time to come back, if the service asks to
        wait longer than an image may take: no image could be answered before that.
        """
        if not isinstance(error, Throttled) or error.retry_after is None:
            return
        if error.retry_after <= self._config.deadline:
            return
        try:
            moment = self._timing.wall_clock() + error.retry_after
            resume = datetime.fromtimestamp(moment, UTC).strftime("%Y-%m-%d %H:%M UTC")
        except (ValueError, OverflowError, OSError):
            resume = "a date beyond the calendar"
        message = (
            f"the service asks to wait {error.retry_after:g} s, until {resume}, longer"
            f" than cloud.deadline={self._config.deadline:g} s: run the same command"
            " again then, answers so far are kept, or raise cloud.deadline to wait; it"
            f" said: {error}"
        )
        self.quota_message = message
        raise QuotaExhausted(message)

    def final_error(self, error: CloudError) -> CloudError:
        """Return the error to raise when ``error`` is not retried any more: a service
        that never answered is unreachable.
        """
        if isinstance(error, NotConnected) and not self._connections.reached:
            return self.unreachable()
        return error

    def unreachable(self, reason: str = "") -> CloudUnreachable:
        """Return the error for a service that can't be reached, with what it said last."""
        last_answer = f"it last said: {self.last_error}" if self.last_error else ""
        details = "; ".join(text for text in (reason, last_answer) if text)
        detail = f" ({details})" if details else ""
        return CloudUnreachable(
            f"the detection API at {self._connections.host} can't be reached{detail}."
            " Check cloud.url, that the service runs, and proxies and certificates; then"
            " run again: answers so far are kept"
        )
