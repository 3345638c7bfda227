"""The page in a real browser: a script clicks through it and returns its observations."""

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

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium or Chrome on the PATH: the page is not clicked through",
)

HELPERS = """
const $ = (q) => document.querySelector(q), all = (q) => [...document.querySelectorAll(q)];
const visible = (e) => e.getClientRects().length > 0 && e.checkVisibility();
const names = () =>
  all(".gallery figure").filter(visible).map((f) => f.querySelector("img").alt);
const marks = (layer) => all(`.mark-${layer} rect.case`).filter(visible).length;
const choose = (id, value) => {
  const select = $(id); select.value = value; select.dispatchEvent(new Event("change"));
};
const seen = {};
"""
WIDTHS = (1280, 768, 390)


def _page() -> str:
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


def _run_script(folder: Path, script: str, width: int = 1280) -> dict[str, Any]:
    """Return what ``script`` put into ``seen`` after running in the page."""
    script_element = (
        f'<script>{HELPERS}{script};document.body.insertAdjacentHTML("beforeend", "<pre'
        ' id=seen></pre>");$("#seen").textContent=JSON.stringify(seen)</script>'
    )
    html = _page().replace("</body>", script_element + "</body>")
    (folder / "page.html").write_text(html, encoding="utf-8")
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/profile",
        f"--window-size={width},900",
        "--dump-dom",
        (folder / "page.html").as_uri(),
    ]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=120, check=True
    )
    dumped = re.search(r'<pre id="seen">(.*?)</pre>', process.stdout, re.DOTALL)
    assert dumped, process.stdout[-2000:] + process.stderr[-2000:]
    recorded: dict[str, Any] = json.loads(unescape(dumped[1]))
    return recorded


def test_clicks_switch_layers_filter_pictures_and_open_folds(tmp_path: Path) -> None:
    recorded = _run_script(
        tmp_path,
        """
        seen.first = names(); seen.cloud = marks("cloud"); seen.truth = marks("truth");
        $('#controls input[value=cloud]').click();
        $('#controls input[value=truth]').click();
        seen.switched = [marks("cloud"), marks("truth")];
        choose("#class-filter", "=car"); seen.cars = names();
        seen.count = $("#shown").textContent; seen.birdMarks = marks("student");
        choose("#class-filter", ""); choose("#disagreement-filter", "worse");
        seen.worse = names();
        choose("#kind-filter", "private"); seen.neither = names();
        seen.groups = all(".group").filter(visible).length;
        choose("#disagreement-filter", ""); seen.private = names();
        choose("#kind-filter", ""); seen.all = names().length;
        const button = $(".gallery button"), narrow = button.clientWidth;
        button.focus(); seen.focused = document.activeElement === button; button.click();
        seen.wider = button.clientWidth > narrow;
        seen.expanded = button.getAttribute("aria-expanded");
        seen.folded = visible($("#confusion"));
        $("#teachers > summary").click(); seen.opened = visible($("#confusion"));
        $("#all-folds").click(); seen.open = all("details").every((d) => d.open);
        $("#all-folds").click(); seen.closed = all("details").every((d) => !d.open);
        """,
    )
    assert recorded == {
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
    const tooWide = (e) => e.getBoundingClientRect().right > WIDTH + 1;
    const wide = all("main *").filter((e) => visible(e) && !inside(e) && tooWide(e));
    seen.wide = wide.map((e) => e.className || e.tagName);
    """
    recorded = _run_script(tmp_path, script.replace("WIDTH", str(width)), width)
    assert recorded["wide"] == []
