"""What an operator meets: two runs on one root, an outage, a deleted photo, a bad answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.request import urlopen

import pyarrow.parquet as pq
import pytest
from labelled_folder import write_image_records

REPOSITORY = Path(__file__).resolve().parents[2]
IMAGES = 40
LATENCY = 0.3

pytestmark = pytest.mark.slow


@pytest.fixture
def server() -> Iterator[str]:
    """The address of a server that counts its calls and takes a while for each."""
    command = [sys.executable, "tests/cloud/counting_server.py", "--width", "64"]
    command += ["--height", "48", "--latency", str(LATENCY)]
    process = subprocess.Popen(
        command,
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    yield process.stdout.readline().strip()
    process.communicate()


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    write_image_records(folder, IMAGES, seed=1)
    return folder


def _config_file(tmp_path: Path, photos: Path, url: str, **settings: str) -> Path:
    """Write a config of the demo's small networks for the photos."""
    from dataclasses import replace

    from coin_ray.config import Cloud, Folder
    from coin_ray.config.presets import demo
    from coin_ray.config.yaml_files import to_yaml

    preset = demo()
    config = replace(
        preset,
        data=Folder(images=str(photos)),
        classes=("car", "bus", "dog"),
        cloud=Cloud(url=url, usd_per_call=0.01, rate=1000.0, in_flight=4, **settings),  # type: ignore[arg-type]
        collect=replace(preset.collect, labeler="none", batch=4),
    )
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    return file


def _command(config: Path, root: Path, *options: str) -> list[str]:
    command = [sys.executable, "pipelines/collect.py", "--config", str(config)]
    return [*command, "--root", str(root), *options]


def _environment() -> dict[str, str]:
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "RAY_USAGE_STATS_ENABLED": "0"}
    return os.environ | quiet


def _start(config: Path, root: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        _command(config, root),
        cwd=REPOSITORY,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _run(config: Path, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        _command(config, root),
        cwd=REPOSITORY,
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _calls(url: str) -> Counter[str]:
    """Return how often each key was asked."""
    with urlopen(f"{url}/stats") as response:
        return Counter(key for key, _ in json.load(response)["calls"])


def _wait_for_calls(url: str, count: int) -> None:
    give_up_at = time.monotonic() + 120
    while _calls(url).total() < count:
        assert time.monotonic() < give_up_at
        time.sleep(0.05)


def _statuses(root: Path) -> Counter[str]:
    (file,) = root.glob("steps/collect-*/cloud.parquet")
    return Counter(pq.read_table(file)["status"].to_pylist())


def test_two_runs_on_one_root_pay_each_image_once(
    tmp_path: Path, photos: Path, server: str
) -> None:
    config, root = _config_file(tmp_path, photos, server), tmp_path / "root"
    first = _start(config, root)
    _wait_for_calls(server, 4)
    start = time.monotonic()
    second = _run(config, root)
    assert second.returncode == 2, second.stdout + second.stderr
    assert second.stderr.strip().count("\n") == 0
    assert f"process {first.pid} on" in second.stderr
    assert first.poll() is None, "the first was still at work"
    output, _ = first.communicate(timeout=300)
    assert first.returncode == 0, output
    calls = _calls(server)
    assert (len(calls), calls.total()) == (IMAGES, IMAGES)
    assert _statuses(root) == {"ok": IMAGES}
    print(f"second run refused in {time.monotonic() - start:.1f} s")


def test_a_killed_run_hands_the_root_over(
    tmp_path: Path, photos: Path, server: str
) -> None:
    config, root = _config_file(tmp_path, photos, server), tmp_path / "root"
    first = _start(config, root)
    _wait_for_calls(server, IMAGES // 4)
    first.send_signal(signal.SIGKILL)
    second = _run(config, root)
    first.communicate()
    assert second.returncode == 0, second.stdout + second.stderr
    assert f"process {first.pid} on" in second.stdout
    assert "which has ended" in second.stdout
    calls = _calls(server)
    assert len(calls) == IMAGES
    assert calls.total() <= IMAGES + 4, "only calls in flight may be repeated"
    assert sum(_statuses(root).values()) == IMAGES
