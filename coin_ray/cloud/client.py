"""The client of a detection API: one call of ``CloudClient.answer`` per image, whatever
the network does.

The adapter knows the wire format, ``Connections`` send, ``ReplyJournal`` keeps what was
paid for, ``CallAdmission`` asks the governor when a call may be made, ``RetryEngine``
repeats calls and ``TaskPoller`` polls tasks. This module combines them, and asks about
each image only once at a time.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

import httpx

from coin_ray.cloud.accounts import account_name, answer_endpoint
from coin_ray.cloud.answer import Answer, AnswerStatus
from coin_ray.cloud.box_extent import BoxExtent
from coin_ray.cloud.call import AnsweredElsewhere, Call
from coin_ray.cloud.call_admission import CallAdmission
from coin_ray.cloud.governor import AsyncGovernor
from coin_ray.cloud.http.connections import (
    Connections,
    NotConnected,
    Reply,
    parse_service_url,
)
from coin_ray.cloud.http.signing import signer_for
from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.journal.refresh import JournalRefresh
from coin_ray.cloud.label_map import Prior
from coin_ray.cloud.protocol import Adapter, PreparedRequest, Query, RawDetections
from coin_ray.cloud.responses import ReplyJournal
from coin_ray.cloud.retries import RetryEngine
from coin_ray.cloud.services import (
    adapter_for,
    check_service_settings,
    label_map_for,
    longest_side,
    token_variable,
)
from coin_ray.cloud.session import ServiceSession
from coin_ray.cloud.task_polling import TaskPoller
from coin_ray.cloud.timing import Sleep, Timing
from coin_ray.config import Cloud
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import (
    BudgetExhausted,
    CloudError,
    CloudUnreachable,
    ImageRejected,
    QuotaExhausted,
    UnusableBoxes,
)

HEALTH_ATTEMPTS = 3


class CloudClient:
    """Asks the detection API about images. Use inside one event loop, and ``aclose`` at
    the end.

    ``answer`` returns an ``Answer`` for everything that concerns one image, and raises
    what must stop the run: ``AuthError``, ``QuotaExhausted``, ``BudgetExhausted``,
    ``BadRequest``, ``CloudUnreachable``. With ``skip_over_budget`` a spent budget or
    quota is an ``Answer`` too, so that answers in the journal are still returned, and a
    service whose quota is spent is not called any more. With ``skip_unreachable`` a
    service that can't be reached is an ``Answer`` too: another one may answer.
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
        descriptions: tuple[tuple[str, str], ...] = (),
        transport: httpx.AsyncBaseTransport | None = None,
        skip_over_budget: bool = False,
        skip_unreachable: bool = False,
        sleep: Sleep = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        _check_one_rendering(config)
        self.config = self._config = config
        self.journal = journal
        self.adapter = self._adapter = adapter or adapter_for(config)
        self._capabilities = self._adapter.capabilities
        check_service_settings(config, classes, self._capabilities)
        label_map = label_map_for(config, classes)
        self._query = Query(
            config.model,
            tuple(classes),
            config.score_min,
            label_map,
            settings=self._capabilities.key_settings,
            descriptions=descriptions,
        )
        self._skip_over_budget = skip_over_budget
        self._skip_unreachable = skip_unreachable
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._timing = Timing(sleep, clock, uniform, wall_clock)
        self._extent = BoxExtent()
        self._refresh = JournalRefresh(journal)
        self._connect(url, transport)
        self._start_engine(governor)

    def _connect(self, url: str, transport: httpx.AsyncBaseTransport | None) -> None:
        """Prepare connections with the service's credentials. Raises ConfigError if the
        URL or the credentials are not usable.
        """
        config = self._config
        self._signer = signer_for(
            self._capabilities.auth,
            token_variable(config),
            config.region,
            self._timing.wall_clock,
        )
        self._url = parse_service_url(url, self._signer.secret)
        self._signer.check()
        self._account = account_name(config, url, self._adapter)
        self._connections = Connections(
            self._url,
            self._signer,
            config.deadline,
            transport,
            is_own=config.serve != "none",
        )

    def _start_engine(self, governor: AsyncGovernor) -> None:
        """Create what sends calls, repeats them, and records their replies."""
        self._replies = ReplyJournal(
            self._config,
            self._adapter,
            self._query,
            self.journal,
            answer_endpoint(self._config, self._url),
            self._timing.wall_clock,
        )
        self._admission = CallAdmission(
            self._config, governor, self._connections, self._timing
        )
        session = ServiceSession(
            self._config,
            self._adapter,
            self._connections,
            self._replies,
            self._admission,
            self._timing,
        )
        self._poller = TaskPoller(session)
        self._engine = RetryEngine(session, self._poller, self.journal, self._account)

    def __repr__(self) -> str:
        return f"CloudClient({self._url.host!r}, model={self._query.model!r})"

    @property
    def account(self) -> str:
        """Return the name under which the journal adds up what this service costs."""
        return self._account

    @property
    def connections(self) -> Connections:
        """Return the connections to the service."""
        return self._connections

    @property
    def replies(self) -> ReplyJournal:
        """Return the service's replies in the journal."""
        return self._replies

    async def aclose(self) -> None:
        """Close the connections."""
        await self._connections.aclose()

    @property
    def max_side(self) -> int:
        """Return the longest side in pixels of the images that are sent."""
        return longest_side(self._config, self._capabilities)

    @property
    def rendering(self) -> tuple[int, str]:
        """Return the arguments of ``render_image`` after the file: the longest side in
        pixels, and the rendering.
        """
        return self.max_side, self._config.views[0]

    @property
    def rendering_name(self) -> str:
        """Return a text that names what decides how an image is sent."""
        limits = self._capabilities
        max_side, view = self.rendering
        return f"{limits.name} {max_side} {limits.max_bytes} {view}"

    @property
    def prior(self) -> Prior:
        """Return what is known of the service's labels: what the label map says, or for
        ``cloud.label_scores agreement`` that each counts fully.
        """
        prior = self._query.labels.prior if self._query.labels is not None else Prior()
        if self._config.label_scores == "agreement" and not prior.precision:
            prior = replace(prior, precision=(1.0,) * len(self._query.classes))
        return prior

    async def check(self) -> None:
        """Ask for the service's health, if it has a page for that. Raises ``AuthError``
        and ``CloudUnreachable``.
        """
        self._signer.check()
        if self._capabilities.health_path is None:
            return
        try:
            reply = await self._get_health(self._capabilities.health_path)
        except CloudUnreachable:
            raise
        except CloudError:
            return  # it answers, if badly: the first calls will show the error
        if reply.status in (401, 402, 403) or 300 <= reply.status < 400:
            error = self._adapter.classify_error(
                reply.status, reply.headers, reply.body
            )
            self._connections.explain_refusal(error)
            raise error

    async def _get_health(self, path: str) -> Reply:
        request = PreparedRequest(path, method="GET")
        for attempt in range(1, HEALTH_ATTEMPTS):
            try:
                return await self._send_health_request(request)
            except (TimeoutError, NotConnected):
                await self._timing.sleep(self._timing.backoff_seconds(attempt))
        try:
            return await self._send_health_request(request)
        except (TimeoutError, NotConnected):
            raise self._admission.unreachable() from None

    async def _send_health_request(self, request: PreparedRequest) -> Reply:
        return await asyncio.wait_for(
            self._connections.send(request), self._config.deadline
        )

    async def answer(
        self, image: CanonicalImage, *, wait_for_breaker: bool = True
    ) -> Answer:
        """Return the service's detections in one image, from the journal if it was
        asked before.

        Without ``wait_for_breaker`` a service whose breaker is open counts as
        unreachable.
        """
        stops_before = len(self._engine.first_call.stop_errors)
        try:
            if self._replies.is_quick(image):
                call = self._replies.start_call(image, wait_for_breaker)
            else:
                call = await asyncio.to_thread(
                    self._replies.start_call, image, wait_for_breaker
                )
        except ImageRejected as error:
            return Answer("error", None, error=_describe_error(error))
        call.stops_before = stops_before
        lock = self._locks.setdefault(call.key, asyncio.Lock())
        async with lock:
            return await self._answer_call(call)

    async def recorded_answer(self, image: CanonicalImage) -> Answer | None:
        """Return the answer in the journal, if there is one. Nothing is sent."""
        try:
            call = await asyncio.to_thread(self._replies.start_call, image)
            raw = await asyncio.to_thread(self._replies.find_recorded, call)
        except (ImageRejected, UnusableBoxes):
            return None
        return None if raw is None else _recorded_answer(call, raw)

    def key(self, image: CanonicalImage) -> str:
        """Return the journal's key, also sent as Idempotency-Key."""
        return self._replies.key(image)

    def sent_digest(self, image: CanonicalImage) -> str:
        """Return the sha256 of the image file that is sent, of which the key is made
        (``key_of_unchanged_file``).
        """
        return self._replies.sent_digest(image)

    def key_of_unchanged_file(self, image_id: str) -> str:
        """Return the journal's key of a file that is sent as it is, in the plain
        rendering; ``image_id``: sha256 of its bytes.
        """
        return self._replies.key_of_unchanged_file(image_id)

    async def _answer_call(self, call: Call) -> Answer:
        status: AnswerStatus
        try:
            while True:
                try:
                    return await self._recall_or_ask(call)
                except AnsweredElsewhere:
                    await self._refresh.run()
        except (BudgetExhausted, QuotaExhausted) as error:
            if not self._skip_over_budget:
                raise
            return self._add_costs(call, self._skipped_answer(error))
        except TimeoutError:
            message = call.deadline_message(self._config.deadline)
            answer = Answer("error", None, error=f"DeadlineExceeded: {message}")
            return self._add_costs(call, answer)
        except CloudError as error:
            is_skipped = self._skip_unreachable and isinstance(error, CloudUnreachable)
            if error.stops_run and not is_skipped:
                raise
            status = "unreachable" if is_skipped else "error"
            answer = Answer(status, None, error=_describe_error(error))
            return self._add_costs(call, answer)

    async def _recall_or_ask(self, call: Call) -> Answer:
        """Return the answer in the journal, or else the service's."""
        recorded: RawDetections | PreparedRequest | None
        must_read = self._replies.may_have_recorded(call)
        if self._replies.is_quick(call.image) and not must_read:
            recorded = self._find_recorded_or_encode(call)
        else:
            recorded = await asyncio.to_thread(self._find_recorded_or_encode, call)
        if isinstance(recorded, RawDetections):
            self._check_extent(recorded, call)
            return _recorded_answer(call, recorded)
        detections = await self._ask_service(call, recorded)
        self._check_extent(detections, call)
        status: AnswerStatus = "ok" if len(detections) else "empty"
        return self._add_costs(call, Answer(status, detections))

    def _check_extent(self, detections: RawDetections, call: Call) -> None:
        """Check the unit of a language model's boxes by all its answers; the services
        that give scores are no models that may write another one.
        """
        if detections.score_kind == "none":
            self._extent.add(detections, call.frame)

    def _find_recorded_or_encode(
        self, call: Call
    ) -> RawDetections | PreparedRequest | None:
        """Return the answer in the journal, or else the request for the image; None if
        a task is under way. Both wait for a disk or compress: they share one thread.
        """
        recorded = self._replies.find_recorded(call)
        if recorded is not None or call.task is not None:
            return recorded
        self._replies.check_not_in_batch(call)
        return self._replies.encode_request(call)

    async def _ask_service(
        self, call: Call, request: PreparedRequest | None
    ) -> RawDetections:
        """Return the service's answer; ``request`` None: that of the task under way."""
        if request is None:
            resumed = await self._poller.resume_task(call)
            if resumed is not None:
                return resumed
            request = await asyncio.to_thread(self._replies.encode_request, call)
        return await self._engine.send_until_answered(call, request)

    def _skipped_answer(self, error: BudgetExhausted | QuotaExhausted) -> Answer:
        """Return the answer without a call. The budget is asked for again, as a day's
        calls come back; a quota that the service called spent stays so for this client.
        """
        if isinstance(error, BudgetExhausted):
            return Answer("skipped_budget", None, error=str(error))
        self._admission.quota_message = str(error)
        return Answer("skipped_quota", None, error=str(error))

    def _add_costs(self, call: Call, answer: Answer) -> Answer:
        return replace(
            answer,
            attempts=call.attempts,
            latency_ms=call.latency_ms,
            cost_usd=call.calls * self._config.usd_per_call,
            calls=call.calls,
        )


def _check_one_rendering(config: Cloud) -> None:
    if len(config.views) > 1:
        raise ValueError(
            f"a client sends one rendering, got cloud.views {' '.join(config.views)};"
            " PipelineConfig.clouds has a cloud for each"
        )


def _recorded_answer(call: Call, raw: RawDetections) -> Answer:
    """Return an answer on record. One that this run paid, before it was killed, is no
    answer of an earlier run.
    """
    if not call.paid_by_this_run:
        return Answer("cached", raw)
    return Answer("ok" if len(raw) else "empty", raw)


def _describe_error(error: CloudError) -> str:
    return f"{type(error).__name__}: {error}"
