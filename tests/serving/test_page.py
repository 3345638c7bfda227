"""The drop page in a real browser: a script drops an image on it, and what appeared
comes back in the page's text."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html import unescape
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from coin_ray.config import Cloud, Folder, PipelineConfig
from coin_ray.serving.server import CONTENT_SECURITY_POLICY, create_app
from coin_ray.serving.teacher_proxy import TeacherProxy
from tests.images import jpeg
from tests.serving.helpers import BrightnessDetector, run_server

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
pytestmark = pytest.mark.skipif(
    BROWSER is None,
    reason="no Chromium or Chrome on the PATH: nothing is dropped on the page",
)

DROP = """{
const report = {}, all = (q) => [...document.querySelectorAll(q)];
const wait = (ms) => new Promise((done) => setTimeout(done, ms));
const told = (side) => $(".told", $("#" + side)).textContent;
const settled = async (...sides) => {
  const busy = (side) => /^(Asking|No image)/.test(told(side));
  for (let i = 0; i < 200 && sides.some(busy); i++) await wait(50);
};
const drop = (bytes, name) => {
  const carried = new DataTransfer(), array = Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0));
  carried.items.add(new File([array], name, { type: "image/jpeg" }));
  const options = { bubbles: true, cancelable: true, dataTransfer: carried };
  $("#drop").dispatchEvent(new DragEvent("drop", options));
};
const numbers = (r) => ["x", "y", "width", "height"].map((n) => Number(r.getAttribute(n)));
const boxes = (side) => all(`#${side} rect.box`).map(numbers);
(async () => {
  for (let i = 0; i < 200 && /^Asking/.test($("#about").textContent); i++) await wait(50);
  SCRIPT
  document.body.insertAdjacentHTML("beforeend", "<pre id=report></pre>");
  $("#report").textContent = JSON.stringify(report);
})();
}"""
IMAGE = base64.b64encode(jpeg(size=(200, 100))).decode()
DROP_AND_REPORT = f"""
drop("{IMAGE}", "bright.jpg");
await settled("student", ...(document.querySelector("#cloud").hidden ? [] : ["cloud"]));
report.student = boxes("student"); report.cloud = boxes("cloud"); report.told = told("student");
report.label = $("#student svg text")?.textContent;
report.rows = all("#student td").map((c) => c.textContent);
report.cloudShown = $("#cloud").checkVisibility(); report.about = $("#about").textContent;
report.token = $("#token-row").checkVisibility();
"""
BOX = [50, 25, 100, 50]


def _run_in_page(
    app: FastAPI, script: str, folder: Path, width: int = 1000
) -> dict[str, Any]:
    """Return what ``script`` put into ``report``; the page has its own content security
    policy and comes from the server that it calls."""
    page = (files("coin_ray.serving") / "page.html").read_text(encoding="utf-8")
    script_tag = f"<script>{DROP.replace('SCRIPT', script)}</script></body>"
    scripted = page.replace("</body>", script_tag)
    policy = {"Content-Security-Policy": CONTENT_SECURITY_POLICY}
    app.get("/scripted")(lambda: HTMLResponse(scripted, headers=policy))
    assert BROWSER is not None
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/profile",
        f"--window-size={width},900",
        "--virtual-time-budget=30000",
        "--dump-dom",
    ]
    with run_server(app) as url:
        browser = subprocess.run(
            [*command, f"{url}/scripted"],
            capture_output=True,
            text=True,
            timeout=180,
            check=True,
        )
    match = re.search(r'<pre id="report">(.*?)</pre>', browser.stdout, re.DOTALL)
    assert match, browser.stdout[-2000:] + browser.stderr[-2000:]
    report: dict[str, Any] = json.loads(unescape(match[1]))
    return report


def test_a_dropped_image_shows_the_boxes_of_student_and_cloud(tmp_path: Path) -> None:
    raise_threshold = """
    $("#lowest").value = 0.9; $("#lowest").dispatchEvent(new Event("input"));
    report.above = boxes("student").length;"""
    with run_server(create_app(BrightnessDetector())) as cloud_url:
        config = PipelineConfig(
            "folder", BrightnessDetector.classes, Folder("."), Cloud(url=cloud_url)
        )
        app = create_app(BrightnessDetector(), teacher_proxy=TeacherProxy(config))
        report = _run_in_page(app, DROP_AND_REPORT + raise_threshold, tmp_path)
    assert report["student"] == report["cloud"] == [BOX]
    assert report["label"] == "bright 0.78"
    assert report["rows"] == ["bright", "0.784", "50, 25, 150, 75"]
    assert report["told"].startswith(("1 of 2 objects", "1 of 1 objects"))
    assert (report["cloudShown"], report["above"]) == (True, 0)
    assert "one call to the cloud" in report["about"]


def test_without_a_cloud_there_is_one_side_and_a_bad_file_is_reported(
    tmp_path: Path,
) -> None:
    drop_bad_file = """
    drop(btoa("no image at all"), "x.jpg"); await settled("student");
    report.bad = told("student"); report.remaining = boxes("student");"""
    app = create_app(BrightnessDetector())
    report = _run_in_page(app, DROP_AND_REPORT + drop_bad_file, tmp_path)
    assert report["student"] == [BOX]
    assert (report["cloudShown"], report["token"]) == (False, False)
    assert report["bad"].startswith("415: not a usable image.")
    assert report["remaining"] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_on_the_page_is_wider_than_the_screen(
    width: int, tmp_path: Path
) -> None:
    find_wide = f"""
    document.body.style.width = "{width}px";
    const end = document.body.getBoundingClientRect().right + 1;
    const isWide = (e) => e.checkVisibility() && !e.closest("svg")
      && e.getBoundingClientRect().right > end;
    report.wide = all("body *").filter(isWide).map((e) => e.tagName);"""
    app = create_app(BrightnessDetector())
    report = _run_in_page(app, DROP_AND_REPORT + find_wide, tmp_path, width)
    assert report["wide"] == []


def test_a_server_with_a_token_asks_for_it_and_then_answers(tmp_path: Path) -> None:
    enter_token = """
    report.asks = $("#about").textContent; report.row = $("#token-row").checkVisibility();
    $("#token").value = "right"; $("#token").dispatchEvent(new Event("change"));
    for (let i = 0; i < 100 && !classes.length; i++) await wait(50);"""
    app = create_app(BrightnessDetector(), token="right")
    report = _run_in_page(app, enter_token + DROP_AND_REPORT, tmp_path)
    assert report["asks"] == "This server asks for a token."
    assert report["row"]
    assert (report["student"], report["token"]) == ([BOX], True)
