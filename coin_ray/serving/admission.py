"""What a server takes on at once: calls, bytes of their bodies, pixels of their images.
Beyond that it answers 503 with Retry-After.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect, Request

from coin_ray.data.canonical import PIXELS_MAX
from coin_ray.serving.wire import BODY_MAX, Problem

BYTES_OPEN = 512 * 2**20
PIXELS_OPEN = 2 * PIXELS_MAX
READ_SECONDS = 30.0
DRAIN_SECONDS = 5.0
DIGITS_MAX = 15
"""Of a length that is read as a number at all."""


class Room:
    """``limit`` units of something that calls share."""

    def __init__(self, what: str, limit: int) -> None:
        self._what, self.limit, self.used = what, limit, 0

    def check(self, more: int) -> None:
        """Raises ``Problem`` 503 if there is no room for ``more`` units."""
        if self.used + more > self.limit:
            raise Problem(503, f"too many {self._what} at once", Retry_After="1")

    @contextmanager
    def taken(self, units: int) -> Iterator[None]:
        """``units`` of it, given back at the end of the block."""
        self.check(units)
        self.used += units
        try:
            yield
        finally:
            self.used -= units


class Body:
    """A request's body, read in parts: never more than ``limit`` bytes, never more than
    the ``room`` that all bodies share.
    """

    def __init__(self, request: Request, room: Room, limit: int = BODY_MAX) -> None:
        self._request, self._room, self._limit = request, room, limit
        self._held = 0
        self.complete = False
        """Whether all of it has arrived."""

    async def read(self) -> bytes:
        """Raises ``Problem`` 413, 408, 400 (the client went away) and 503."""
        declared = self._request.headers.get("content-length", "0")
        if declared.isdecimal() and (
            len(declared) > DIGITS_MAX or int(declared) > self._limit
        ):
            raise self._too_large()
        parts = bytearray()
        try:
            async with asyncio.timeout(READ_SECONDS):
                async for part in self._request.stream():
                    self._hold(len(part))
                    parts += part
        except TimeoutError:
            raise Problem(
                408,
                "the request took too long to arrive",
                f"{READ_SECONDS:.0f} seconds",
            ) from None
        except ClientDisconnect:
            raise Problem(400, "the client went away") from None
        self.complete = True
        return bytes(parts)

    def _hold(self, size: int) -> None:
        if self._held + size > self._limit:
            raise self._too_large()
        self._room.check(size)
        self._room.used += size
        self._held += size

    def _too_large(self) -> Problem:
        return Problem(
            413,
            "the request is too large",
            f"at most {self._limit} bytes",
            Connection="close",
        )

    def release(self) -> None:
        """What was read is no longer kept."""
        self._room.used -= self._held
        self._held = 0

    async def drain(self) -> None:
        """Read on and forget, within bounds: a client that is still sending must be
        able to see why it was refused.
        """
        try:
            async with asyncio.timeout(DRAIN_SECONDS):
                left = self._limit
                async for part in self._request.stream():
                    left -= len(part)
                    if left < 0:
                        return
        except (TimeoutError, ClientDisconnect, RuntimeError):
            return
