"""What Ray logs about a loss that is handled is one line; its pages are in a file."""

from __future__ import annotations

import io
import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from coin_ray.stages.common.ray_logs import shorten_ray_logs


@pytest.fixture
def printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """What the handler of a logger named as Ray's are prints."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    logger, stream = logging.getLogger("ray_log_test"), io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    yield stream
    logger.removeHandler(handler)


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
