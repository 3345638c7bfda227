"""Whole runs of the pipeline: killed in the middle of its stages and run again, run twice, submitted as a Ray job."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

REPOSITORY = Path(__file__).resolve().parents[2]
TRAIN, VAL, TEST = 48, 4, 20
IMAGES = TRAIN + TEST
IN_FLIGHT = 8
SMALL = [
    *("--data.train", str(TRAIN), "--data.val", str(VAL), "--data.test", str(TEST)),
    *("--propagate.fit.steps", "24", "--distill.fit.steps", "24", "--distill.burn-up", "8"),
    *("--propagate.fit.checkpoint-every", "3", "--distill.fit.checkpoint-every", "3"),
    *("--cloud.in-flight", str(IN_FLIGHT), "--cloud.serve-faults", "0.1", "--collect.batch", "8"),
]
KILLED_IN = ("images", "collect", "propagate", "separate", "distill", "evaluate")


def command(root: Path, *more: str) -> list[str]:
    return [sys.executable, "pipelines/full.py", "demo", "--root", str(root), *SMALL, *more]


def environment() -> dict[str, str]:
    return {**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true", "RAY_USAGE_STATS_ENABLED": "0"}


def finish(root: Path) -> dict[str, object]:
    done = subprocess.run(command(root), cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary: dict[str, object] = json.loads((root / "summary.json").read_text())
    return summary


def started(root: Path, stage: str) -> bool:
    """Whether ``stage`` has begun to leave something behind, so that a kill hits the middle of its work."""
    traces = {
        "images": ("steps/images-*/images/train_0010.jpg",),
        "collect": ("steps/collect-*/parts/*.parquet",),
        "propagate": ("steps/propagate-*/state.pt",),
        "separate": ("steps/propagate-*/manifest.json",),
        "distill": ("steps/distill-*/state.pt",),
        "evaluate": ("steps/distill-*/manifest.json",),
    }
    return any(list(root.glob(pattern)) for pattern in traces[stage])


def kill_in(root: Path, stage: str) -> None:
    process = subprocess.Popen(command(root), cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    give_up_at = time.monotonic() + 300
    while not started(root, stage):
        assert process.poll() is None, f"the run ended before it could be killed in {stage}"
        assert time.monotonic() < give_up_at
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def rows(root: Path, pattern: str, columns: list[str]) -> list[dict[str, object]]:
    (path,) = root.glob(pattern)
    found: list[dict[str, object]] = pq.read_table(path, columns=columns).to_pylist()
    return found


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, object]]:
    root = tmp_path_factory.mktemp("undisturbed")
    return root, finish(root)


def test_a_finished_run_again_is_a_quick_no_op(undisturbed: tuple[Path, dict[str, object]]) -> None:
    root, before = undisturbed
    stamps = {p: p.stat().st_mtime_ns for p in root.glob("steps/*/*") if p.is_file()}
    start = time.monotonic()
    assert finish(root) == before
    assert {p: p.stat().st_mtime_ns for p in root.glob("steps/*/*") if p.is_file()} == stamps
    print(f"finished run again: {time.monotonic() - start:.1f} s")


def test_summary_has_every_figure(undisturbed: tuple[Path, dict[str, object]]) -> None:
    _, summary = undisturbed
    assert {"preset", "seed", "map50", "gap_closed", "separation", "calls", "seconds", "versions"} <= set(summary)
    assert set(summary["map50"]) == {"cloud", "clip_labels", "static_fusion", "clip_detector", "student"}  # type: ignore[call-overload]
    assert set(summary["separation"]) == {"consistent", "inconsistent", "private"}  # type: ignore[call-overload]
    assert {"made", "cached", "failed", "cost_usd"} == set(summary["calls"])  # type: ignore[call-overload]
    assert summary["seconds"]["total"] > 0  # type: ignore[index]


def test_killed_in_every_stage_gives_the_same_tables_and_repeats_no_call(
    undisturbed: tuple[Path, dict[str, object]], tmp_path: Path
) -> None:
    reference, expected = undisturbed
    for stage in KILLED_IN:
        kill_in(tmp_path, stage)
    summary = finish(tmp_path)
    for figure in ("map50", "map50_unknown", "per_class", "separation"):
        assert summary[figure] == expected[figure], figure
    found = ["image_id", "boxes", "scores", "labels", "probs"]
    for table in ("collect-*/cloud", "collect-*/clip_labels", "separate-*/clip_detector", "evaluate-*/predictions/student"):
        pattern = f"steps/{table}.parquet"
        assert rows(tmp_path, pattern, found) == rows(reference, pattern, found), table
    for weights in ("propagate-*/detector.pt", "distill-*/detector.pt", "distill-*/teacher.pt"):
        ours, theirs = (torch.load(next(root.glob(f"steps/{weights}")), weights_only=True) for root in (tmp_path, reference))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), f"{weights} differs to the bit"
    ours, theirs = asked(tmp_path), asked(reference)
    repeated = [key for key, times in ours.items() if times > theirs[key]]
    print(f"{sum(ours.values())} calls with a kill while collecting, {sum(theirs.values())} undisturbed, {IMAGES} images")
    assert set(ours) == set(theirs)
    assert len(repeated) <= IN_FLIGHT, "only calls in flight when the run was killed may be made again"


def asked(root: Path) -> Counter[str]:
    """How often the cloud was asked about each image, retried faults included, by its own log."""
    lines = (root / "local_cloud" / "calls.jsonl").read_text().splitlines()
    return Counter(json.loads(line)["image"] for line in lines)


@pytest.mark.slow
def test_ray_job_submit(tmp_path: Path) -> None:
    """A cluster of one node; the job's results are where --root says. Ports lie outside 10002..19999, where its workers' are."""
    ray = str(Path(sys.executable).parent / "ray")
    ports = [
        "--port=26379",
        "--dashboard-port=28265",
        "--ray-client-server-port=28266",
        "--dashboard-agent-listen-port=28267",
        f"--temp-dir=/tmp/ray-{os.getpid()}",
    ]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    surroundings = environment() | {"RAY_AUTH_MODE": "disabled", "PATH": path}
    head = subprocess.Popen(
        [ray, "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=true", "--disable-usage-stats", *ports],
        env=surroundings, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        submit = [ray, "job", "submit", "--address", "http://127.0.0.1:28265", "--working-dir", str(REPOSITORY)]
        submit += ["--runtime-env-json", json.dumps({"excludes": [".venv", "runs", ".git", "build"]})]
        entry = ["python", "pipelines/full.py", "demo", "--root", str(tmp_path / "run"), *SMALL]
        done = _retried([*submit, "--", *entry], surroundings)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        summary = json.loads((tmp_path / "run" / "summary.json").read_text())
        assert summary["map50"]["student"] is not None
        assert summary["calls"]["failed"] == 0
    finally:
        os.killpg(head.pid, signal.SIGTERM)
        head.wait(timeout=60)


NOT_YET = ("Failed to connect", "No available agent")


def _retried(arguments: list[str], surroundings: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """The job server needs some seconds before it accepts the first job."""
    for _ in range(30):
        done = subprocess.run(arguments, cwd=REPOSITORY, env=surroundings, capture_output=True, text=True, timeout=500, check=False)
        if done.returncode == 0 or not any(reason in done.stdout + done.stderr for reason in NOT_YET):
            return done
        time.sleep(2)
    return done
