"""A run on a cluster of several nodes whose workers, nodes and head are killed: the
same tables and weights, no call paid twice.

Each test says what was killed and what was lost.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from clusters import Cluster, cluster_of, kill_node, until
from small_runs import SMALL, Kill, asked, assert_same_results

pytestmark = [pytest.mark.soak, pytest.mark.timeout(7200)]
STORE = 78_643_200
"""Bytes; Ray's least."""
HOLDER = """
import time, numpy, ray
@ray.remote(num_cpus=0, resources={"store": 1})
def hold(flag):
    kept = [ray.get(ray.put(numpy.ones(10_000_000, numpy.uint8))) for _ in range(9)]
    open(flag, "w").close()
    time.sleep(7200)
ray.init()
ray.get(hold.remote(FLAG))
"""
"""Takes more of a node's object store than there is, and lets go of nothing: what is in
use is not spilled."""
EVERY = ["--propagate.fit.checkpoint-every", "4", "--distill.fit.checkpoint-every", "4"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The head has no CPU, so that all work is done where it can be killed."""
    with cluster_of(2, more={"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "20"}) as made:
        yield made


@pytest.fixture(scope="module")
def reference(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing disturbs."""
    root = tmp_path_factory.mktemp("undisturbed")
    submit(cluster, "undisturbed", root)
    cluster.wait("undisturbed")
    return root


def submit(cluster: Cluster, name: str, root: Path) -> None:
    variables = {"RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "20"}
    cluster.submit(
        name,
        ["python", "pipelines/full.py", "demo", "--root", str(root), *SMALL, *EVERY],
        variables,
    )


def up_to(step: str, reference: Path, root: Path) -> Path:
    """A run in which all before ``step`` is finished."""
    order = ("images", "collect", "propagate", "separate", "distill")
    for name in order[: order.index(step)]:
        (folder,) = reference.glob(f"steps/{name}-*")
        shutil.copytree(folder, root / "steps" / folder.name)
    shutil.copytree(reference / "local_cloud", root / "local_cloud")
    return root


def saved(root: Path, step: str) -> int:
    """Steps of training in the last state on the disk, 0 if there is none."""
    for state in root.glob(f"steps/{step}-*/state.pt"):
        try:
            return int(torch.load(state, map_location="cpu", weights_only=True)["step"])
        except FileNotFoundError:  # finished meanwhile
            break
    return 0


def finished(root: Path, step: str) -> bool:
    return any(root.glob(f"steps/{step}-*/manifest.json"))


def kill(process: psutil.Process, what: str) -> str:
    process.send_signal(signal.SIGKILL)
    return what


def test_workers_killed_in_collect(
    cluster: Cluster, reference: Path, tmp_path: Path
) -> None:
    submit(cluster, "collect", tmp_path)
    killed: list[str] = []
    calls = tmp_path / "local_cloud" / "calls.jsonl"
    until(
        lambda: calls.exists() and len(calls.read_text().splitlines()) >= 5,
        "five calls",
    )  # small sets are asked before a part is written
    killed += [
        kill(process, "CloudActor") for process in cluster.workers("CloudActor")[:1]
    ]
    at = Kill.now(tmp_path)
    until(
        lambda: len(list(tmp_path.glob("steps/collect-*/parts/*.parquet"))) >= 3,
        "three parts",
    )
    killed += [
        kill(process, "LabelerActor") for process in cluster.workers("LabelerActor")[:1]
    ]
    cluster.wait("collect")
    assert_same_results(tmp_path, reference)
    assert set(asked(tmp_path)) == set(asked(reference))
    repeated = at.repeated(tmp_path)
    print(
        f"killed in collect: {', '.join(killed)}; lost: nothing; {len(repeated)} calls"
        f" of {sum(asked(tmp_path).values())} made again"
    )
    assert "CloudActor" in killed


def test_a_worker_killed_after_every_saved_state(
    cluster: Cluster, reference: Path, tmp_path: Path
) -> None:
    root, killed = up_to("propagate", reference, tmp_path), list[str]()
    submit(cluster, "epochs", root)
    for step in ("propagate", "distill"):
        last = 0
        while not finished(root, step):
            until(
                lambda step=step, last=last: (
                    saved(root, step) > last or finished(root, step)
                ),
                f"a state of {step}",
            )  # type: ignore[misc]
            last = max(last, saved(root, step))
            if not finished(root, step):
                killed += [
                    kill(process, f"{step} at step {last}")
                    for process in cluster.workers("RayTrainWorker")
                ]
    cluster.wait("epochs")
    assert_same_results(root, reference)
    print(f"killed: {', '.join(killed)}; lost: nothing")
    assert len(killed) >= 5, "more than Ray Train's own limit"


def test_a_worker_that_hangs_is_replaced(
    cluster: Cluster, reference: Path, tmp_path: Path
) -> None:
    root = up_to("distill", reference, tmp_path)
    submit(cluster, "hang", root)
    until(lambda: saved(root, "distill") > 0, "a state of distill")
    (worker,) = cluster.workers("RayTrainWorker")
    os.kill(worker.pid, signal.SIGSTOP)
    cluster.wait("hang")
    assert_same_results(root, reference)
    print("stopped for ever: the worker that trains; lost: nothing")


def test_a_node_removed_and_another_added(
    cluster: Cluster, reference: Path, tmp_path: Path
) -> None:
    root = up_to("distill", reference, tmp_path)
    submit(cluster, "node", root)
    until(lambda: saved(root, "distill") > 0, "a state of distill")
    kill_node(cluster.nodes.pop())
    cluster.add(2)
    cluster.wait("node")
    assert_same_results(root, reference)
    print("killed: the node that trains, another one added; lost: nothing")


def test_the_head_restarted(cluster: Cluster, reference: Path, tmp_path: Path) -> None:
    root = up_to("distill", reference, tmp_path)
    submit(cluster, "before", root)
    until(lambda: saved(root, "distill") > 0, "a state of distill")
    for node in [*cluster.nodes, cluster.head]:
        kill_node(node)
    cluster.nodes.clear()
    cluster.start_head()
    cluster.add(2)
    submit(cluster, "after", root)
    cluster.wait("after")
    assert_same_results(root, reference)
    print(
        "killed: the head with the whole cluster; lost: nothing, the same command"
        " went on"
    )


def test_an_object_store_that_is_full(reference: Path, tmp_path: Path) -> None:
    """Ray puts what has no room there on the disk. Its node has one CPU, too: nothing
    may hold it that waits for another."""
    flag, program, root = tmp_path / "full", tmp_path / "holder.py", tmp_path / "run"
    program.write_text(HOLDER.replace("FLAG", repr(str(flag))))
    with cluster_of() as small:
        small.add(1, f"--object-store-memory={STORE}", '--resources={"store": 1}')
        small.submit("holder", ["python", str(program)])
        until(flag.exists, "a full object store")
        submit(small, "full", root)
        small.wait("full")
        assert small.status("holder") == "RUNNING", "the store was full all the time"
    assert_same_results(root, reference)
    print(
        f"filled: the object store of the node that does all work ({STORE:,} bytes);"
        " lost: nothing"
    )


def test_fewer_workers_go_on_when_a_node_is_gone(
    reference: Path, tmp_path: Path
) -> None:
    """Between one and two workers; another number of them rounds otherwise, so only the
    losses are compared."""
    root = up_to("distill", reference, tmp_path)
    entry = [
        "python",
        "pipelines/full.py",
        "demo",
        "--root",
        str(root),
        *SMALL,
        *EVERY,
        "--distill.fit.max-workers",
        "2",
    ]
    with cluster_of(1, 1) as elastic:
        # Ray sees late that the node is gone
        elastic.submit(
            "elastic", entry, {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60"}
        )
        until(lambda: saved(root, "distill") > 0, "a state of distill")
        kill_node(elastic.nodes.pop())
        log = elastic.wait("elastic")
    assert "worker group of size 2" in log
    assert "worker group of size 1" in log
    ours, theirs = (
        json.loads(next(r.glob("steps/distill-*/curve.json")).read_text())
        for r in (root, reference)
    )
    assert ours[0] == pytest.approx(theirs[0], rel=1e-3, abs=1e-3)
    assert ours[-1] == pytest.approx(theirs[-1], rel=0.2, abs=0.05)
    print(
        "killed: one node of two, and its worker; lost: nothing, the other one went on"
    )
