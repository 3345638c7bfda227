"""The first call to a service goes alone: a wrong key, a spent quota or a refused request
then costs one request, not as many as may be under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from coin_ray.errors import CloudError


class FirstCall:
    """Lets one call go first until the service has answered it."""

    def __init__(self) -> None:
        self._is_answered = False
        self.stop_errors: list[CloudError] = []
        """Errors that stopped the run before the service had answered any call."""
        self._waiting: asyncio.Future[None] | None = None
        """Set while a call goes first, done when the others may go on."""

    @asynccontextmanager
    async def turn(self, stops_before: int) -> AsyncIterator[None]:
        """Wait for the call that goes first, if there is one, or be it. If that call ends
        with an error that stops the run, those that began before raise the same.

        ``stops_before``: length of ``stop_errors`` when the call began.
        """
        while not self._is_answered and self._waiting is not None:
            await asyncio.shield(self._waiting)
        if not self._is_answered and len(self.stop_errors) > stops_before:
            error = self.stop_errors[-1]
            raise type(error)(str(error))
        if self._is_answered:
            yield
            return
        self._waiting = asyncio.get_running_loop().create_future()
        try:
            yield
            self._is_answered = True
        except CloudError as error:
            if error.stops_run:
                self.stop_errors.append(error)
            else:  # a service in trouble is not asked one by one
                self._is_answered = True
            raise
        except TimeoutError:
            self._is_answered = True
            raise
        finally:
            self._release()

    def mark_answered(self) -> None:
        """Note that the service has answered: all calls may go."""
        self._is_answered = True
        self._release()

    def _release(self) -> None:
        waiting, self._waiting = self._waiting, None
        if waiting is not None and not waiting.done():
            waiting.set_result(None)
