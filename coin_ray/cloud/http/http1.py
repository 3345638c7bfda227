"""One HTTP/1.1 connection on asyncio, its responses parsed by httptools (llhttp).

httpx's transport needs six times the CPU for a call: a pool for the one connection,
locks and deadlines for two kinds of event loops, a parser in Python. This one speaks
HTTP/1.1 without proxies, for one request at a time. Errors are httpx's.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Mapping
from typing import NamedTuple, cast

import httptools
import httpx

HEAD_MAX = 65_536
"""Bytes of a response's head, at most."""
BODY_MAX = 32 * 2**20
"""Bytes of a response's body, at most."""
IDLE_SECONDS = 5.0
"""A connection that was idle for longer is not used again: the server may be closing
it."""


class BodyTooLong(httpx.RemoteProtocolError):
    """The response's body has more than ``BODY_MAX`` bytes."""


class RawResponse(NamedTuple):
    """A whole response; names of headers are in lower case, the body is as sent."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


class Http1Connection:
    """A connection to one address, opened when it is first needed and again after it
    was lost.
    """

    def __init__(self, tls_context: ssl.SSLContext | None) -> None:
        self._tls_context = tls_context
        self._stream: _ResponseStream | None = None
        self._idle_since = 0.0

    async def send(
        self,
        url: httpx.URL,
        head: bytes,
        body: bytes,
        connect_seconds: float,
        read_seconds: float,
    ) -> RawResponse:
        """Send a request to the URL's host; return the whole response.

        ``head``: the request's lines with the empty line after them
        (``encode_head``). Times out after ``connect_seconds``, and ``read_seconds``
        after the request was sent.
        """
        stream = await self._connect(url, connect_seconds)
        try:
            async with asyncio.timeout(read_seconds):
                response = await stream.exchange(head, body)
        except TimeoutError:
            self._abort()
            raise httpx.ReadTimeout("no answer in time") from None
        except BaseException:
            self._abort()
            raise
        if stream.can_be_kept:
            self._idle_since = time.monotonic()
        else:
            self._abort()
        return response

    def close(self) -> None:
        """Close the connection."""
        self._abort()

    async def _connect(self, url: httpx.URL, seconds: float) -> _ResponseStream:
        """Return the open connection if it can be used again, or a new one."""
        if self._stream is not None:
            idle_seconds = time.monotonic() - self._idle_since
            if idle_seconds > IDLE_SECONDS or not self._stream.is_open:
                self._abort()
        if self._stream is None:
            tls = (self._tls_context or True) if url.scheme == "https" else None
            port = url.port or (443 if tls else 80)
            host = url.raw_host.decode()
            try:
                async with asyncio.timeout(seconds):
                    loop = asyncio.get_running_loop()
                    _, self._stream = await loop.create_connection(
                        _ResponseStream, host, port, ssl=tls
                    )
            except TimeoutError as error:
                raise httpx.ConnectTimeout("no connection in time") from error
            except OSError as error:
                raise httpx.ConnectError("no connection") from error
        return self._stream

    def _abort(self) -> None:
        if self._stream is not None:
            self._stream.abort()
            self._stream = None


def encode_head(
    method: str, target: bytes, headers: Mapping[str, str], prefix: bytes = b""
) -> bytes:
    """Return a request's first line and headers. ``prefix``: encoded headers that come
    first. Raises LocalProtocolError for what a header can't hold.
    """
    for name, text in headers.items():
        if not (text.isascii() and text.isprintable() and name.isascii()):
            raise httpx.LocalProtocolError("a header holds characters it must not")
    lines = "".join(f"{name}: {text}\r\n" for name, text in headers.items())
    return b"%b %b HTTP/1.1\r\n%b%b\r\n" % (
        method.encode(),
        target,
        prefix,
        lines.encode(),
    )


class _ResponseStream(asyncio.Protocol):
    """Bytes of one TCP connection, parsed to the response of the request under way."""

    _transport: asyncio.Transport

    def __init__(self) -> None:
        self._whole: asyncio.Future[RawResponse] | None = None
        """Done with the response; None between requests."""
        self.is_open = True
        self.can_be_kept = False
        """Whether the response ended where the connection can be used again."""

    async def exchange(self, head: bytes, body: bytes) -> RawResponse:
        """Send a request and return its response."""
        self._parser = httptools.HttpResponseParser(self)
        self._headers: list[tuple[bytes, bytes]] = []
        self._body: list[bytes] = []
        self._head_bytes = self._body_bytes = 0
        self._status = 0
        self.can_be_kept = False
        whole: asyncio.Future[RawResponse] = asyncio.get_running_loop().create_future()
        self._whole = whole
        self._transport.writelines([head, body])
        return await whole

    def abort(self) -> None:
        """Close the connection at once."""
        self.is_open = False
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's is none

    def data_received(self, received: bytes) -> None:
        if self._is_between_requests():
            # nobody asked: it must not be read as the response to the next request
            self.abort()
            return
        if not self._status:
            self._head_bytes += len(received)
        try:
            self._parser.feed_data(received)
        except httptools.HttpParserError as error:
            self.can_be_kept = False
            self._fail(httpx.RemoteProtocolError(f"no HTTP response ({error})"))
        if self._head_bytes > HEAD_MAX and not self._status:
            self._fail(
                httpx.RemoteProtocolError("the head of the response is too long")
            )

    def eof_received(self) -> None:
        if self._status and not self._has_length():
            self._finish()
        self._fail(httpx.RemoteProtocolError("closed before an answer"))

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        if error is not None:
            self._fail(httpx.ReadError("the connection was lost"))
        self._fail(httpx.RemoteProtocolError("closed before an answer"))

    def on_message_begin(self) -> None:
        if self._is_between_requests():
            self.can_be_kept = False  # a second response to one request

    def on_header(self, name: bytes, text: bytes) -> None:
        self._headers.append((name.lower(), text))

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status >= 200:
            self._status = status
        else:  # "continue" and the like: the response is still to come
            self._headers = []

    def on_body(self, part: bytes) -> None:
        self._body.append(part)
        self._body_bytes += len(part)
        if self._body_bytes > BODY_MAX:
            self._fail(BodyTooLong(f"the answer is longer than {BODY_MAX} bytes"))

    def on_message_complete(self) -> None:
        if self._status and not self._is_between_requests():
            self.can_be_kept = self._parser.should_keep_alive()
            self._finish()

    def _has_length(self) -> bool:
        """Return whether the headers say where the body ends."""
        names = [name for name, _ in self._headers]
        return b"content-length" in names or b"transfer-encoding" in names

    def _is_between_requests(self) -> bool:
        return self._whole is None or self._whole.done()

    def _finish(self) -> None:
        if self._whole is not None and not self._whole.done():
            body = b"".join(self._body)
            self._whole.set_result(RawResponse(self._status, self._headers, body))

    def _fail(self, error: Exception) -> None:
        if self._whole is not None and not self._whole.done():
            self._whole.set_exception(error)
