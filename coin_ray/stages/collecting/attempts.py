"""Work that kills the process that does it: known by the mark it leaves behind, so that
it is not done for ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from coin_ray import storage


class Attempts:
    """Marks below ``folder`` (a URI), one for each piece of work under way."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @contextmanager
    def at(self, key: str) -> Iterator[int]:
        """While the work is done; gives how often it was begun before and came to no
        end, not even to an error.
        """
        mark = storage.join(self.folder, f"{key}.json")
        before = int(storage.read_json(mark)) if storage.exists(mark) else 0
        storage.write_json(mark, before + 1)
        try:
            yield before
        finally:
            storage.remove(mark)
