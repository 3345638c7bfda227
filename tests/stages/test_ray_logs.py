"""What Ray logs about a loss that is handled is one line; its pages are in a file."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from coin_ray.stages.common.ray_logs import (
    OneLineFilter,
    _ray_handlers,
    shorten_ray_logs,
)


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the handler of a logger named as Ray's are prints."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    logger, stream = logging.getLogger("ray_log_test"), io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    filters_before = {id(h): list(h.filters) for h in _ray_handlers()}
    yield stream
    for changed in _ray_handlers():
        changed.filters = filters_before[id(changed)]
    logger.removeHandler(handler)


def make_record(name: str) -> logging.LogRecord:
    message = "first line\nsecond line"
    return logging.LogRecord(name, logging.ERROR, "x.py", 1, message, None, None)


@pytest.mark.parametrize(
    ("name", "file"),
    [("ray.data", "no/such/folder/x.log"), ("coin_ray.serving", "x.log")],
)
def test_other_records_and_those_that_no_file_takes_stay_whole(
    name: str, file: str, tmp_path: Path
) -> None:
    record = make_record(name)
    assert OneLineFilter(str(tmp_path / file)).filter(record)
    assert record.getMessage() == "first line\nsecond line"
    assert not list(tmp_path.iterdir())


def test_a_traceback_is_one_line_that_names_the_file(
    printed: io.StringIO, tmp_path: Path
) -> None:
    for _ in range(2):
        shorten_ray_logs()
    logger = logging.getLogger("ray_log_test.data")
    try:
        raise ConnectionError("the actor died")
    except ConnectionError:
        logger.exception("A task of %s failed, trying again", "MapBatches")
    logger.error("first line\nsecond line")
    logger.error("an ordinary line")
    (report,) = tmp_path.iterdir()
    assert printed.getvalue().splitlines() == [
        f"A task of MapBatches failed, trying again (the whole report of Ray: {report})",
        f"first line (the whole report of Ray: {report})",
        "an ordinary line",
    ]
    text = report.read_text()
    assert "ConnectionError: the actor died" in text
    assert "second line" in text
    assert "ordinary" not in text
    assert text.count("Traceback") == 1
