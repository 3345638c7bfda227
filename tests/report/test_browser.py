"""The page in a real browser: a script clicks through it, and what it saw comes back in
the page's text."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from coin_ray.report.gallery import Box, GalleryImage
from coin_ray.report.page import PageFigures, build_page
from tests.report.test_page import CURVES, PER_CLASS, make_summary, picture

CHROMIUM = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (found := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium or Chrome on the PATH: the page is not clicked through",
)

SEEN = """
const $ = (q) => document.querySelector(q), all = (q) => [...document.querySelectorAll(q)];
const visible = (e) => e.getClientRects().length > 0 && e.checkVisibility();
const names = () => all(".gallery figure").filter(visible).map((f) => f.querySelector("img").alt);
const marks = (layer) => all(`.mark-${layer} rect.case`).filter(visible).length;
const choose = (id, value) => { const s = $(id); s.value = value; s.dispatchEvent(new Event("change")); };
const seen = {};
"""
WIDTHS = (1280, 768, 390)


def page() -> str:
    bird = picture("bird.jpg")
    car = GalleryImage(
        bird.jpeg,
        64,
        48,
        "car.jpg",
        {"cloud": [Box((1, 1, 9, 9), "car", 0.5)]},
        "worst",
        "Of 1 objects",
        ("worse", "student"),
    )
    figures = PageFigures(
        precision_recall={"student": [1.0, 0.5]},
        confusion=[[3, 1, 0], [0, 2, 0], [0, 0, 0]],
    )
    return build_page(
        make_summary(per_class=PER_CLASS),
        CURVES,
        [bird, car],
        "preset: demo\n",
        "coin-ray adapt demo",
        figures,
    )


def browse(folder: Path, script: str, width: int = 1280) -> dict[str, Any]:
    """What ``script`` put into ``seen`` after running in the page."""
    told = (
        f'<script>{SEEN}{script};document.body.insertAdjacentHTML("beforeend", "<pre'
        ' id=told></pre>");$("#told").textContent=JSON.stringify(seen)</script>'
    )
    (folder / "page.html").write_text(
        page().replace("</body>", told + "</body>"), encoding="utf-8"
    )
    assert CHROMIUM is not None
    size = f"--window-size={width},900"
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/profile",
        size,
        "--dump-dom",
    ]
    done = subprocess.run(
        [*command, (folder / "page.html").as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    found = re.search(r'<pre id="told">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


def test_clicks_switch_layers_filter_pictures_and_open_folds(tmp_path: Path) -> None:
    seen = browse(
        tmp_path,
        """
        seen.first = names(); seen.cloud = marks("cloud"); seen.truth = marks("truth");
        $('#controls input[value=cloud]').click(); $('#controls input[value=truth]').click();
        seen.switched = [marks("cloud"), marks("truth")];
        choose("#class-filter", "=car"); seen.cars = names(); seen.count = $("#shown").textContent; seen.birdMarks = marks("student");
        choose("#class-filter", ""); choose("#disagreement-filter", "worse"); seen.worse = names();
        choose("#kind-filter", "private"); seen.neither = names(); seen.groups = all(".group").filter(visible).length;
        choose("#disagreement-filter", ""); seen.private = names();
        choose("#kind-filter", ""); seen.all = names().length;
        const button = $(".gallery button"), narrow = button.clientWidth;
        button.focus(); seen.focused = document.activeElement === button; button.click();
        seen.wider = button.clientWidth > narrow; seen.expanded = button.getAttribute("aria-expanded");
        seen.folded = visible($("#confusion")); $("#teachers > summary").click(); seen.opened = visible($("#confusion"));
        $("#all-folds").click(); seen.open = all("details").every((d) => d.open);
        $("#all-folds").click(); seen.closed = all("details").every((d) => !d.open);
        """,
    )
    assert seen == {
        "first": ["car.jpg", "bird.jpg"],
        "cloud": 0,
        "truth": 1,
        "switched": [2, 0],
        "cars": ["car.jpg"],
        "count": "1 of 2 pictures",
        "birdMarks": 0,
        "worse": ["car.jpg"],
        "neither": [],
        "groups": 0,
        "private": ["bird.jpg"],
        "all": 2,
        "focused": True,
        "wider": True,
        "expanded": "true",
        "folded": False,
        "opened": True,
        "open": True,
        "closed": True,
    }


@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_wider_than_the_screen(width: int, tmp_path: Path) -> None:
    script = """
    all("details").forEach((d) => { d.open = true; });
    document.body.style.width = "WIDTHpx";
    const inside = (e) => e.closest(".scroll, pre, svg, .visually-hidden");
    seen.wide = all("main *").filter((e) => visible(e) && !inside(e) && e.getBoundingClientRect().right > WIDTH + 1).map((e) => e.className || e.tagName);
    """
    assert browse(tmp_path, script.replace("WIDTH", str(width)), width)["wide"] == []
