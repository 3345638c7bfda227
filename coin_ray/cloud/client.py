"""The client of the detection API: one call of ``CloudClient.answer`` per image, whatever the network does.

The adapter knows the wire format, the journal keeps what was paid for, the governor decides when a call may be made.
This module owns the rest: deadline, retries, one call per image at a time, size cap, and the secret, which is read
from the environment for each request and put nowhere else.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Literal
from weakref import WeakValueDictionary

import httpx

from coin_ray.cloud.journal import Journal, Record, answer_key
from coin_ray.cloud.limiter import AsyncGovernor, Limits, Outcome
from coin_ray.cloud.protocol import Adapter, Frame, Query, RawDetections
from coin_ray.cloud.reference import ReferenceAdapter
from coin_ray.config import Cloud
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import (
    BudgetExhausted,
    CloudError,
    CloudUnreachable,
    ConfigError,
    DeadlineExceeded,
    ProtocolError,
    Throttled,
    Transient,
)

BACKOFF_BASE = 0.5
BACKOFF_CAP = 20.0
BODY_MAX = 32 * 2**20
CONNECT_SECONDS = 10.0
CHECK_ATTEMPTS = 3
TOKEN_LENGTH_MIN = 6
"""A shorter token may occur in an answer by chance and is not looked for."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
USER_AGENT = f"coin_ray/{version('coin-ray')}"
NOT_CONNECTED = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError, httpx.UnsupportedProtocol)
"""Nothing was sent, so nothing can have been billed."""

AnswerStatus = Literal["ok", "cached", "empty", "error", "skipped_budget"]
Sleep = Callable[[float], Awaitable[None]]


class NotConnected(Transient):
    """No connection: the request never left."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one image. ``raw`` is None for ``error`` and ``skipped_budget``; ``empty`` is a proved absence of objects.

    ``attempts``: tries, 0 if cached. ``calls`` and ``cost_usd``: those that were or may have been billed.
    ``latency_ms``: of the last try.
    """

    status: AnswerStatus
    raw: RawDetections | None
    attempts: int = 0
    latency_ms: float = 0.0
    cost_usd: float = 0.0
    error: str | None = None
    calls: int = 0


@dataclass(frozen=True, slots=True)
class _Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(slots=True)
class _Call:
    """One image under way, and what it has cost so far."""

    key: str
    image: CanonicalImage
    attempts: int = 0
    calls: int = 0
    latency_ms: float = 0.0

    @property
    def frame(self) -> Frame:
        return Frame((self.image.width, self.image.height), self.image.original)


def limits(config: Cloud) -> Limits:
    """The governor's limits for a configuration."""
    burst = max(1, round(config.rate / 10))
    return Limits(config.rate, config.in_flight, config.max_calls, config.max_usd, burst, lease_seconds=2 * config.deadline)


class CloudClient:
    """Asks the detection API about images. Use inside one event loop, and ``aclose`` at the end.

    ``answer`` returns an ``Answer`` for everything that concerns one image, and raises what must stop the run:
    ``AuthError``, ``QuotaExhausted``, ``BudgetExhausted``, ``BadRequest``, ``CloudUnreachable``. With
    ``skip_over_budget`` a spent budget is an ``Answer`` too, so that journalled images still come through.
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
        sleep: Sleep = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._config = config
        self._query = Query(config.model, tuple(classes), config.score_min)
        self._url = _checked_url(url, config)
        self._journal = journal
        self._governor = governor
        self._adapter = adapter or ReferenceAdapter()
        self._skip_over_budget = skip_over_budget
        self._sleep, self._clock, self._uniform = sleep, clock, uniform
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._reached = False
        _token(config)
        self._http = _http_client(config, self._url, transport)

    def __repr__(self) -> str:
        return f"CloudClient({self._url.host!r}, model={self._query.model!r})"

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def check(self) -> None:
        """Ask for the service's health before any image is sent. Raises ``AuthError`` and ``CloudUnreachable``."""
        for attempt in range(1, CHECK_ATTEMPTS + 1):
            try:
                reply = await asyncio.wait_for(self._send("GET", self._adapter.capabilities.health_path), self._config.deadline)
                break
            except (NotConnected, asyncio.TimeoutError):
                if attempt == CHECK_ATTEMPTS:
                    raise self._unreachable() from None
                await self._sleep(self._backoff(attempt))
            except CloudError:
                return  # it answers, if badly: the first calls will tell
        if reply.status in (401, 402, 403) or 300 <= reply.status < 400:
            raise self._adapter.classify_error(reply.status, reply.headers, reply.body)

    async def answer(self, image: CanonicalImage) -> Answer:
        """The service's detections in one image, from the journal if it was asked before."""
        key = self.key(image)
        lock = self._locks.setdefault(key, asyncio.Lock())
        async with lock:
            known = await asyncio.to_thread(self._from_journal, key, image)
            return known or await self._ask(_Call(key, image))

    def key(self, image: CanonicalImage) -> str:
        """The journal's key, also sent as Idempotency-Key."""
        return answer_key(self._adapter.capabilities.name, self._endpoint(), self._query, self._config.max_side, image.data)

    def _endpoint(self) -> str:
        """A server started for this run has another port each time, so its name stands for it."""
        if self._config.serve != "none":
            models = ",".join(os.path.basename(m) for m in self._config.onnx_models)
            return f"{self._config.serve}:{models}"
        return f"{self._url.netloc.decode()}{self._url.path.rstrip('/')}"

    def _from_journal(self, key: str, image: CanonicalImage) -> Answer | None:
        record = self._journal.get(key)
        if record is None:
            return None
        try:
            return Answer("cached", self._decode(record, _Call(key, image)))
        except ProtocolError:
            return None

    async def _ask(self, call: _Call) -> Answer:
        """Waiting for the first place does not count towards the deadline: with many images that is queueing."""
        try:
            lease = await self._admit()
            raw = await asyncio.wait_for(self._until_answered(call, lease), self._config.deadline)
        except BudgetExhausted as error:
            if not self._skip_over_budget:
                raise
            return self._finished(call, Answer("skipped_budget", None, error=str(error)))
        except asyncio.TimeoutError:
            error_text = f"DeadlineExceeded: no answer within cloud.deadline={self._config.deadline:g} s in {call.attempts} attempts"
            return self._finished(call, Answer("error", None, error=error_text))
        except CloudError as error:
            if error.stops_run:
                raise
            return self._finished(call, Answer("error", None, error=f"{type(error).__name__}: {error}"))
        return self._finished(call, Answer("ok" if len(raw) else "empty", raw))

    def _finished(self, call: _Call, answer: Answer) -> Answer:
        cost = call.calls * self._config.usd_per_call
        return replace(answer, attempts=call.attempts, latency_ms=call.latency_ms, cost_usd=cost, calls=call.calls)

    async def _until_answered(self, call: _Call, lease: int) -> RawDetections:
        """Tries until the image is answered, may not be retried, or attempts or time run out."""
        give_up_at = self._clock() + self._config.deadline
        request = self._adapter.encode(call.image, self._query)
        body = json.dumps(request.body).encode()
        malformed = 0
        while True:
            try:
                return await self._attempt(call, request.path, body, lease)
            except CloudError as error:
                malformed += isinstance(error, ProtocolError)
                if not error.retryable and not (isinstance(error, ProtocolError) and malformed == 1):
                    raise
                if call.attempts >= self._config.attempts:
                    raise self._last(error) from None
                await self._back_off(error, call.attempts, give_up_at)
            lease = await self._admit()

    def _last(self, error: CloudError) -> CloudError:
        if isinstance(error, NotConnected) and not self._reached:
            return self._unreachable()
        return error

    async def _back_off(self, error: CloudError, attempt: int, give_up_at: float) -> None:
        """Full jitter; a Retry-After is waited out, by all workers."""
        delay = self._backoff(attempt)
        if isinstance(error, Throttled) and error.retry_after is not None:
            await self._governor.pause(error.retry_after)
            delay = error.retry_after + self._uniform(0, BACKOFF_BASE)
        if self._clock() + delay >= give_up_at:
            raise DeadlineExceeded(f"cloud.deadline={self._config.deadline:g} s leaves no time for attempt {attempt + 1} after: {error}")
        await self._sleep(delay)

    def _backoff(self, attempt: int) -> float:
        return self._uniform(0, min(BACKOFF_CAP, BACKOFF_BASE * 2 ** (attempt - 1)))

    async def _admit(self) -> int:
        """A lease from the governor, once its wait is over. Raises ``BudgetExhausted`` or ``CloudUnreachable``."""
        while True:
            grant = await self._governor.reserve(self._config.usd_per_call)
            if grant.refusal == "budget":
                raise BudgetExhausted(f"{grant.reason}; raise the limit and run again, answers so far are kept")
            if grant.refusal == "unreachable":
                raise self._unreachable(grant.reason)
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

    async def _attempt(self, call: _Call, path: str, body: bytes, lease: int) -> RawDetections:
        """One request. Unless the service surely did not bill it, it stays spent: also if it is cancelled or the process dies."""
        outcome: Outcome = "failed"
        billed = True
        call.attempts += 1
        call.calls += 1
        await asyncio.to_thread(self._journal.attempt, call.key, self._config.usd_per_call)
        try:
            raw = await self._exchange(call, path, body)
            outcome = "answered"
            return raw
        except CloudError as error:
            billed = error.may_have_billed
            outcome = _outcome(error)
            raise
        finally:
            if not billed:
                call.calls -= 1
                await asyncio.to_thread(self._journal.refund, call.key, self._config.usd_per_call)
            await self._governor.settle(lease, outcome, billed)

    async def _exchange(self, call: _Call, path: str, body: bytes) -> RawDetections:
        started = self._clock()
        reply = await self._send("POST", path, body, call.key)
        call.latency_ms = (self._clock() - started) * 1000
        if not 200 <= reply.status < 300:
            raise self._adapter.classify_error(reply.status, reply.headers, reply.body)
        content_type = reply.headers.get("content-type", "")
        record = Record(reply.body, content_type, call.attempts, call.latency_ms, call.calls * self._config.usd_per_call, time.time())
        await asyncio.to_thread(self._journal.put, call.key, record)
        return await asyncio.to_thread(self._decode, record, call)

    def _decode(self, record: Record, call: _Call) -> RawDetections:
        try:
            return self._adapter.decode({"content-type": record.content_type}, record.body, self._query, call.frame)
        except ProtocolError as error:
            self._journal.quarantine(call.key, record.body, str(error))
            raise

    async def _send(self, method: str, path: str, body: bytes | None = None, key: str = "") -> _Reply:
        """One HTTP exchange; httpx's errors become ``CloudError``. The token is cut out of whatever comes back."""
        token = _token(self._config)
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        if body is not None:
            headers |= {"Idempotency-Key": key, "Content-Type": "application/json"}
        try:
            async with self._http.stream(method, f"{str(self._url).rstrip('/')}{path}", content=body, headers=headers) as response:
                self._reached = True
                content = await _capped_body(response)
        except NOT_CONNECTED as error:
            raise NotConnected(f"no connection to {self._url.host} ({type(error).__name__})") from None
        except (httpx.DecodingError, httpx.TooManyRedirects) as error:
            raise ProtocolError(f"unreadable answer ({type(error).__name__})", may_have_billed=True) from None
        except httpx.HTTPError as error:
            raise Transient(f"the connection to {self._url.host} failed ({type(error).__name__})", may_have_billed=True) from None
        kept = {name: response.headers[name] for name in ("content-type", "retry-after", "date") if name in response.headers}
        return _Reply(response.status_code, kept, _without(content, token))

    def _unreachable(self, reason: str = "") -> CloudUnreachable:
        why = f" ({reason})" if reason else ""
        return CloudUnreachable(
            f"the detection API at {self._url.host} can't be reached{why}. Check cloud.url, that the service runs, and "
            "proxies and certificates; then run again: answers so far are kept"
        )


def _http_client(config: Cloud, url: httpx.URL, transport: httpx.AsyncBaseTransport | None) -> httpx.AsyncClient:
    """No redirects: they would carry the token elsewhere. No proxies for this machine's own addresses."""
    return httpx.AsyncClient(
        transport=transport,
        follow_redirects=False,
        trust_env=url.host not in LOOPBACK,
        headers={"User-Agent": USER_AGENT},
        timeout=httpx.Timeout(config.deadline, connect=min(CONNECT_SECONDS, config.deadline)),
        limits=httpx.Limits(max_connections=config.in_flight, max_keepalive_connections=config.in_flight),
    )


def _checked_url(url: str, config: Cloud) -> httpx.URL:
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        raise ConfigError("cloud.url is not an address") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError("cloud.url must be an address like https://detector.example.com")
    if parsed.userinfo or parsed.query:
        raise ConfigError("cloud.url must not hold a password or a query; put the token into the variable that cloud.token_env names")
    if config.token_env and parsed.scheme == "http" and parsed.host not in LOOPBACK:
        raise ConfigError("cloud.url must be https:// when a token is sent")
    return parsed


def _token(config: Cloud) -> str:
    """The secret, or an empty string if none is configured. It is read anew for each request."""
    if not config.token_env:
        return ""
    token = os.environ.get(config.token_env, "").strip()
    if not token:
        raise ConfigError(f"the environment variable {config.token_env}, named by cloud.token_env, is not set")
    if not (token.isascii() and token.isprintable()):
        raise ConfigError(f"the environment variable {config.token_env} holds characters that can't be sent in a header")
    return token


def _without(content: bytes, token: str) -> bytes:
    """A service that echoes the request must not bring the token into journals and messages."""
    return content.replace(token.encode(), b"***") if len(token) >= TOKEN_LENGTH_MIN else content


def _outcome(error: CloudError) -> Outcome:
    if isinstance(error, Throttled):
        return "throttled"
    return "failed" if isinstance(error, (Transient, DeadlineExceeded)) else "answered"


async def _capped_body(response: httpx.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > BODY_MAX:
            raise ProtocolError(f"the answer is longer than {BODY_MAX} bytes", may_have_billed=True)
    return bytes(content)
