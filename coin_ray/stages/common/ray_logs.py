"""Keep Ray's pages of traceback out of a run's log: one line for each, the whole report
in a file.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator

LINE_CHARACTERS = 300


class OneLineFilter(logging.Filter):
    """Shortens log records of several lines to the first, and appends the whole record
    to ``file``, which the line names.
    """

    def __init__(self, file: str) -> None:
        super().__init__()
        self.file = file

    def filter(self, record: logging.LogRecord) -> bool:
        """Shorten a record of Ray. It is always logged, whole if the file can't be
        written.
        """
        if not record.name.startswith("ray"):
            return True
        text = logging.Formatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s"
        ).format(record)
        if "\n" not in text.strip():
            return True
        try:
            with open(self.file, "a", encoding="utf-8") as stream:
                stream.write(f"{text}\n\n")
        except OSError:
            return True
        message = (record.getMessage().strip().splitlines() or [""])[0]
        record.msg = (
            f"{message[:LINE_CHARACTERS]} (the whole report of Ray: {self.file})"
        )
        record.args = ()
        record.exc_info = record.exc_text = record.stack_info = None
        return True


def shorten_ray_logs() -> None:
    """Filter what Ray's loggers print in this process."""
    for handler in _ray_handlers():
        _add_filter(handler)


def shorten_logger(name: str) -> None:
    """Filter what is logged by the logger of this name alone, which may have no handler
    yet.
    """
    _add_filter(logging.getLogger(name))


def _add_filter(filterer: logging.Filterer) -> None:
    file = os.path.join(tempfile.gettempdir(), f"coin-ray-{os.getpid()}-ray.log")
    if not any(isinstance(f, OneLineFilter) for f in filterer.filters):
        filterer.addFilter(OneLineFilter(file))


def _ray_handlers() -> Iterator[logging.Handler]:
    names = [name for name in logging.root.manager.loggerDict if name.startswith("ray")]
    for name in names:
        yield from logging.getLogger(name).handlers
