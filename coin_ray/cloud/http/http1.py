"""One HTTP/1.1 connection as an httpx transport: h11 over asyncio's streams.

httpx's own transport needs a quarter more CPU for a call: a pool for the one
connection, locks and deadlines for two kinds of event loops. This one speaks HTTP/1.1
without proxies, for one request at a time.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import AsyncIterator

import h11
import httpx

READ_BYTES = 65_536
IDLE_SECONDS = 5.0
"""A connection that was idle for longer is not used again: the server may be closing
it."""


class Http1Connection(httpx.AsyncBaseTransport):
    """A connection to one address, opened when it is first needed and again after it
    was lost. Errors are httpx's.
    """

    def __init__(self, tls_context: ssl.SSLContext | None) -> None:
        self._tls_context = tls_context
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._protocol = h11.Connection(h11.CLIENT)
        self._idle_since = 0.0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request; return the response with its body not yet read.

        Times out after ``connect`` and after ``read`` seconds; the latter is the time
        until the head of the response.
        """
        timeouts: dict[str, float | None] = request.extensions.get("timeout", {})
        reader, writer = await self._connect(request.url, timeouts.get("connect"))
        try:
            writer.write(self._encode_request(request, await request.aread()))
            async with asyncio.timeout(timeouts.get("read")):
                await writer.drain()
                head = await self._next_event(reader)
                while isinstance(head, h11.InformationalResponse):
                    head = await self._next_event(reader)
        except BaseException as error:
            self._abort()
            raise _convert_to_httpx(error, request) from error
        assert isinstance(head, h11.Response)
        return httpx.Response(
            head.status_code,
            headers=head.headers.raw_items(),
            stream=_ResponseBody(self, reader, request, timeouts.get("read")),
            request=request,
        )

    async def aclose(self) -> None:
        """Close the connection."""
        self._abort()

    async def read_body(
        self,
        reader: asyncio.StreamReader,
        request: httpx.Request,
        seconds: float | None,
    ) -> AsyncIterator[bytes]:
        """Yield the parts of the response's body, each within ``seconds``."""
        try:
            while True:
                async with asyncio.timeout(seconds):
                    event = await self._next_event(reader)
                if not isinstance(event, h11.Data):
                    return
                yield bytes(event.data)
        except (OSError, TimeoutError, h11.RemoteProtocolError) as error:
            raise _convert_to_httpx(error, request) from error

    def finish_response(self) -> None:
        """Keep the connection for the next request if the response was read to its end,
        close it otherwise.
        """
        is_complete = (
            self._protocol.our_state is h11.DONE
            and self._protocol.their_state is h11.DONE
        )
        if is_complete and not self._protocol.trailing_data[0]:
            self._protocol.start_next_cycle()
            self._idle_since = time.monotonic()
        else:
            self._abort()

    async def _connect(
        self, url: httpx.URL, seconds: float | None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return the streams of the open connection if it can be used again, or of a
        new one.
        """
        if self._streams is not None:
            idle_seconds = time.monotonic() - self._idle_since
            if idle_seconds > IDLE_SECONDS or not await _is_silent(self._streams[0]):
                self._abort()
        if self._streams is None:
            tls = (self._tls_context or True) if url.scheme == "https" else None
            port = url.port or (443 if tls else 80)
            host = url.raw_host.decode()
            try:
                async with asyncio.timeout(seconds):
                    self._streams = await asyncio.open_connection(
                        host, port, ssl=tls, limit=2 * READ_BYTES
                    )
            except TimeoutError as error:
                raise httpx.ConnectTimeout("no connection in time") from error
            except OSError as error:
                raise httpx.ConnectError("no connection") from error
            self._protocol = h11.Connection(h11.CLIENT)
        return self._streams

    def _encode_request(self, request: httpx.Request, body: bytes) -> bytes:
        head = h11.Request(
            method=request.method,
            target=request.url.raw_path,
            headers=request.headers.raw,
        )
        encoded = self._protocol.send(head) or b""
        if body:
            encoded += self._protocol.send(h11.Data(data=body)) or b""
        return encoded + (self._protocol.send(h11.EndOfMessage()) or b"")

    async def _next_event(
        self, reader: asyncio.StreamReader
    ) -> h11.Event | type[h11.PAUSED]:
        event = self._protocol.next_event()
        while event is h11.NEED_DATA:
            self._protocol.receive_data(await reader.read(READ_BYTES))
            event = self._protocol.next_event()
        if isinstance(event, h11.ConnectionClosed):
            raise h11.RemoteProtocolError("closed before an answer")
        return event  # type: ignore[return-value]

    def _abort(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


class _ResponseBody(httpx.AsyncByteStream):
    def __init__(
        self,
        connection: Http1Connection,
        reader: asyncio.StreamReader,
        request: httpx.Request,
        seconds: float | None,
    ) -> None:
        self._connection = connection
        self._reader = reader
        self._request = request
        self._seconds = seconds

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._connection.read_body(
            self._reader, self._request, self._seconds
        ):
            yield part

    async def aclose(self) -> None:
        self._connection.finish_response()


async def _is_silent(reader: asyncio.StreamReader) -> bool:
    """Return whether nothing came since the last response: neither the end of the
    connection nor bytes, which would be read as the response to the next request.
    """
    try:
        async with asyncio.timeout(0):
            await reader.read(1)
    except TimeoutError:
        return True
    except OSError:
        pass
    return False


def _convert_to_httpx(error: BaseException, request: httpx.Request) -> BaseException:
    """Return httpx's error for one of the connection's, or another error unchanged."""
    if isinstance(error, TimeoutError):
        return httpx.ReadTimeout("no answer in time", request=request)
    if isinstance(error, h11.LocalProtocolError):
        return httpx.LocalProtocolError(str(error), request=request)
    if isinstance(error, h11.RemoteProtocolError):
        return httpx.RemoteProtocolError(str(error), request=request)
    if isinstance(error, OSError):
        return httpx.ReadError("the connection was lost", request=request)
    return error
