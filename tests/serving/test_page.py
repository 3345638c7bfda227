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
from fastapi.responses import HTMLResponse

from coin_ray.config import Cloud, Folder, PipelineConfig
from coin_ray.serving.server import PAGE_RULES, create_app
from coin_ray.serving.teacher_proxy import CloudBeside
from tests.serving.running import running
from tests.serving.test_local_cloud import Brightness, jpeg

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
    reason="no Chromium or Chrome on the PATH: nothing is dropped on the page",
)

DROP = """{
const seen = {}, all = (q) => [...document.querySelectorAll(q)], wait = (ms) => new Promise((done) => setTimeout(done, ms));
const told = (side) => $(".told", $("#" + side)).textContent;
const settled = async (...sides) => { for (let i = 0; i < 200 && sides.some((s) => /^(Asking|No image)/.test(told(s))); i++) await wait(50); };
const drop = (bytes, name) => {
  const carried = new DataTransfer();
  carried.items.add(new File([Uint8Array.from(atob(bytes), (c) => c.charCodeAt(0))], name, { type: "image/jpeg" }));
  $("#drop").dispatchEvent(new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer: carried }));
};
const boxes = (side) => all(`#${side} rect.box`).map((r) => ["x", "y", "width", "height"].map((n) => Number(r.getAttribute(n))));
(async () => {
  for (let i = 0; i < 200 && /^Asking/.test($("#about").textContent); i++) await wait(50);
  SCRIPT
  document.body.insertAdjacentHTML("beforeend", "<pre id=seen></pre>");
  $("#seen").textContent = JSON.stringify(seen);
})();
}"""


def browse(app: Any, script: str, folder: Path, width: int = 1000) -> dict[str, Any]:
    """What ``script`` put into ``seen``; the page comes with its own rules and from the
    server it asks."""
    page = (files("coin_ray.serving") / "page.html").read_text(encoding="utf-8")
    tried = page.replace(
        "</body>", f"<script>{DROP.replace('SCRIPT', script)}</script></body>"
    )
    app.get("/tried")(
        lambda: HTMLResponse(tried, headers={"Content-Security-Policy": PAGE_RULES})
    )
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={folder}/profile",
        f"--window-size={width},900",
    ]
    with running(app) as url:
        wanted = [*command, "--virtual-time-budget=30000", "--dump-dom", f"{url}/tried"]
        done = subprocess.run(
            wanted, capture_output=True, text=True, timeout=180, check=True
        )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


IMAGE = base64.b64encode(jpeg(size=(200, 100))).decode()
LOOK = f"""
drop("{IMAGE}", "bright.jpg"); await settled("student", ...(document.querySelector("#cloud").hidden ? [] : ["cloud"]));
seen.student = boxes("student"); seen.cloud = boxes("cloud"); seen.told = told("student");
seen.label = $("#student svg text")?.textContent; seen.rows = all("#student td").map((c) => c.textContent);
seen.cloudShown = $("#cloud").checkVisibility(); seen.about = $("#about").textContent;
seen.token = $("#token-row").checkVisibility();
"""


def test_a_dropped_image_shows_the_boxes_of_student_and_cloud(tmp_path: Path) -> None:
    with running(create_app(Brightness())) as elsewhere:
        config = PipelineConfig(
            "folder", Brightness.classes, Folder("."), Cloud(url=elsewhere)
        )
        script = (
            LOOK + '$("#lowest").value = 0.9; $("#lowest").dispatchEvent(new'
            ' Event("input")); seen.above = boxes("student").length;'
        )
        seen = browse(
            create_app(Brightness(), beside=CloudBeside(config)), script, tmp_path
        )
    assert seen["student"] == seen["cloud"] == [[50, 25, 100, 50]]
    assert seen["label"] == "bright 0.78"
    assert seen["rows"] == ["bright", "0.784", "50, 25, 150, 75"]
    assert seen["told"].startswith("1 of 2 objects") or seen["told"].startswith(
        "1 of 1 objects"
    )
    assert (seen["cloudShown"], seen["above"]) == (True, 0)
    assert "one call to the cloud" in seen["about"]


def test_without_a_cloud_there_is_one_side_and_a_bad_file_is_told(
    tmp_path: Path,
) -> None:
    script = (
        LOOK
        + 'drop(btoa("no image at all"), "x.jpg"); await settled("student"); seen.bad ='
        ' told("student"); seen.left = boxes("student");'
    )
    seen = browse(create_app(Brightness()), script, tmp_path)
    assert (seen["student"], seen["cloudShown"], seen["token"]) == (
        [[50, 25, 100, 50]],
        False,
        False,
    )
    assert seen["bad"].startswith("415: not a usable image.")
    assert seen["left"] == []


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_is_wider_than_the_screen(width: int, tmp_path: Path) -> None:
    wide = """document.body.style.width = "WIDTHpx"; const end = document.body.getBoundingClientRect().right + 1;
    const over = (e) => e.checkVisibility() && !e.closest("svg") && e.getBoundingClientRect().right > end;
    seen.wide = all("body *").filter(over).map((e) => e.tagName);"""
    script = LOOK + wide.replace("WIDTH", str(width))
    assert browse(create_app(Brightness()), script, tmp_path, width)["wide"] == []


def test_a_server_with_a_token_asks_for_it_and_then_answers(tmp_path: Path) -> None:
    script = (
        'seen.asks = $("#about").textContent; seen.row ='
        ' $("#token-row").checkVisibility(); $("#token").value ='
        ' "right";$("#token").dispatchEvent(new Event("change")); for (let i = 0; i <'
        " 100 && !classes.length; i++) await wait(50);"
    )
    seen = browse(create_app(Brightness(), token="right"), script + LOOK, tmp_path)
    assert (seen["asks"], seen["row"]) == ("This server asks for a token.", True)
    assert (seen["student"], seen["token"]) == ([[50, 25, 100, 50]], True)
