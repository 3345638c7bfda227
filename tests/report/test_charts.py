from __future__ import annotations

import math

import pytest

from coin_ray.report.charts import (
    build_class_bars,
    change_verdict,
    plot_precision_recall,
    plot_reliability,
    plot_shares,
    plot_stacked_shares,
    plot_training_curves,
    stack_segments,
)
from coin_ray.report.methods import MINUS
from coin_ray.report.teachers import confusion_table, split_curves

CURVES = [
    (run, step, "roi_class", 1 / (step + 1))
    for run in ("distill", "propagate")
    for step in range(500)
]


def test_curves_are_thinned_ordered_and_finite() -> None:
    rows = [
        *CURVES,
        ("propagate", 3, "roi_class", math.nan),
        ("propagate", 0, "single point", 1.0),
        ("zoo", 0, "x", 0.0),
        ("zoo", 9, "x", 0.0),
    ]
    runs = plot_training_curves(rows)
    assert [run.name for run in runs] == ["propagate", "distill", "zoo"]
    assert [panel.title for panel in runs[0].panels] == ["roi_class"]
    assert runs[0].panels[0].lines[0].path.count("L") < 250
    assert (runs[0].panels[0].first, runs[0].panels[0].last) == ("0", "step 499")


def test_stacked_segments_fill_the_bar() -> None:
    segments = stack_segments({"consistent": 1, "inconsistent": 0, "private": 3})
    assert [(s.start, s.width) for s in segments] == [(0, 25), (25, 0), (25, 75)]


def test_classes_are_ordered_by_the_student_s_loss() -> None:
    per_class = {
        "cloud": [0.2, 0.4, math.nan],
        "student": [0.5, 0.31, 0.2],
        "oracle": [1.0, 1.0, 1.0],
    }
    rows = build_class_bars(
        ["bird", "car", "cat"],
        per_class,
        ("cloud", "student"),
        [3, 5, 0],
        [[0.1, 0.5], [-0.2, 0.02], [None, None]],
    )
    assert [(r.name, r.objects, r.change, r.interval, r.sure) for r in rows] == [
        ("car", 5, f"{MINUS}9.0", f"{MINUS}20.0 to +2.0", ""),
        ("bird", 3, "+30.0", "+10.0 to +50.0", "better"),
        ("cat", 0, "", "", ""),
    ]
    assert [(b.method.key, b.width) for b in rows[0].bars] == [
        ("cloud", 40),
        ("student", 31),
    ]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.1, 0.2, "better"),
        (-0.2, -0.1, "worse"),
        (-0.1, 0.1, ""),
        (0.0, 0.2, ""),
        (-0.1, 0.0, ""),
        (None, None, ""),
    ],
)
def test_a_change_has_a_verdict_if_its_interval_excludes_zero(
    low: float | None, high: float | None, expected: str
) -> None:
    assert change_verdict(low, high) == expected


def test_kinds_are_stacked_as_shares_of_their_sum() -> None:
    rows = {
        "a": [(0, 1.0), (20, 3.0), (40, 0.0)],
        "b": [(0, 3.0), (20, 1.0), (40, 0.0)],
    }
    plot = plot_stacked_shares(rows, {"a": ("A", "x"), "b": ("B", "y")}, "", "")
    assert plot is not None
    assert [line.path for line in plot.lines] == [
        "M0.00 75.00L100.00 25.00",
        "M0.00 0.00L100.00 0.00",
    ]
    assert plot.lines[1].area == "M0.00 0.00L100.00 0.00L100.00 25.00L0.00 75.00Z"
    assert plot.last == "step 20"  # a batch without any box has no shares
    assert (
        plot_stacked_shares(
            {"a": rows["a"]}, {"a": ("A", "x"), "b": ("B", "y")}, "", ""
        )
        is None
    )


def test_shares_need_every_line() -> None:
    rows = {"a": [(0, 0.0), (20, 1.0)], "b": [(0, 0.5), (20, 0.25)]}
    plot = plot_shares(rows, {"a": ("A", "x"), "b": ("B", "y")}, "", "")
    assert plot is not None
    assert [line.path for line in plot.lines] == [
        "M0.00 100.00L100.00 0.00",
        "M0.00 50.00L100.00 75.00",
    ]
    assert (
        plot_shares(rows | {"b": []}, {"a": ("A", "x"), "b": ("B", "y")}, "", "")
        is None
    )


def test_diagnostics_are_separated_from_losses() -> None:
    logged = {
        "count_consistent": 3.0,
        "count_inconsistent": 1.0,
        "count_private": 0.0,
        "ckg_cloud": 0.5,
        "ckg_clip": 0.25,
        "ckg_neither": 0.25,
        "ckg_gradient": 1.0,
        "gradient_angle": 80.0,
    }
    rows = [
        ("distill", step, metric, figure)
        for step in (0, 20)
        for metric, figure in logged.items()
    ]
    losses, plots = split_curves(rows)
    assert {metric for _, _, metric, _ in losses} == {"ckg_gradient"}
    assert [plot.title for plot in plots] == [
        "Regions by kind",
        "Which teacher CKG agrees with",
        "Angle between the gradients of consistent and inconsistent regions, degrees",
    ]
    assert split_curves(CURVES) == (CURVES, [])


def test_precision_recall_is_drawn_for_methods_that_have_it() -> None:
    plot = plot_precision_recall(
        {"student": [1.0, 0.5, 0.0], "cloud": [math.nan] * 3, "oracle": [1.0] * 3},
        ("cloud", "student"),
        "car",
    )
    assert plot is not None
    assert [(line.name, line.path) for line in plot.lines] == [
        ("Student", "M0.00 0.00L50.00 50.00L100.00 100.00")
    ]
    assert plot_precision_recall({}, ("cloud",), "car") is None


def test_reliability_dots_grow_with_their_count() -> None:
    plot = plot_reliability(
        [
            {"confidence": 0.3, "right": 0.2, "count": 1},
            {"confidence": 0.9, "right": 0.6, "count": 4},
        ],
        "CLIP",
        "clip",
        0.25,
    )
    assert plot is not None
    assert (plot.diagonal, plot.final) == (True, "25.0")
    assert plot.lines[0].dots == ((30.0, 80.0, 8.0), (90.0, 40.0, 12.0))


def test_confusion_is_a_matrix_of_classes_that_occur() -> None:
    table = confusion_table([[3, 1, 0], [0, 0, 0], [0, 0, 0]], ["car", "dog"])
    assert table is not None
    assert (table.names, table.agreed) == (("car", "dog"), "75 %")
    assert [(c.count, c.share, c.same) for c in table.rows[0][1]] == [
        (3, 75.0, True),
        (1, 25.0, False),
    ]
    assert confusion_table([[0, 0], [0, 0]], ["car"]) is None


def test_with_many_classes_the_most_frequent_disagreements_are_listed() -> None:
    names = [f"class {i}" for i in range(30)]
    counts = [[0] * 31 for _ in range(31)]
    counts[4][30], counts[2][7], counts[5][5] = 9, 4, 7
    table = confusion_table(counts, names)
    assert table is not None
    assert (table.rows, table.agreed) == ((), "35 %")
    assert table.listed == (("class 4", "background", 9), ("class 2", "class 7", 4))
