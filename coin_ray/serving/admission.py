"""Limits on what a server holds at once: calls, bytes of their bodies, pixels of their
images. Beyond them it answers 503 with Retry-After.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect, Request

from coin_ray.data.canonical import PIXELS_MAX
from coin_ray.serving.wire import BODY_MAX, HttpProblem

BODY_BYTES_MAX = 512 * 2**20
"""Of all calls together, as are the pixels."""
IMAGE_PIXELS_MAX = 2 * PIXELS_MAX
READ_SECONDS = 30.0
DRAIN_SECONDS = 5.0
LENGTH_DIGITS_MAX = 15
"""A declared length with more digits is too large without being parsed."""


class CapacityLimiter:
    """``limit`` units of a ``resource`` that concurrent calls share."""

    def __init__(self, resource: str, limit: int) -> None:
        self._resource, self.limit, self.used = resource, limit, 0

    def check(self, units: int) -> None:
        """Raise ``HttpProblem`` 503 if ``units`` more exceed the limit."""
        if self.used + units > self.limit:
            raise HttpProblem(
                503, f"too many {self._resource} at once", Retry_After="1"
            )

    @contextmanager
    def acquire(self, units: int) -> Iterator[None]:
        """Take ``units`` of the resource until the end of the block."""
        self.check(units)
        self.used += units
        try:
            yield
        finally:
            self.used -= units


class RequestBody:
    """A request's body, read in chunks: never more than ``limit`` bytes, never more
    than ``all_bodies`` allows for all calls together.
    """

    def __init__(
        self, request: Request, all_bodies: CapacityLimiter, limit: int = BODY_MAX
    ) -> None:
        self._request, self._all_bodies, self._limit = request, all_bodies, limit
        self._bytes_held = 0
        self.complete = False
        """Whether all of it has arrived."""

    async def read(self) -> bytes:
        """Return the whole body. Raises ``HttpProblem`` 413, 408, 400 (the client
        disconnected) and 503.
        """
        self._check_declared_length()
        body = bytearray()
        try:
            async with asyncio.timeout(READ_SECONDS):
                async for chunk in self._request.stream():
                    self._hold(len(chunk))
                    body += chunk
        except TimeoutError:
            title = "the request took too long to arrive"
            raise HttpProblem(408, title, f"{READ_SECONDS:.0f} seconds") from None
        except ClientDisconnect:
            raise HttpProblem(400, "the client disconnected") from None
        self.complete = True
        return bytes(body)

    def _check_declared_length(self) -> None:
        declared = self._request.headers.get("content-length", "0")
        if not declared.isdecimal():
            return
        if len(declared) > LENGTH_DIGITS_MAX or int(declared) > self._limit:
            raise self._too_large()

    def _hold(self, size: int) -> None:
        if self._bytes_held + size > self._limit:
            raise self._too_large()
        self._all_bodies.check(size)
        self._all_bodies.used += size
        self._bytes_held += size

    def _too_large(self) -> HttpProblem:
        detail = f"at most {self._limit} bytes"
        return HttpProblem(413, "the request is too large", detail, Connection="close")

    def release(self) -> None:
        """Give the bytes back to the limiter."""
        self._all_bodies.used -= self._bytes_held
        self._bytes_held = 0

    async def drain(self) -> None:
        """Read and discard the rest, within limits: a client that is still sending must
        be able to see why it was refused.
        """
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                bytes_left = self._limit
                async for chunk in self._request.stream():
                    bytes_left -= len(chunk)
                    if bytes_left < 0:
                        return
        except (TimeoutError, ClientDisconnect, RuntimeError):
            return
