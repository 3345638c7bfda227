"""HTTP below the client: signed requests to one service's address, over connections of
its own; httpx's errors become ``CloudError``.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from urllib.request import getproxies, proxy_bypass

import httpx

from coin_ray.cloud.http.http1 import (
    BODY_MAX,
    BodyTooLong,
    Http1Connection,
    RawResponse,
    encode_head,
)
from coin_ray.cloud.http.signing import (
    SignedHeaders,
    Signer,
    redact_secrets,
    without_traceback,
)
from coin_ray.cloud.protocol import PreparedRequest
from coin_ray.errors import (
    AuthError,
    CloudError,
    ConfigError,
    ProtocolError,
    Transient,
)

CONNECT_SECONDS = 10.0
PIECE_BYTES = 65_536
"""Bytes of a compressed body that are unpacked at once."""
RETURNED_HEADERS = (
    "content-type",
    "retry-after",
    "date",
    "x-amzn-errortype",
    "x-ratelimit-",
)
"""Prefixes of the names of headers that an adapter may need."""
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
    """No connection: the request was not sent."""


@dataclass(frozen=True, slots=True)
class Reply:
    """The service's response: the status, those headers that an adapter may need, and
    the whole body.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class Connections:
    """HTTP connections to a service, one for each call under way; ``transport``
    replaces all of them. ``is_own``: the run serves the cloud itself, so no proxy is
    used, whatever the address.

    httpx's client is not used: it adds a pool, redirects, which would send the token
    elsewhere, and cookies. Through a proxy its transport is used.
    """

    def __init__(
        self,
        url: httpx.URL,
        signer: Signer,
        deadline: float,
        transport: httpx.AsyncBaseTransport | None = None,
        *,
        is_own: bool = False,
    ) -> None:
        self._url = url
        self._signer = signer
        self._deadline = deadline
        self._proxy = None if is_own else _find_proxy(url)
        self._transport = transport
        self._tls_context = None
        if transport is None and (self._proxy or url.scheme == "https"):
            self._tls_context = httpx.create_ssl_context()
        host = {"Host": url.netloc.decode()}
        self._first_headers = b"".join(
            f"{name}: {text}\r\n".encode() for name, text in (host | HEADERS).items()
        )
        self._idle: list[Http1Connection] = []
        self._idle_transports: list[httpx.AsyncBaseTransport] = []
        self.reached = False
        """Whether the service ever answered."""
        logging.getLogger("httpcore.http11").addFilter(_hides_response_headers)

    @property
    def host(self) -> str:
        """Return the service's host name."""
        return self._url.host

    async def send(self, request: PreparedRequest, key: str = "") -> Reply:
        """Return the response to one request, with secrets removed; ``key``: sent as
        Idempotency-Key.

        Raises ``NotConnected`` if nothing was sent, and ``Transient`` or
        ``ProtocolError`` if there was no readable answer.
        """
        url = self._request_url(request)
        headers = dict(request.headers)
        if request.body:
            headers["Content-Type"] = request.content_type
        if key:
            headers["Idempotency-Key"] = key
        while True:
            signed = self._sign(request, url, headers)
            response = await self._transfer(request, url, headers, signed)
            status, raw_headers, content = response
            body = redact_secrets(content, signed.secrets)
            returned_headers = {
                name: redact_secrets(text.encode(), signed.secrets).decode()
                for name, text in _decode_headers(raw_headers).items()
                if name.startswith(RETURNED_HEADERS)
            }
            if not self._signer.adopt_clock(signed, status, returned_headers, body):
                return Reply(status, {"content-type": "", **returned_headers}, body)

    def explain_refusal(self, error: CloudError) -> None:
        """Add to an ``AuthError`` where its key comes from, once."""
        source = self._signer.describe_source()
        if isinstance(error, AuthError) and source not in str(error):
            error.args = (f"{error}. {source}",)

    async def aclose(self) -> None:
        """Close the idle connections."""
        while self._idle:
            self._idle.pop().close()
        while self._idle_transports:
            await self._idle_transports.pop().aclose()

    def _request_url(self, request: PreparedRequest) -> httpx.URL:
        """Return the request's URL, below the service's: the path of a poll comes from
        the service and must not lead to another host.
        """
        try:
            if request.path.startswith("/"):
                return _join_url(self._url, request.path)
        except httpx.InvalidURL:
            pass
        raise ProtocolError(
            "the path of a request must start with / and hold no control characters",
            may_have_billed=True,
        )

    def _sign(
        self, request: PreparedRequest, url: httpx.URL, headers: Mapping[str, str]
    ) -> SignedHeaders:
        try:
            return self._signer.sign(request.method, str(url), headers, request.body)
        except Exception as error:
            failure = without_traceback(error)
        raise failure

    async def _transfer(
        self,
        request: PreparedRequest,
        url: httpx.URL,
        headers: Mapping[str, str],
        signed: SignedHeaders,
    ) -> RawResponse:
        """Return the response, its body unpacked. Errors are raised without the frames
        below: variables there hold the secret.
        """
        try:
            is_direct = self._transport is None and self._proxy is None
            send = self._send_directly if is_direct else self._send_by_httpx
            if signed.body is not None:
                request = replace(request, body=signed.body)
            response = await send(request, url, {**headers, **signed.headers})
            self.reached = True
            return response
        except BaseException as error:
            failure = without_traceback(self._convert_error(error))
        raise failure

    def _convert_error(self, error: BaseException) -> BaseException:
        """Return the ``CloudError`` that one of httpx's errors stands for, or another
        error unchanged.
        """
        name = type(error).__name__
        if isinstance(error, BodyTooLong):
            return ProtocolError(str(error), may_have_billed=True)
        if isinstance(error, NOT_CONNECTED):
            return NotConnected(f"no connection to {self.host} ({name})")
        if isinstance(error, (httpx.DecodingError, httpx.TooManyRedirects)):
            return ProtocolError(f"unreadable answer ({name})", may_have_billed=True)
        if isinstance(error, httpx.HTTPError):
            return Transient(
                f"the connection to {self.host} failed ({name})", may_have_billed=True
            )
        return error

    async def _send_directly(
        self, request: PreparedRequest, url: httpx.URL, headers: Mapping[str, str]
    ) -> RawResponse:
        if request.method == "POST" or request.body:
            headers = {**headers, "Content-Length": str(len(request.body))}
        head = encode_head(request.method, url.raw_path, headers, self._first_headers)
        connection = self._idle.pop() if self._idle else self._new_connection()
        connect_seconds = min(CONNECT_SECONDS, self._deadline)
        try:
            response = await connection.send(
                url, head, request.body, connect_seconds, self._deadline
            )
        finally:
            self._idle.append(connection)
        if any(name == b"content-encoding" for name, _ in response.headers):
            return response._replace(body=await _unpack(response))
        return response

    def _new_connection(self) -> Http1Connection:
        return Http1Connection(self._tls_context)

    async def _send_by_httpx(
        self, request: PreparedRequest, url: httpx.URL, headers: Mapping[str, str]
    ) -> RawResponse:
        timeout = httpx.Timeout(
            self._deadline, connect=min(CONNECT_SECONDS, self._deadline)
        )
        httpx_request = httpx.Request(
            request.method,
            url,
            headers={**HEADERS, **headers},
            content=request.body or None,
            extensions={"timeout": timeout.as_dict()},
        )
        transport = self._idle_transports.pop() if self._idle_transports else None
        if transport is None:
            transport = self._new_transport()
        try:
            response = await transport.handle_async_request(httpx_request)
            self.reached = True
            try:
                body = await _read_body(response)
            finally:
                await response.aclose()
        finally:
            self._idle_transports.append(transport)
        raw_headers = [(name.lower(), text) for name, text in response.headers.raw]
        return RawResponse(response.status_code, raw_headers, body)

    def _new_transport(self) -> httpx.AsyncBaseTransport:
        if self._transport is not None:
            return self._transport
        single = httpx.Limits(max_connections=1, max_keepalive_connections=1)
        return httpx.AsyncHTTPTransport(
            verify=self._tls_context or True, limits=single, proxy=self._proxy
        )


@lru_cache(maxsize=64)
def _join_url(url: httpx.URL, path: str) -> httpx.URL:
    return httpx.URL(f"{str(url).rstrip('/')}{path}")


def _decode_headers(raw_headers: list[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return the headers as text; those of one name are joined."""
    headers: dict[str, str] = {}
    for raw_name, raw_text in raw_headers:
        name, text = raw_name.decode("latin-1"), raw_text.decode("latin-1")
        headers[name] = f"{headers[name]}, {text}" if name in headers else text
    return headers


def parse_service_url(url: str, sends_secret: bool) -> httpx.URL:
    """Return a service's address. Raises ``ConfigError``, which never contains the
    address.
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
    if sends_secret and parsed.scheme == "http" and parsed.host not in LOOPBACK:
        raise ConfigError("cloud.url must be https:// when a token is sent")
    return parsed


def _find_proxy(url: httpx.URL) -> str | None:
    """Return the proxy that the environment names for this address; none for this
    machine's own.
    """
    if url.host in LOOPBACK or proxy_bypass(url.host):
        return None
    proxies = getproxies()
    proxy = proxies.get(url.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def _hides_response_headers(record: logging.LogRecord) -> bool:
    """Filter httpcore's log: a service may return the secret in a header."""
    return not str(record.msg).startswith("receive_response_headers.complete")


async def _unpack(response: RawResponse) -> bytes:
    """Return the body without its content encoding."""

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, len(response.body), PIECE_BYTES):
            yield response.body[start : start + PIECE_BYTES]

    return await _read_body(
        httpx.Response(response.status, headers=response.headers, content=pieces())
    )


async def _read_body(response: httpx.Response) -> bytes:
    content = bytearray()
    async for chunk in response.aiter_bytes():
        content += chunk
        if len(content) > BODY_MAX:
            raise ProtocolError(
                f"the answer is longer than {BODY_MAX} bytes", may_have_billed=True
            )
    return bytes(content)
