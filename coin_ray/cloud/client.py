"""The client of the detection API: one call of ``CloudClient.answer`` per image,
whatever the network does.

The adapter knows the wire format, ``Connections`` send, ``Replies`` keep what was paid
for in the journal, the governor decides when a call may be made. This module owns the
rest: deadline, retries, one call per image at a time, and the polling of services that
answer with a task: its id is on record before the first poll, so that a task once paid
is asked for until it is done or lost.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

import httpx

from coin_ray.cloud.answer import Answer
from coin_ray.cloud.governor import AsyncGovernor, Limits, Outcome
from coin_ray.cloud.http.connections import Connections, NotConnected, checked_url
from coin_ray.cloud.http.signing import signer_for
from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.label_map import Prior
from coin_ray.cloud.protocol import (
    RETRY_AFTER_MAX,
    Adapter,
    Pending,
    PreparedRequest,
    Query,
    RawDetections,
)
from coin_ray.cloud.responses import Call, Replies, TaskLost
from coin_ray.cloud.services import (
    adapter_for,
    calls_per_minute,
    check_askable,
    label_map_for,
    models_digest,
    side_max,
    token_variable,
)
from coin_ray.config import Cloud
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import (
    BadRequest,
    BudgetExhausted,
    CloudError,
    CloudUnreachable,
    DeadlineExceeded,
    ImageRejected,
    ProtocolError,
    QuotaExhausted,
    Throttled,
    Transient,
)

BACKOFF_BASE = 0.5
BACKOFF_CAP = 20.0
CHECK_ATTEMPTS = 3
POLL_MIN, POLL_CAP, POLL_GROWTH = 0.25, 10.0, 1.5
"""Seconds between polls, at least and at most, and how they grow."""
TASK_GONE = (404, 410)
TASK_SECONDS = 86_400.0
"""A task older than this that gives no result is asked for no more."""
RETRY_BURST_MIN = 20

Sleep = Callable[[float], Awaitable[None]]


def governor_limits(config: Cloud) -> Limits:
    """Return the governor's limits for a configuration. Calls per minute are spread over the
    minute.
    """
    per_minute = calls_per_minute(config)
    rate = config.rate if per_minute is None else min(config.rate, per_minute / 60)
    return Limits(
        rate,
        config.in_flight,
        config.max_calls,
        config.max_usd,
        burst=max(1, round(rate / 10)),
        lease_seconds=2 * config.deadline,
        per_minute=per_minute,
        per_day=config.per_day,
        retry_burst=max(RETRY_BURST_MIN, 2 * config.in_flight),
    )


def account_name(config: Cloud, url: str, adapter: Adapter) -> str:
    """Name [12 hexadecimal digits] under which the journal adds up what a service, an
    address and a model have cost.
    """
    identity = (
        f"{adapter.capabilities.name} {_endpoint(config, httpx.URL(url))}"
        f" {config.model}"
    )
    return hashlib.sha256(identity.encode()).hexdigest()[:12]


class CloudClient:
    """Asks the detection API about images. Use inside one event loop, and ``aclose`` at
    the end.

    ``answer`` returns an ``Answer`` for everything that concerns one image, and raises
    what must stop the run: ``AuthError``, ``QuotaExhausted``, ``BudgetExhausted``,
    ``BadRequest``, ``CloudUnreachable``. With ``skip_over_budget`` a spent budget or
    quota is an ``Answer`` too, so that journalled images still come through, and a
    service that says its quota is spent is asked no more; with ``skip_unreachable`` so
    is a service that can't be reached: another one may answer.
    """

    def __init__(
        self,
        config: Cloud,
        classes: Sequence[str],
        url: str,
        journal: Journal,
        governor: AsyncGovernor,
        adapter: Adapter | None = None,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        skip_over_budget: bool = False,
        skip_unreachable: bool = False,
        sleep: Sleep = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._config = config
        if len(config.views) > 1:
            raise ValueError(
                "a client asks in one view; PipelineConfig.clouds has a cloud for each"
            )
        self._adapter = adapter or adapter_for(config)
        self._capabilities = self._adapter.capabilities
        check_askable(config, classes, self._capabilities)
        self._query = Query(
            config.model,
            tuple(classes),
            config.score_min,
            label_map_for(config, classes),
        )
        self._signer = signer_for(
            self._capabilities.auth, token_variable(config), config.region, wall_clock
        )
        self._url = checked_url(url, self._signer.secret)
        self._signer.check()
        self._journal = journal
        self._governor = governor
        self._skip_over_budget, self._skip_unreachable = (
            skip_over_budget,
            skip_unreachable,
        )
        self._no_quota = ""
        self._account = account_name(config, url, self._adapter)
        self._sleep, self._clock, self._uniform, self._wall_clock = (
            sleep,
            clock,
            uniform,
            wall_clock,
        )
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._http = Connections(self._url, self._signer, config.deadline, transport)
        self._replies = Replies(
            config,
            self._adapter,
            self._query,
            journal,
            _place(config, self._url),
            wall_clock,
        )

    def __repr__(self) -> str:
        return f"CloudClient({self._url.host!r}, model={self._query.model!r})"

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @property
    def max_side(self) -> int:
        """Longer side in pixels of the images that are sent."""
        return side_max(self._config, self._capabilities)

    @property
    def view(self) -> tuple[int, str]:
        """How ``image_in_view`` makes what is sent of a file: the longer side in
        pixels, and the view.
        """
        return self.max_side, self._config.views[0]

    async def check(self) -> None:
        """Ask for the service's health, if it has a page for that. Raises ``AuthError``
        and ``CloudUnreachable``.
        """
        self._signer.check()
        if self._capabilities.health_path is None:
            return
        health = PreparedRequest(self._capabilities.health_path, method="GET")
        for attempt in range(1, CHECK_ATTEMPTS + 1):
            try:
                reply = await asyncio.wait_for(
                    self._http.send(health), self._config.deadline
                )
                break
            except (TimeoutError, NotConnected):
                if attempt == CHECK_ATTEMPTS:
                    raise self._unreachable() from None
                await self._sleep(self._backoff(attempt))
            except CloudError:
                return  # it answers, if badly: the first calls will tell
        if reply.status in (401, 402, 403) or 300 <= reply.status < 400:
            raise self._adapter.classify_error(reply.status, reply.headers, reply.body)

    @property
    def prior(self) -> Prior:
        """What the label map says of the service's labels beside its scores."""
        return self._query.labels.prior if self._query.labels is not None else Prior()

    async def answer(self, image: CanonicalImage, *, patient: bool = True) -> Answer:
        """The service's detections in one image, from the journal if it was asked
        before.

        Not ``patient``: while the breaker is open the service counts as unreachable,
        instead of being waited for.
        """
        try:
            call = await asyncio.to_thread(self._replies.begun, image, patient)
        except ImageRejected as error:
            return Answer("error", None, error=f"{type(error).__name__}: {error}")
        lock = self._locks.setdefault(call.key, asyncio.Lock())
        async with lock:
            return await self._ask(call)

    async def known(self, image: CanonicalImage) -> Answer | None:
        """The answer on record, if there is one. Nothing is asked."""
        try:
            raw = await asyncio.to_thread(
                lambda: self._replies.on_record(self._replies.begun(image))
            )
        except ImageRejected:
            return None
        return None if raw is None else Answer("cached", raw)

    def key(self, image: CanonicalImage) -> str:
        """The journal's key, also sent as Idempotency-Key."""
        return self._replies.key(image)

    def key_of_file(self, image_id: str) -> str:
        """The journal's key of a file that is sent as it is, in the plain view, by the
        sha256 of its bytes.
        """
        return self._replies.key_of_file(image_id)

    def _answer_or_request(self, call: Call) -> RawDetections | PreparedRequest | None:
        """What is on record, or else how to ask; None if a task is under way."""
        known = self._replies.on_record(call)
        return known if known is not None or call.task else self._replies.request(call)

    async def _ask(self, call: Call) -> Answer:
        """Waiting for the first place does not count towards the deadline: with many
        images that is queueing.
        """
        try:
            found = await asyncio.to_thread(self._answer_or_request, call)
            if isinstance(found, RawDetections):
                return Answer("cached", found)
            resumed = None if found is not None else await self._resumed(call)
            raw = resumed if resumed is not None else await self._asked(call, found)
        except (BudgetExhausted, QuotaExhausted) as error:
            if not self._skip_over_budget:
                raise
            return self._finished(call, self._spent(error))
        except TimeoutError:
            return self._finished(
                call,
                Answer(
                    "error", None, error=f"DeadlineExceeded: {self._too_late(call)}"
                ),
            )
        except CloudError as error:
            unreachable = isinstance(error, CloudUnreachable) and self._skip_unreachable
            if error.stops_run and not unreachable:
                raise
            text = f"{type(error).__name__}: {error}"
            return self._finished(
                call,
                Answer("unreachable" if unreachable else "error", None, error=text),
            )
        return self._finished(call, Answer("ok" if len(raw) else "empty", raw))

    def _spent(self, error: BudgetExhausted | QuotaExhausted) -> Answer:
        """A budget is asked for again, as a day's calls come back; a quota that the
        service says is spent stays so for this client.
        """
        if isinstance(error, BudgetExhausted):
            return Answer("skipped_budget", None, error=str(error))
        self._no_quota = str(error)
        return Answer("skipped_quota", None, error=str(error))

    async def _asked(
        self, call: Call, request: PreparedRequest | None
    ) -> RawDetections:
        if request is None:
            request = await asyncio.to_thread(self._replies.request, call)
        lease = await self._admit(call)
        return await asyncio.wait_for(
            self._until_answered(call, request, lease), call.seconds
        )

    async def _resumed(self, call: Call) -> RawDetections | None:
        """The result of a task that an earlier run left behind; None if the service no
        longer has it.
        """
        call.started = self._clock()
        call.give_up_at = call.started + call.seconds
        try:
            return await asyncio.wait_for(self._polled(call, 0.0), call.seconds)
        except CloudError as error:
            too_old = (
                self._wall_clock() - call.task_time > TASK_SECONDS
                and not error.stops_run
            )
            # a poll that is wrong now says nothing of the question
            if not (too_old or isinstance(error, (TaskLost, BadRequest))):
                raise
            if call.task is not None:
                await asyncio.to_thread(self._replies.forget_task, call, str(error))
        call.seconds -= self._clock() - call.started
        if call.seconds <= 0:
            raise DeadlineExceeded(self._too_late(call))
        return None

    def _too_late(self, call: Call) -> str:
        text = (
            f"no answer within cloud.deadline={self._config.deadline:g} s in"
            f" {call.attempts} attempts"
        )
        return (
            f"{text}; the service's task stays on record, run again to ask for its"
            " result"
            if call.task
            else text
        )

    def _finished(self, call: Call, answer: Answer) -> Answer:
        cost = call.calls * self._config.usd_per_call
        return replace(
            answer,
            attempts=call.attempts,
            latency_ms=call.latency_ms,
            cost_usd=cost,
            calls=call.calls,
        )

    async def _until_answered(
        self, call: Call, request: PreparedRequest, lease: int
    ) -> RawDetections:
        """Tries until the image is answered, may not be retried, or attempts, time or
        everybody's retries run out.
        """
        call.give_up_at = self._clock() + call.seconds
        malformed = 0
        while True:
            try:
                return await self._attempt(call, request, lease)
            except CloudError as error:
                malformed += isinstance(error, ProtocolError)
                again = error.retryable or (
                    isinstance(error, ProtocolError) and malformed == 1
                )
                if call.task is not None or not again:
                    raise
                if call.attempts >= self._config.attempts:
                    raise self._last(error) from None
                await self._back_off(error, call.attempts, call.give_up_at)
                last = error
            lease = await self._admit(call, last)

    def _last(self, error: CloudError) -> CloudError:
        if isinstance(error, NotConnected) and not self._http.reached:
            return self._unreachable()
        return error

    async def _back_off(
        self, error: CloudError, attempt: int, give_up_at: float
    ) -> None:
        """Full jitter; a Retry-After is waited out, by all workers."""
        asked = await self._asked_wait(error)
        delay = self._backoff(attempt) if asked is None else asked
        if self._clock() + delay >= give_up_at:
            raise DeadlineExceeded(
                f"cloud.deadline={self._config.deadline:g} s leaves no time for attempt"
                f" {attempt + 1} after: {error}"
            )
        await self._sleep(delay)

    async def _asked_wait(self, error: CloudError) -> float | None:
        """Seconds the service asks to wait, if it does, and a little more. Everybody
        waits.
        """
        if not isinstance(error, Throttled) or error.retry_after is None:
            return None
        seconds = min(max(error.retry_after, 0.0), RETRY_AFTER_MAX)
        await self._governor.pause(seconds)
        return seconds + self._uniform(0, BACKOFF_BASE)

    def _backoff(self, attempt: int) -> float:
        return self._uniform(0, min(BACKOFF_CAP, BACKOFF_BASE * 2 ** (attempt - 1)))

    async def _admit(self, call: Call, failed: CloudError | None = None) -> int:
        """A lease from the governor, once its wait is over; ``failed``: the error after
        which this is a retry.

        Raises ``BudgetExhausted``, ``QuotaExhausted``, ``CloudUnreachable``, or
        ``failed`` itself if there have been too many retries.
        """
        while True:
            grant = await self._governor.reserve(
                self._config.usd_per_call, failed is not None
            )
            # said to another image, maybe while this one waited for a place
            if self._no_quota:
                if grant.lease is not None:
                    await self._governor.settle(grant.lease, "unsent", billed=False)
                raise QuotaExhausted(self._no_quota)
            if grant.refusal == "budget":
                raise BudgetExhausted(
                    f"{grant.reason}; raise the limit and run again, answers so far are"
                    " kept"
                )
            if grant.refusal == "unreachable":
                raise self._unreachable(grant.reason)
            if grant.refusal == "retries" and failed is not None:
                failed.args = (f"{failed}; not tried again: {grant.reason}",)
                raise self._last(failed)
            if grant.breaker_open and not call.patient:
                raise self._unreachable(
                    "too many of its answers failed, the breaker is open"
                )
            if grant.lease is None:
                await self._sleep(grant.wait)
                continue
            try:
                if grant.wait > 0:
                    await self._sleep(grant.wait)
            except asyncio.CancelledError:
                await self._governor.settle(grant.lease, "unsent", billed=False)
                raise
            return grant.lease

    async def _attempt(
        self, call: Call, request: PreparedRequest, lease: int
    ) -> RawDetections:
        """One call. Unless the service surely did not bill it, it stays spent: also if
        it is cancelled or the process dies.

        Polls belong to the call: they keep its place and cost nothing more.
        """
        outcome: Outcome = "failed"
        billed = True
        found: RawDetections | Pending | None = None
        call.attempts += 1
        call.calls += 1
        try:
            await self._noted(
                self._journal.attempt,
                call.key,
                self._config.usd_per_call,
                self._account,
                self._wall_clock(),
            )
            found = await self._exchange(call, request, lease)
            raw = (
                await self._polled(call, _poll_wait(found.seconds))
                if isinstance(found, Pending)
                else found
            )
            outcome = "answered"
            return raw
        except CloudError as error:
            billed = error.may_have_billed or found is not None
            outcome = _outcome(error)
            if isinstance(error, QuotaExhausted):
                # before the place goes to an image that waits for it
                self._no_quota = str(error)
            raise
        finally:
            if not billed:
                call.calls -= 1
                await self._noted(
                    self._journal.refund,
                    call.key,
                    self._config.usd_per_call,
                    self._account,
                )
            await self._governor.settle(lease, outcome, billed)

    async def _noted(self, note: Callable[..., None], *what: str | float) -> None:
        """Write down what was or was not spent; a thread per call costs more than
        writing to a disk's cache.
        """
        if self._journal.notes_are_fast:
            note(*what)
        else:
            await asyncio.to_thread(note, *what)

    async def _exchange(
        self, call: Call, request: PreparedRequest, lease: int
    ) -> RawDetections | Pending:
        """A service that is done with a call gets the next one while the answer goes to
        the journal; a task keeps its place.
        """
        call.started = self._clock()
        reply = await self._http.send(request, call.idempotency_key)
        call.latency_ms = (self._clock() - call.started) * 1000
        if not 200 <= reply.status < 300:
            raise self._adapter.classify_error(reply.status, reply.headers, reply.body)
        if not self._capabilities.asynchronous:
            await self._governor.arrived(lease)
        return await asyncio.to_thread(self._replies.received, call, reply)

    async def _polled(self, call: Call, wait: float) -> RawDetections:
        """The result of the task on record, first asked for after ``wait`` seconds.
        Raises ``TaskLost`` if there will be none.

        What fails on the way to a poll costs nothing and is tried again,
        ``cloud.attempts`` times in a row.
        """
        interval, failures, malformed = POLL_MIN, 0, 0
        while call.task is not None:
            if self._clock() + wait >= call.give_up_at:
                raise DeadlineExceeded(self._too_late(call))
            await self._sleep(wait)
            hint = 0.0
            try:
                found = await self._poll(call)
            except CloudError as error:
                failures, malformed = (
                    failures + 1,
                    malformed + isinstance(error, ProtocolError),
                )
                if call.task is None or not (
                    error.retryable
                    or (isinstance(error, ProtocolError) and malformed == 1)
                ):
                    raise
                if failures >= self._config.attempts:
                    raise self._last(error) from None
                hint = await self._asked_wait(error) or 0.0
            else:
                if not isinstance(found, Pending):
                    return found
                call.task = replace(found, request=found.request or call.task.request)
                failures = malformed = 0
            interval = min(
                POLL_CAP,
                max(_poll_wait(call.task.seconds), POLL_GROWTH * max(wait, interval)),
            )
            wait = max(interval, hint)
        raise TaskLost("the service's task is lost", may_have_billed=True)

    async def _poll(self, call: Call) -> RawDetections | Pending:
        assert call.task is not None
        assert call.task.request is not None
        reply = await self._http.send(call.task.request)
        if reply.status in TASK_GONE:
            reason = f"the service no longer knows its task (answered {reply.status})"
            await asyncio.to_thread(self._replies.forget_task, call, reason)
            raise TaskLost(reason, may_have_billed=True)
        if not 200 <= reply.status < 300:
            raise self._adapter.classify_error(reply.status, reply.headers, reply.body)
        latency_ms = (self._clock() - call.started) * 1000
        return await asyncio.to_thread(self._replies.polled, call, reply, latency_ms)

    def _unreachable(self, reason: str = "") -> CloudUnreachable:
        why = f" ({reason})" if reason else ""
        return CloudUnreachable(
            f"the detection API at {self._url.host} can't be reached{why}. Check"
            " cloud.url, that the service runs, and proxies and certificates; then run"
            " again: answers so far are kept"
        )


def _endpoint(config: Cloud, url: httpx.URL) -> str:
    """Host and path. A server started for this run has another port each time, so its
    name stands for it.
    """
    if config.serve != "none":
        models = ",".join(os.path.basename(m) for m in config.onnx_models)
        return f"{config.serve}:{models}"
    return f"{url.netloc.decode()}{url.path.rstrip('/')}"


def _place(config: Cloud, url: httpx.URL) -> str:
    """As ``answer_key`` knows the endpoint: other weights under the same name give
    other answers.
    """
    digest = models_digest(config)
    return f"{_endpoint(config, url)}#{digest}" if digest else _endpoint(config, url)


def _poll_wait(seconds: float) -> float:
    """Seconds before a poll, whatever the service names."""
    return min(max(POLL_MIN, seconds), POLL_CAP)


def _outcome(error: CloudError) -> Outcome:
    if isinstance(error, Throttled):
        return "throttled"
    return "failed" if isinstance(error, (Transient, DeadlineExceeded)) else "answered"
