"""Lines of the pages fit into a window; generated results are exempt."""

from __future__ import annotations

import pytest
from pages import PAGES

MAX_CHARACTERS = 140
HAND_WRITTEN = [page for page in PAGES if not page.startswith("docs/results/")]


def _long_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if len(line) > MAX_CHARACTERS]


@pytest.mark.parametrize("page", HAND_WRITTEN)
def test_no_line_is_longer_than_the_limit(page: str) -> None:
    assert not _long_lines(PAGES[page])


def test_a_long_line_would_be_noticed() -> None:
    assert {"README.zh.md", "docs/method.md"} <= set(HAND_WRITTEN)
    table_row = "| " + "图" * 139
    assert _long_lines(f"short\n{'图' * 140}\n{table_row}\n") == [table_row]
