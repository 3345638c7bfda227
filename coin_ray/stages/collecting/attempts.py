"""Work that kills its process: the mark that it leaves limits how often it is begun."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from coin_ray import storage


class Attempts:
    """Marks below ``folder`` (a URI), one for each piece of work under way."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    @contextmanager
    def begin(self, key: str) -> Iterator[int]:
        """Mark the work as begun while the ``with`` block runs. Yield how often it was
        begun before without an end, not even by an error.
        """
        mark = storage.join(self.folder, f"{key}.json")
        unfinished = int(storage.read_json(mark)) if storage.exists(mark) else 0
        storage.write_json(mark, unfinished + 1)
        try:
            yield unfinished
        finally:
            storage.remove(mark)
