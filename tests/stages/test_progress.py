from __future__ import annotations

import pytest

from coin_ray.stages.common import progress
from coin_ray.stages.common.progress import show_progress


def test_a_log_gets_a_line_now_and_then_with_counts_note_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image a second; the first 100 were there before."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with show_progress("collect", 130) as progress_bar:
        for count in range(100, 131):
            progress_bar.update(count, f"{count} calls, $0.10")
            now[0] += 1
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "collect: 111/130 (0:00:19 left) 111 calls, $0.10",
        "collect: 122/130 (0:00:08 left) 122 calls, $0.10",
        "collect: 130/130 130 calls, $0.10",
    ]
