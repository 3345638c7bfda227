from __future__ import annotations

from typing import Any
from xml.etree import ElementTree as ET

import pytest

from coin_ray.experiments.outcome import (
    StudyRow,
    draw_rows,
    format_markdown,
    method_rows,
    variant_rows,
)


def _record(
    variant: str,
    seed: int,
    student: float | None,
    group: str = "",
    **other_methods: Any,
) -> dict[str, Any]:
    return {
        "variant": variant,
        "group": group,
        "seed": seed,
        "map50": {"student": student, **other_methods},
        "gap_closed": None,
    }


RECORDS = [
    _record("COIN", 0, 0.46),
    _record("COIN", 1, 0.48),
    _record("average", 0, 0.40, "pi"),
    _record("average", 1, 0.44, "pi"),
]


def test_rows_keep_order_and_hold_one_value_per_seed() -> None:
    assert variant_rows(RECORDS) == [
        StudyRow("COIN", "", (0.46, 0.48)),
        StudyRow("average", "pi", (0.40, 0.44)),
    ]


def test_standard_deviation_is_the_sample_s() -> None:
    row = StudyRow("COIN", "", (0.40, 0.44, 0.48))
    assert row.mean == pytest.approx(0.44)
    assert row.std == pytest.approx(0.04)
    assert row.text == "44.0 ± 4.0"


def test_one_seed_has_no_deviation_and_none_has_no_value() -> None:
    assert StudyRow("COIN", "", (0.4,)).text == "40.0"
    assert variant_rows([_record("COIN", 0, None)])[0].text == "\u2013"


def test_what_no_seed_changes_counts_once() -> None:
    rows = method_rows(
        [
            _record("COIN", seed, 0.4 + seed / 100, cloud=0.3)
            | {"gap_closed": 0.2 + seed / 10}
            for seed in range(3)
        ]
    )
    assert [(row.name, len(row.by_seed)) for row in rows] == [
        ("Cloud detector", 1),
        ("Student", 3),
        ("Gap closed", 3),
    ]


def test_markdown_compares_with_the_first_row() -> None:
    lines = format_markdown(
        variant_rows(RECORDS, {("average", "pi"): "never"})
    ).splitlines()
    assert lines[0] == "|  | group | mAP50 | vs COIN | by seed | note |"
    assert lines[3] == "| average | pi | 42.0 ± 2.8 | \u22125.0 | 40.0 / 44.0 | never |"


def test_a_share_is_compared_with_no_map50_and_groups_are_shown_only_where_there_are_any() -> (
    None
):
    rows = method_rows([_record("COIN", 0, 0.4, cloud=0.3) | {"gap_closed": 0.25}])
    header, _, cloud, student, gap = format_markdown(rows).splitlines()
    assert header == "|  | mAP50 | vs Cloud detector | by seed | note |"
    assert cloud.startswith("| Cloud detector | 30.0 |  | 30.0 |")
    assert student.startswith("| Student | 40.0 | +10.0 | 40.0 |")
    assert gap.startswith("| Gap closed | 25.0 % |  | 25.0 |")


def test_figure_is_an_svg_with_one_bar_whisker_and_seed_dots_per_row() -> None:
    tree = ET.fromstring(
        draw_rows("a < b", [*variant_rows(RECORDS), StudyRow("failed", "", ())])
    )
    tags = [element.tag.split("}")[1] for element in tree.iter()]
    assert tags.count("rect") == 1 + 2
    assert tags.count("circle") == 4
    widths = [
        float(e.attrib["width"])
        for e in tree.iter()
        if e.tag.endswith("rect")
        and "height" in e.attrib
        and e.attrib["height"] == "16"
    ]
    assert widths[0] / widths[1] == pytest.approx(0.47 / 0.42, rel=1e-3)
