"""One HTTP/1.1 connection as an httpx transport: h11 over asyncio's streams.

httpx's own transport costs more than half of the CPU of a call: a pool for the one
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

    def __init__(self, certificates: ssl.SSLContext | None) -> None:
        self._certificates = certificates
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        self._state = h11.Connection(h11.CLIENT)
        self._idle_since = 0.0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Times out after ``connect`` and after ``read`` seconds; the latter is the
        time until the head of the answer.
        """
        timeout: dict[str, float | None] = request.extensions.get("timeout", {})
        reader, writer = await self._connected(request.url, timeout.get("connect"))
        try:
            content = await request.aread()
            head = h11.Request(
                method=request.method,
                target=request.url.raw_path,
                headers=request.headers.raw,
            )
            sent = self._state.send(head) or b""
            if content:
                sent += self._state.send(h11.Data(data=content)) or b""
            writer.write(sent + (self._state.send(h11.EndOfMessage()) or b""))
            async with asyncio.timeout(timeout.get("read")):
                await writer.drain()
                response = await self._event(reader)
                while isinstance(response, h11.InformationalResponse):
                    response = await self._event(reader)
        except BaseException as error:
            self._drop()
            raise _as_httpx(error, request) from error
        assert isinstance(response, h11.Response)
        body = _Body(self, reader, request, timeout.get("read"))
        return httpx.Response(
            response.status_code,
            headers=response.headers.raw_items(),
            stream=body,
            request=request,
        )

    async def aclose(self) -> None:
        """Close the connection."""
        self._drop()

    async def body(
        self,
        reader: asyncio.StreamReader,
        request: httpx.Request,
        seconds: float | None,
    ) -> AsyncIterator[bytes]:
        """The parts of the answer's body, each within ``seconds``."""
        try:
            while True:
                async with asyncio.timeout(seconds):
                    event = await self._event(reader)
                if isinstance(event, h11.Data):
                    yield bytes(event.data)
                else:
                    return
        except (OSError, TimeoutError, h11.RemoteProtocolError) as error:
            raise _as_httpx(error, request) from error

    def finished(self) -> None:
        """The answer was read, or nobody wants the rest of it."""
        whole = (
            self._state.our_state is h11.DONE and self._state.their_state is h11.DONE
        )
        if whole and not self._state.trailing_data[0]:
            self._state.start_next_cycle()
            self._idle_since = time.monotonic()
        else:
            self._drop()

    async def _connected(
        self, url: httpx.URL, seconds: float | None
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is not None and (
            time.monotonic() - self._idle_since > IDLE_SECONDS
            or not await _silent(self._streams[0])
        ):
            self._drop()
        if self._streams is None:
            secure = (self._certificates or True) if url.scheme == "https" else None
            port = url.port or (443 if secure else 80)
            try:
                async with asyncio.timeout(seconds):
                    self._streams = await asyncio.open_connection(
                        url.raw_host.decode(), port, ssl=secure, limit=2 * READ_BYTES
                    )
            except TimeoutError as error:
                raise httpx.ConnectTimeout("no connection in time") from error
            except OSError as error:
                raise httpx.ConnectError("no connection") from error
            self._state = h11.Connection(h11.CLIENT)
        return self._streams

    async def _event(
        self, reader: asyncio.StreamReader
    ) -> h11.Event | type[h11.PAUSED]:
        while (event := self._state.next_event()) is h11.NEED_DATA:
            self._state.receive_data(await reader.read(READ_BYTES))
        if isinstance(event, h11.ConnectionClosed):
            raise h11.RemoteProtocolError("closed before an answer")
        return event  # type: ignore[return-value]

    def _drop(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None


class _Body(httpx.AsyncByteStream):
    def __init__(
        self,
        connection: Http1Connection,
        reader: asyncio.StreamReader,
        request: httpx.Request,
        seconds: float | None,
    ) -> None:
        self._connection, self._reader, self._request, self._seconds = (
            connection,
            reader,
            request,
            seconds,
        )

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for part in self._connection.body(
            self._reader, self._request, self._seconds
        ):
            yield part

    async def aclose(self) -> None:
        self._connection.finished()


async def _silent(reader: asyncio.StreamReader) -> bool:
    """Whether nothing came since the last answer: neither the end of the connection nor
    bytes, which the next request would take for its answer.
    """
    try:
        async with asyncio.timeout(0):
            await reader.read(1)
    except TimeoutError:
        return True
    except OSError:
        pass
    return False


def _as_httpx(error: BaseException, request: httpx.Request) -> BaseException:
    """httpx's error for one of the connection's; others stay what they are."""
    if isinstance(error, TimeoutError):
        return httpx.ReadTimeout("no answer in time", request=request)
    if isinstance(error, h11.LocalProtocolError):
        return httpx.LocalProtocolError(str(error), request=request)
    if isinstance(error, h11.RemoteProtocolError):
        return httpx.RemoteProtocolError(str(error), request=request)
    if isinstance(error, OSError):
        return httpx.ReadError("the connection was lost", request=request)
    return error
