"""Check that a run on a cluster whose workers, nodes and head are killed has the same
tables and weights as an undisturbed one, and that no call is paid twice.

Each test prints what was killed and what was lost.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from clusters import Cluster, kill_node, start_cluster, wait_until
from small_runs import SMALL, Kill, assert_same_results, count_calls_by_image

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]
STORE = 78_643_200
"""Bytes of the object store: Ray's minimum."""
HOLDER = """
import time, numpy, ray
@ray.remote(num_cpus=0, resources={"store": 1})
def hold(flag):
    references = [ray.get(ray.put(numpy.ones(10_000_000, numpy.uint8))) for _ in range(9)]
    open(flag, "w").close()
    time.sleep(7200)
ray.init()
ray.get(hold.remote(FLAG))
"""
"""Source of a job that fills a node's object store and holds all objects: objects in use
are not spilled."""
EVERY = ["--propagate.fit.checkpoint-every", "4", "--distill.fit.checkpoint-every", "4"]


@pytest.fixture(scope="module")
def small_cluster() -> Iterator[Cluster]:
    """The head has no CPU, so that all work is done where it can be killed."""
    with start_cluster(
        2, variables={"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "20"}
    ) as temporary_cluster:
        yield temporary_cluster


@pytest.fixture(scope="module")
def undisturbed_root(
    small_cluster: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run that nothing disturbs."""
    root = tmp_path_factory.mktemp("undisturbed")
    _submit_run(small_cluster, "undisturbed", root)
    small_cluster.wait("undisturbed")
    return root


def _submit_run(small_cluster: Cluster, name: str, root: Path) -> None:
    variables = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "20"}
    small_cluster.submit(
        name,
        ["python", "pipelines/full.py", "demo", "--root", str(root), *SMALL, *EVERY],
        variables,
    )


def _copy_steps_before(step: str, undisturbed_root: Path, root: Path) -> Path:
    """Copy the finished steps before ``step`` of the reference into a new root."""
    order = ("images", "collect", "propagate", "separate", "distill")
    for name in order[: order.index(step)]:
        (folder,) = undisturbed_root.glob(f"steps/{name}-*")
        shutil.copytree(folder, root / "steps" / folder.name)
    shutil.copytree(undisturbed_root / "local_cloud", root / "local_cloud")
    return root


def _last_saved_step(root: Path, step: str) -> int:
    """Return the training step of the last checkpoint on disk, 0 if there is none."""
    for state in root.glob(f"steps/{step}-*/state.pt"):
        try:
            return int(torch.load(state, map_location="cpu", weights_only=True)["step"])
        except FileNotFoundError:  # the stage has finished
            break
    return 0


def _is_finished(root: Path, step: str) -> bool:
    return any(root.glob(f"steps/{step}-*/manifest.json"))


def _has_saved_or_finished(root: Path, step: str, last: int) -> bool:
    return _last_saved_step(root, step) > last or _is_finished(root, step)


def _kill(process: psutil.Process, description: str) -> str:
    process.send_signal(signal.SIGKILL)
    return description


def test_workers_killed_in_collect(
    small_cluster: Cluster, undisturbed_root: Path, tmp_path: Path
) -> None:
    _submit_run(small_cluster, "collect", tmp_path)
    killed: list[str] = []
    calls = tmp_path / "local_cloud" / "calls.jsonl"
    wait_until(
        lambda: calls.exists() and len(calls.read_text().splitlines()) >= 5,
        "five calls",
    )  # small sets are asked before a part is written
    killed += [
        _kill(process, "CloudActor")
        for process in small_cluster.workers("CloudActor")[:1]
    ]
    kill = Kill.now(tmp_path)
    wait_until(
        lambda: len(list(tmp_path.glob("steps/collect-*/parts/*.parquet"))) >= 3,
        "three parts",
    )
    killed += [
        _kill(process, "LabelerActor")
        for process in small_cluster.workers("LabelerActor")[:1]
    ]
    small_cluster.wait("collect")
    assert_same_results(tmp_path, undisturbed_root)
    assert set(count_calls_by_image(tmp_path)) == set(
        count_calls_by_image(undisturbed_root)
    )
    repeated = kill.repeated(tmp_path)
    print(
        f"killed in collect: {', '.join(killed)}; lost: nothing; {len(repeated)} calls"
        f" of {sum(count_calls_by_image(tmp_path).values())} made again"
    )
    assert "CloudActor" in killed


def test_a_worker_killed_after_every_saved_state(
    small_cluster: Cluster, undisturbed_root: Path, tmp_path: Path
) -> None:
    root = _copy_steps_before("propagate", undisturbed_root, tmp_path)
    killed: list[str] = []
    _submit_run(small_cluster, "epochs", root)
    for step in ("propagate", "distill"):
        last = 0
        while not _is_finished(root, step):
            wait_until(
                partial(_has_saved_or_finished, root, step, last), f"a state of {step}"
            )
            last = max(last, _last_saved_step(root, step))
            if not _is_finished(root, step):
                killed += [
                    _kill(process, f"{step} at step {last}")
                    for process in small_cluster.workers("RayTrainWorker")
                ]
    small_cluster.wait("epochs")
    assert_same_results(root, undisturbed_root)
    print(f"killed: {', '.join(killed)}; lost: nothing")
    assert len(killed) >= 5, "more than Ray Train's own limit"


def test_a_worker_that_hangs_is_replaced(
    small_cluster: Cluster, undisturbed_root: Path, tmp_path: Path
) -> None:
    root = _copy_steps_before("distill", undisturbed_root, tmp_path)
    _submit_run(small_cluster, "hang", root)
    wait_until(lambda: _last_saved_step(root, "distill") > 0, "a state of distill")
    (worker,) = small_cluster.workers("RayTrainWorker")
    os.kill(worker.pid, signal.SIGSTOP)
    small_cluster.wait("hang")
    assert_same_results(root, undisturbed_root)
    print("stopped for ever: the worker that trains; lost: nothing")


def test_a_node_removed_and_another_added(
    small_cluster: Cluster, undisturbed_root: Path, tmp_path: Path
) -> None:
    root = _copy_steps_before("distill", undisturbed_root, tmp_path)
    _submit_run(small_cluster, "node", root)
    wait_until(lambda: _last_saved_step(root, "distill") > 0, "a state of distill")
    kill_node(small_cluster.nodes.pop())
    small_cluster.add(2)
    small_cluster.wait("node")
    assert_same_results(root, undisturbed_root)
    print("killed: the node that trains, another one added; lost: nothing")


def test_the_head_restarted(
    small_cluster: Cluster, undisturbed_root: Path, tmp_path: Path
) -> None:
    root = _copy_steps_before("distill", undisturbed_root, tmp_path)
    _submit_run(small_cluster, "before", root)
    wait_until(lambda: _last_saved_step(root, "distill") > 0, "a state of distill")
    for node in [*small_cluster.nodes, small_cluster.head]:
        kill_node(node)
    small_cluster.nodes.clear()
    small_cluster.start_head()
    small_cluster.add(2)
    _submit_run(small_cluster, "after", root)
    small_cluster.wait("after")
    assert_same_results(root, undisturbed_root)
    print(
        "killed: the head with the whole cluster; lost: nothing, the same command"
        " went on"
    )


def test_an_object_store_that_is_full(undisturbed_root: Path, tmp_path: Path) -> None:
    """Ray spills objects that do not fit to disk. The node has one CPU, which no task may
    hold while it waits for another task."""
    flag, program, root = tmp_path / "full", tmp_path / "holder.py", tmp_path / "run"
    program.write_text(HOLDER.replace("FLAG", repr(str(flag))))
    with start_cluster() as small:
        small.add(1, f"--object-store-memory={STORE}", '--resources={"store": 1}')
        small.submit("holder", ["python", str(program)])
        wait_until(flag.exists, "a full object store")
        _submit_run(small, "full", root)
        small.wait("full")
        assert small.status("holder") == "RUNNING", "the store was full all the time"
    assert_same_results(root, undisturbed_root)
    print(
        f"filled: the object store of the node that does all work ({STORE:,} bytes);"
        " lost: nothing"
    )


def test_fewer_workers_go_on_when_a_node_is_gone(
    undisturbed_root: Path, tmp_path: Path
) -> None:
    """Train with two workers, then one. Another number of workers rounds otherwise, so only
    the losses are compared."""
    root = _copy_steps_before("distill", undisturbed_root, tmp_path)
    program = ["python", "pipelines/full.py", "demo", "--root", str(root)]
    entrypoint = [*program, *SMALL, *EVERY, "--distill.fit.max-workers", "2"]
    with start_cluster(1, 1) as elastic:
        # Ray sees late that the node is gone
        elastic.submit(
            "elastic", entrypoint, {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60"}
        )
        wait_until(lambda: _last_saved_step(root, "distill") > 0, "a state of distill")
        kill_node(elastic.nodes.pop())
        log = elastic.wait("elastic")
    assert "worker group of size 2" in log
    assert "worker group of size 1" in log
    losses, reference_losses = (
        json.loads(next(folder.glob("steps/distill-*/curve.json")).read_text())
        for folder in (root, undisturbed_root)
    )
    assert losses[0] == pytest.approx(reference_losses[0], rel=1e-3, abs=1e-3)
    assert losses[-1] == pytest.approx(reference_losses[-1], rel=0.2, abs=0.05)
    print(
        "killed: one node of two, and its worker; lost: nothing, the other one went on"
    )
