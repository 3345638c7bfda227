"""A collection's images answered by batches of an HTTP server that a run can be killed
beside."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from coin_ray.cloud.journal.opening import open_journal
from coin_ray.config import ClassPrompt, Cloud, PipelineConfig
from coin_ray.config.presets import DEMO_CLIP, folder
from coin_ray.errors import BudgetExhausted
from coin_ray.stages.collecting.batches import answer_by_batches
from coin_ray.stages.collecting.cloud_actor import journal_uri
from tests.cloud.emulator import PROVIDERS, Emulator, scene
from tests.cloud.emulator.app import SCENE_CLASSES, TOKEN


@pytest.fixture
def running_emulator() -> Iterator[tuple[Emulator, str]]:
    """Start the emulator on this machine; yield it and its address."""
    running_emulator = Emulator(PROVIDERS)
    server = uvicorn.Server(
        uvicorn.Config(running_emulator._app, port=0, log_level="error", lifespan="off")
    )
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield running_emulator, f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def _config(url: str, **settings: Any) -> PipelineConfig:
    cloud = Cloud(
        service="openai-vlm",
        url=f"{url}/openai-batch",
        coordinates="xyxy_1000",
        usd_per_call=0.02,
        batch=True,
        **settings,
    )
    prompt = ClassPrompt("vehicle", ("car", "bus"), negatives=("truck",))
    return replace(
        folder(), classes=("vehicle", "dog"), class_prompts=(prompt,), cloud=cloud
    )


def _images(directory: Path) -> list[str]:
    names = [("car",), ("bus", "dog"), (), ("cat",)]
    uris = []
    for number, objects in enumerate(names):
        boxes = [(10 + 70 * k, 10, 60 + 70 * k, 60) for k in range(len(objects))]
        classes = [SCENE_CLASSES.index(name) for name in objects]
        file = directory / f"{number}.jpg"
        file.write_bytes(scene(classes, boxes, (200, 80 + number), "JPEG"))
        uris.append(str(file))
    return [*uris, str(directory / "missing.jpg")]


def test_negatives_are_asked_for_where_something_was_found(
    tmp_path: Path,
    running_emulator: tuple[Emulator, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    server, url = running_emulator
    config = _config(url)
    uris = _images(tmp_path)
    root = str(tmp_path / "root")
    server.state("openai-batch")["polls"] = 0
    answer_by_batches(config, [(config.cloud, config.cloud.url)], uris, root, "run")
    jobs = server.state("openai-batch")["jobs"].values()
    assert [len(job["requests"]) for job in jobs] == [4, 2]
    journal = open_journal(journal_uri(root))
    assert journal.spent() == (6, pytest.approx(0.06))
    assert journal.contents().answers == 6
    assert journal.contents().tasks == 0
    assert journal.account("run").answered == 6
    journal.close()


def test_a_budget_stops_the_run(
    tmp_path: Path,
    running_emulator: tuple[Emulator, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    server, url = running_emulator
    config = _config(url, max_calls=3)
    server.state("openai-batch")["polls"] = 0
    clouds = [(config.cloud, config.cloud.url)]
    root = str(tmp_path / "root")
    with pytest.raises(BudgetExhausted, match=r"cloud\.max_calls=3"):
        answer_by_batches(config, clouds, _images(tmp_path), root, "run")
    assert server.state("openai-batch")["billed"] == 3


@pytest.mark.slow
def test_a_killed_collection_pays_for_each_image_once(
    tmp_path: Path, running_emulator: tuple[Emulator, str]
) -> None:
    """The command is killed while its job is under way; the same command goes on."""
    server, url = running_emulator
    state = server.state("openai-batch")
    state["polls"] = 10_000
    (tmp_path / "images").mkdir()
    _images(tmp_path / "images")
    command = [
        *(sys.executable, "-m", "coin_ray.commands.main", "collect", "folder"),
        *("--images", str(tmp_path / "images"), "--classes", "car,bus"),
        *("--cloud", "openai-vlm", "--cloud.url", f"{url}/openai-batch"),
        *("--cloud.coordinates", "xyxy_1000", "--cloud.batch"),
        *("--cloud.usd-per-call", "0.02", "--labeler", "none"),
        *("--clip.model", DEMO_CLIP.model, "--clip.pretrained", DEMO_CLIP.pretrained),
        *("--root", str(tmp_path / "root")),
    ]
    environment = {**os.environ, "OPENAI_API_KEY": TOKEN}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    deadline = time.monotonic() + 90
    while not state.get("jobs") and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.kill()
    output = process.communicate()[0].decode()
    assert state.get("jobs"), output
    state["polls"] = 0
    next(iter(state["jobs"].values()))["polls"] = 0
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "batches of openai-vlm answered 4 images, 0 without" in finished.stdout
    assert (len(state["jobs"]), state["billed"]) == (1, 4)
    assert server.billed["openai-batch"] == 0
    journal = open_journal(journal_uri(str(tmp_path / "root")))
    assert journal.spent() == (4, pytest.approx(0.04))
    journal.close()
