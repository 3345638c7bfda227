from __future__ import annotations

import io
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from coin_ray.report.gallery import Box, GalleryImage
from coin_ray.report.methods import MINUS, format_change, format_duration, format_points
from coin_ray.report.page import PageFigures, build_page
from coin_ray.report.run_summary import RunSummary
from coin_ray.report.table import print_summary

VOID = {"meta", "img", "input", "br", "hr", "link"}


class TagChecker(HTMLParser):
    """Checks that tags nest, and collects tags, attributes and text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data


def _parse(page: str) -> TagChecker:
    checker = TagChecker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def make_summary(**changes: Any) -> RunSummary:
    figures: dict[str, Any] = {
        "preset": "demo",
        "seed": 0,
        "classes": ["bird", "car"],
        "map50": {
            "cloud": 0.328,
            "clip_labels": 0.375,
            "static_fusion": 0.434,
            "clip_detector": 0.369,
            "student": 0.405,
            "pseudo_label": 0.342,
            "oracle": 0.623,
        },
        "gap_closed": 0.261,
        "separation": {"consistent": 729, "inconsistent": 670, "private": 1362},
        "calls": {"made": 1000, "cached": 24, "failed": 3, "cost_usd": 1.5},
        "seconds": {
            "collect": 31.2,
            "propagate": 214.8,
            "distill": 402.5,
            "total": 673.0,
        },
        "versions": {"coin_ray": "0.1.0"},
    }
    return RunSummary.from_json(figures | changes)


def picture(name: str = "a.jpg", label: str = "bird") -> GalleryImage:
    stream = io.BytesIO()
    Image.new("RGB", (64, 48)).save(stream, "JPEG")
    box = Box((1, 2, 30, 40), label, 0.875)
    layers = {
        "truth": [Box(box.xyxy, label)],
        "cloud": [box],
        "student": [box],
        "separation": [Box(box.xyxy, label, 0.5, "private")],
    }
    return GalleryImage(stream.getvalue(), 64, 48, name, layers)


PER_CLASS = {
    "cloud": [0.2, 0.4],
    "clip_detector": [0.3, math.nan],
    "student": [0.5, 0.31],
}
CURVES = [
    (run, step, "roi_class", 1 / (step + 1))
    for run in ("distill", "propagate")
    for step in range(500)
]


def _full_page(**changes: Any) -> str:
    return build_page(
        make_summary(**({"per_class": PER_CLASS} | changes)),
        CURVES,
        [picture()],
        "preset: demo\n",
        "coin-ray demo",
    )


def test_the_page_shows_all_figures() -> None:
    text = " ".join(
        _parse(_full_page(map50_unknown={"cloud": 0.158, "student": 0.19})).text.split()
    )
    expected = (
        "scores 7.7 points above|40.5|32.8|+7.7|26 %|62.3|15.8|known to neither"
        " teacher|consistent 729 (26 %)|11 min 13 s|1,000"
    )
    for phrase in [
        *expected.split("|"),
        "$1.50",
        "bird .88",
        "roi_class",
        "preset: demo",
        "coin-ray demo",
        "Averaging both teachers",
    ]:
        assert phrase in text, phrase


def test_the_page_opens_without_network() -> None:
    page = _full_page()
    without_images = re.sub(r"base64,[^\"]*", "", page)
    assert not re.search(r"https?:|[\"'(]//", without_images)
    assert "@import" not in page
    for tag, attributes in _parse(page).tags:
        assert tag != "link"
        assert tag != "script" or "src" not in attributes
        assert tag != "img" or (attributes["src"] or "").startswith(
            "data:image/jpeg;base64,"
        )


def test_text_of_users_is_escaped() -> None:
    evil = '"><script>alert(1)</script>'
    summary = make_summary(
        classes=[evil, "car"],
        preset=evil,
        versions={evil: evil},
        seconds={evil: 3.0, "total": 3.0},
        per_class=PER_CLASS,
    )
    figures = PageFigures(
        confusion=[[1, 2, 0], [0, 3, 0], [0, 0, 0]],
        class_curves={"student": [[1.0, 0.0], [1.0, 0.5]]},
    )
    page = build_page(
        summary,
        [(evil, s, evil, 1.0) for s in range(3)],
        [picture(evil, evil)],
        evil,
        evil,
        figures,
    )
    assert "<script>alert" not in page
    assert sum(tag == "script" for tag, _ in _parse(page).tags) == 1


def test_checkboxes_switch_layers() -> None:
    tags = _parse(_full_page()).tags
    boxes = {a["value"]: "checked" in a for tag, a in tags if tag == "input"}
    assert boxes == {"truth": True, "cloud": False, "student": True, "private": True}
    hidden = {
        a["data-layer"]: "off" in (a["class"] or "")
        for tag, a in tags
        if "data-layer" in a
    }
    assert hidden == {key: not on for key, on in boxes.items()}
    assert [a["value"] for tag, a in tags if tag == "option"] == [
        "",
        "=bird",
        "",
        "private",
    ]


def test_text_of_boxes_stays_inside_the_image() -> None:
    image = GalleryImage(
        b"",
        100,
        100,
        "edge",
        {
            "cloud": [Box((0, 0, 3, 3), "a long name", 0.5)],
            "student": [Box((97, 97, 100, 100), "a long name", 0.5)],
        },
    )
    page = build_page(RunSummary(), [], [image], "", "")
    places = [
        (float(a["x"] or 0), float(a["y"] or 0), a["text-anchor"])
        for tag, a in _parse(page).tags
        if tag == "text"
    ]
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y, _ in places)
    assert places[0][0] > 30  # ends there
    assert places[1][0] < 70  # starts there


@pytest.mark.parametrize(
    "figures",
    [
        {},
        {
            "preset": "folder",
            "classes": ["a"],
            "map50": {"cloud": None, "student": None},
            "gap_closed": None,
        },
        {
            "map50": None,
            "separation": None,
            "calls": None,
            "seconds": None,
            "versions": None,
        },
        {"map50": {"student": 0.4}},
        {"map50": {"student": math.nan, "cloud": 0.2}},
        {
            "separation": {"consistent": 0, "inconsistent": 0, "private": 0},
            "seconds": {"total": 0},
        },
    ],
)
def test_missing_figures_are_left_out(figures: dict[str, Any]) -> None:
    text = _parse(build_page(RunSummary.from_json(figures), [], [], "", "")).text
    assert "What it looks like" not in text
    assert "nan" not in text.split()


def test_a_run_without_truth_is_reported_as_such() -> None:
    page = build_page(
        make_summary(map50={"cloud": None, "student": None}, gap_closed=None),
        [],
        [picture()],
        "",
        "",
    )
    assert "No annotated test images" in page
    assert "<h2>Results</h2>" not in page
    assert "<h2>What it looks like</h2>" in page


def test_a_worse_student_is_reported_as_worse() -> None:
    text = _parse(
        _full_page(map50={"cloud": 0.4, "student": 0.35}, gap_closed=-0.2)
    ).text
    assert "scores 5.0 points below" in text
    assert f"{MINUS}5.0" in text
    assert f"{MINUS}20 %" in text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "\u2013"),
        (6.14, "6.1 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (187, "3 min 07 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_duration(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


def test_numbers() -> None:
    assert [format_points(v) for v in (0.4056, None, math.nan, 0)] == [
        "40.6",
        "\u2013",
        "\u2013",
        "0.0",
    ]
    assert [
        format_change(a, b) for a, b in [(0.5, 0.4), (0.4, 0.5), (0.4, 0.4), (None, 1)]
    ] == ["+10.0", f"{MINUS}10.0", "0.0", ""]


def test_terminal_table(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    print_summary(
        make_summary(map50_unknown={"student": 0.19}, page="runs/[demo]/report.html")
    )
    out = capsys.readouterr().out
    for phrase in [
        "Student ",
        "40.5",
        "+7.7",
        "19.0",
        "inconsistent",
        "1,362",
        "49%",
        "$1.50",
        "6 min 42 s",
        "runs/[demo]/report.html",
    ]:
        assert phrase in out, phrase


@pytest.mark.parametrize(
    "figures", [{}, {"map50": {"cloud": None}}, {"calls": {"made": 3}}]
)
def test_terminal_table_without_truth(
    figures: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    print_summary(RunSummary.from_json(figures))
    assert "No annotated test images" in capsys.readouterr().out


def test_terminal_table_imports_neither_torch_nor_jinja2() -> None:
    code = (
        "import sys, coin_ray.report.table; print(sorted({'torch', 'jinja2', 'numpy'} &"
        " set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "[]"
    )


KNOWLEDGE = {
    "consistent": {"right": 0.72},
    "inconsistent": {"cloud": 0.53, "clip": 0.56, "mean": 0.65, "neither": 0.21},
    "private": {"right": 0.5},
}


def test_the_accuracy_of_each_kind_is_shown_with_its_size(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    text = " ".join(_full_page(knowledge=KNOWLEDGE).split())
    assert (
        "consistent 72 %; inconsistent cloud 53 %, clip 56 %, mean 65 %, neither 21 %;"
        " private 50 %." in text
    )
    assert "which no training sees" not in _full_page()
    print_summary(make_summary(knowledge=KNOWLEDGE))
    printed = capsys.readouterr().out
    assert "72%" in printed
    assert "cloud 53%, clip 56%, mean 65%, neither 21%" in printed


def test_corrections_are_shown_with_the_mistakes_of_each_teacher() -> None:
    cloud = {"boxes": 40, "wrong": 10, "missed": 6, "images": 5}
    clip = {"boxes": 0, "wrong": 0, "missed": 60, "images": 8}
    corrections = {
        "images": 8,
        "boxes": 60,
        "empty": 1,
        "teachers": {"cloud": cloud, "clip_detector": clip},
    }
    text = " ".join(
        _parse(
            build_page(make_summary(corrections=corrections), [], [], "", "")
        ).text.split()
    )
    assert "8 training images with 60 objects, 1 of them empty" in text
    assert all(
        share in text
        for share in ("10 (25 %)", "6 (10 %)", "5 (62 %)", "0 (none)", "60 (100 %)")
    )
    assert (
        "Corrected by people"
        not in _parse(build_page(make_summary(), [], [], "", "")).text
    )


def test_a_person_s_boxes_are_a_layer_of_the_gallery() -> None:
    image = GalleryImage(
        picture().jpeg,
        40,
        30,
        "a.jpg",
        {"separation": [Box((1, 1, 9, 9), "bird", None, "reviewed")]},
        "train",
    )
    page = _parse(build_page(make_summary(), [], [image], "", ""))
    assert ("input", "reviewed") in [
        (tag, attributes.get("value")) for tag, attributes in page.tags
    ]


@pytest.mark.parametrize(
    ("intensity", "told"),
    [
        ({"images": 40, "range": [21_000, 24_500]}, "21000 .. 24500"),
        ({"images": 40}, "each image's own"),
        ({"images": 40, "range": [290, 310], "outside": 7}, "no value in the range"),
    ],
)
def test_the_page_tells_how_deep_grey_images_were_made_visible(
    intensity: dict[str, object], told: str
) -> None:
    summary = RunSummary.from_json({"images": {"train": 40}, "intensity": intensity})
    text = _parse(build_page(summary, [], [], "", "")).text
    assert "Grey images with more than 8 bits" in text
    assert told in text
