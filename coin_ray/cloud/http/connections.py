"""HTTP below the client: signed requests to one service's address, over connections of
its own; httpx's errors become ``CloudError``.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from urllib.request import getproxies, proxy_bypass

import httpx

from coin_ray.cloud.http.http1 import Http1Connection
from coin_ray.cloud.http.signing import Signed, Signer, redacted, without_frames
from coin_ray.cloud.protocol import PreparedRequest
from coin_ray.errors import ConfigError, ProtocolError, Transient

CONNECT_SECONDS = 10.0
BODY_MAX = 32 * 2**20
KEPT_HEADERS = (
    "content-type",
    "retry-after",
    "date",
    "x-amzn-errortype",
    "x-ratelimit-",
)
"""Beginnings of the names of headers that an adapter may need."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    "User-Agent": f"coin_ray/{version('coin-ray')}",
    "Accept": "*/*",
    "Accept-Encoding": "gzip, deflate",
}
NOT_CONNECTED = (
    httpx.ConnectError,
    httpx.ConnectTimeout,
    httpx.PoolTimeout,
    httpx.ProxyError,
    httpx.UnsupportedProtocol,
)
"""Nothing was sent, so nothing can have been billed."""


class NotConnected(Transient):
    """No connection: the request never left."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What came back: the status, those headers that an adapter may need, and the whole
    body.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class Connections:
    """HTTP connections to a service, one for each call under way; ``transport`` stands
    for all of them.

    httpx's client adds a pool, redirects, which would carry the token elsewhere, and
    cookies. Through a proxy its transport is used.
    """

    def __init__(
        self,
        url: httpx.URL,
        signer: Signer,
        deadline: float,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._url, self._signer = url, signer
        timeout = httpx.Timeout(deadline, connect=min(CONNECT_SECONDS, deadline))
        self._extensions = {"timeout": timeout.as_dict()}
        self._proxy = _proxy(url)
        self._certificates = (
            httpx.create_ssl_context()
            if transport is None and (self._proxy or url.scheme == "https")
            else None
        )
        self._transport = transport
        self._free: list[httpx.AsyncBaseTransport] = []
        self.reached = False
        """Whether the service ever answered."""
        logging.getLogger("httpcore.http11").addFilter(_is_no_answer_s_headers)

    async def send(self, request: PreparedRequest, key: str = "") -> Reply:
        """One HTTP exchange; ``key``: sent as Idempotency-Key. Secrets are cut out of
        whatever comes back.

        Raises ``NotConnected`` if nothing was sent, and ``Transient`` or
        ``ProtocolError`` if there was no readable answer.
        """
        url = self._url_of(request)
        headers = dict(request.headers)
        if request.body:
            headers["Content-Type"] = request.content_type
        if key:
            headers["Idempotency-Key"] = key
        while True:
            signed = self._signed(request, url, headers)
            response, content = await self._transferred(request, url, headers, signed)
            body = redacted(content, signed.secrets)
            kept = {
                n: redacted(v.encode(), signed.secrets).decode()
                for n, v in response.headers.items()
                if n.startswith(KEPT_HEADERS)
            }
            if not self._signer.adopt_clock(signed, response.status_code, kept, body):
                return Reply(response.status_code, {"content-type": "", **kept}, body)

    async def aclose(self) -> None:
        while self._free:
            await self._free.pop().aclose()

    def _url_of(self, request: PreparedRequest) -> httpx.URL:
        """Below the service's URL; the path of a poll comes from the service and must
        not lead elsewhere.
        """
        try:
            if request.path.startswith("/"):
                return httpx.URL(f"{str(self._url).rstrip('/')}{request.path}")
        except httpx.InvalidURL:
            pass
        raise ProtocolError(
            "the path of a request must start with / and hold no control characters",
            may_have_billed=True,
        )

    def _signed(
        self, request: PreparedRequest, url: httpx.URL, headers: Mapping[str, str]
    ) -> Signed:
        try:
            return self._signer.sign(request.method, str(url), headers, request.body)
        except Exception as error:
            failed = without_frames(error)
        raise failed

    async def _transferred(
        self,
        request: PreparedRequest,
        url: httpx.URL,
        headers: Mapping[str, str],
        signed: Signed,
    ) -> tuple[httpx.Response, bytes]:
        """The answer and its raw body. Errors come without what lies below: variables
        there hold the secret.
        """
        try:
            async with self._stream(
                request.method, url, request.body, {**headers, **signed.headers}
            ) as response:
                self.reached = True
                return response, await _capped_body(response)
        except BaseException as error:
            failed = without_frames(self._failure(error))
        raise failed

    def _failure(self, error: BaseException) -> BaseException:
        """The ``CloudError`` that one of httpx's errors stands for; others stay what
        they are.
        """
        name = type(error).__name__
        if isinstance(error, NOT_CONNECTED):
            return NotConnected(f"no connection to {self._url.host} ({name})")
        if isinstance(error, (httpx.DecodingError, httpx.TooManyRedirects)):
            return ProtocolError(f"unreadable answer ({name})", may_have_billed=True)
        if isinstance(error, httpx.HTTPError):
            return Transient(
                f"the connection to {self._url.host} failed ({name})",
                may_have_billed=True,
            )
        return error

    @asynccontextmanager
    async def _stream(
        self, method: str, url: httpx.URL, body: bytes, headers: Mapping[str, str]
    ) -> AsyncIterator[httpx.Response]:
        """The answer to one request, its body not yet read."""
        request = httpx.Request(
            method,
            url,
            headers={**HEADERS, **headers},
            content=body or None,
            extensions=self._extensions,
        )
        connection = self._free.pop() if self._free else self._new()
        try:
            response = await connection.handle_async_request(request)
            try:
                yield response
            finally:
                await response.aclose()
        finally:
            self._free.append(connection)

    def _new(self) -> httpx.AsyncBaseTransport:
        if self._transport is not None:
            return self._transport
        if self._proxy is None:
            return Http1Connection(self._certificates)
        one = httpx.Limits(max_connections=1, max_keepalive_connections=1)
        return httpx.AsyncHTTPTransport(
            verify=self._certificates or True, limits=one, proxy=self._proxy
        )


def checked_url(url: str, secret: bool) -> httpx.URL:
    """A service's address; ``secret``: whether one is sent there. Raises
    ``ConfigError``, which never shows the address.
    """
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL:
        raise ConfigError("cloud.url is not an address") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(
            "cloud.url must be an address like https://detector.example.com"
        )
    if parsed.userinfo or parsed.query:
        raise ConfigError(
            "cloud.url must not hold a password or a query; put the token into the"
            " variable that cloud.token_env names"
        )
    if secret and parsed.scheme == "http" and parsed.host not in LOOPBACK:
        raise ConfigError("cloud.url must be https:// when a token is sent")
    return parsed


def _proxy(url: httpx.URL) -> str | None:
    """What the environment names for this address; none for this machine's own."""
    if url.host in LOOPBACK or proxy_bypass(url.host):
        return None
    known = getproxies()
    proxy = known.get(url.scheme) or known.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def _is_no_answer_s_headers(record: logging.LogRecord) -> bool:
    """For httpcore's log: a service may tell the secret back in a header."""
    return not str(record.msg).startswith("receive_response_headers.complete")


async def _capped_body(response: httpx.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > BODY_MAX:
            raise ProtocolError(
                f"the answer is longer than {BODY_MAX} bytes", may_have_billed=True
            )
    return bytes(content)
