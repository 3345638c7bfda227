"""The figures of both READMEs are those of the measured results."""

from __future__ import annotations

import re

import pytest
from pages import PAGES

METHODS = [
    "Cloud detector",
    "Cloud boxes, averaged labels",
    "Student on cloud labels alone",
    "Student",
    "Student on true labels",
]
"""Rows of ``docs/results/demo.md`` in the order of the READMEs' tables."""


def _table_rows(text: str) -> list[list[str]]:
    """Return the cells of every table row, without emphasis."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [
        [cell.strip().strip("*") for cell in line.strip("|").split("|")]
        for line in lines
    ]


def _baselines(page: str) -> dict[str, str]:
    """Return mAP50 by method from the first table of a page of results."""
    section = PAGES[f"docs/results/{page}.md"].split("\n## ")[1]
    return {row[0]: row[1] for row in _table_rows(section)}


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_table_on_the_first_screen_is_the_measured_one(page: str) -> None:
    rows = _table_rows(PAGES[page])[2:]
    measured = _baselines("demo")
    expected = [measured[method] for method in METHODS]
    assert [row[1] for row in rows[: len(METHODS)]] == expected


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_honest_line_holds_the_measured_figures_of_thermal_photos(
    page: str,
) -> None:
    text = PAGES["docs/results/students.md"].partition("<!-- table -->")[2]
    rows = _table_rows(text.partition("<!-- end of table -->")[0])
    header = rows[0]
    by_set = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    figures = [
        by_set[f"{set_name}, yolox-nano"][column]
        for set_name in ("thermal-once", "thermal-three")
        for column in ("chosen", "cloud")
    ]
    positions = [PAGES[page].find(figure) for figure in figures]
    assert -1 not in positions
    assert positions == sorted(positions)


def test_a_changed_figure_would_be_noticed() -> None:
    changed = re.sub("55.8 ± 0.5", "56.9 ± 0.5", PAGES["README.md"])
    rows = _table_rows(changed)[2:]
    assert _baselines("demo")["Student"] not in [row[1] for row in rows]
