"""A head and a second node, each a ``ray start`` of its own: a run and a search
submitted as jobs leave their results where they were told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from clusters import Cluster, start_cluster
from small_runs import SMALL

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture(scope="module")
def running_cluster() -> Iterator[Cluster]:
    """The head has no CPU, as in cluster.yaml: all work is done on the node that
    joined."""
    with start_cluster(2) as temporary_cluster:
        yield temporary_cluster


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


def test_a_run_as_a_job(running_cluster: Cluster, root: Path) -> None:
    running_cluster.submit(
        "run",
        ["python", "pipelines/full.py", "demo", "--root", f"file://{root}", *SMALL],
    )
    running_cluster.wait("run")
    summary = json.loads((root / "summary.json").read_text())
    assert summary["map50"]["student"] is not None
    assert summary["calls"]["failed"] == 0
    assert (root / "mlflow.db").exists()
    assert len(list(root.glob("steps/*/manifest.json"))) == 8


def test_a_search_as_a_job_shares_the_steps_of_the_run(
    running_cluster: Cluster, root: Path
) -> None:
    before = {
        path: path.stat().st_mtime_ns for path in root.glob("steps/*/manifest.json")
    }
    options = [
        "--space",
        "loss-weights",
        "--algorithm",
        "random",
        "--trials",
        "3",
        "--concurrent",
        "2",
    ]
    running_cluster.submit(
        "search",
        [
            "python",
            "tune/search.py",
            "demo",
            "--root",
            f"file://{root}",
            *SMALL,
            *options,
        ],
    )
    log = running_cluster.wait("search")
    folder = root / "search" / "loss-weights-map50"
    assert {"best.yaml", "search.json", "parallel.svg", "importance.svg"} <= {
        file.name for file in folder.iterdir()
    }
    search_results = json.loads((folder / "search.json").read_text())
    assert len(search_results["trials"]) == 3
    assert any(trial["state"] == "finished" for trial in search_results["trials"])
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items()), (
        "no step of the run was made again"
    )
    assert "collect: started" not in log
