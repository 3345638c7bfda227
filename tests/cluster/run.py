"""``make test-cluster``: start a cluster on three machines by the commands of
docs/cluster.md, and disturb small jobs on it.

    make test-cluster ARGS="--only undisturbed,asking-cable"

The machines are namespaces of this one, which ends with this process and all it has
started. The table of docs/cluster.md gets the rows of the scenarios that were run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import docs_page
from machines import (
    ISOLATE,
    die_with_parent,
    missing_requirements,
    run_command,
)
from real_cluster import DEMO, Job, RealCluster
from scenarios import SCENARIOS, Scenario, reference, run_scenario, skipped_row

FOLDER_VARIABLE = "COIN_RAY_CLUSTER_TEST"
"""Tells the process that runs isolated where its files are."""
NO_TEST = 2


def main(arguments: list[str]) -> int:
    """Run the chosen scenarios; return 1 if one failed."""
    options = _parse(arguments)
    folder = os.environ.get(FOLDER_VARIABLE)
    if folder is not None:
        return _run_scenarios(Path(folder), options)
    missing = missing_requirements()
    if missing:
        print(f"test-cluster needs {', '.join(missing)}", file=sys.stderr)
        return NO_TEST
    return _run_isolated(arguments)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make test-cluster")
    parser.add_argument("--only", default="", help="names of scenarios, with commas")
    parser.add_argument("--list", action="store_true", help="name the scenarios")
    parser.add_argument(
        "--no-table", action="store_true", help="leave docs/cluster.md as it is"
    )
    parser.add_argument(
        "--demo", action="store_true", help="time the whole demo here and without it"
    )
    parser.add_argument("--keep", default="", help="folder outside /tmp for logs")
    return parser.parse_args(arguments)


def _run_isolated(arguments: list[str]) -> int:
    """Start this program again in namespaces of its own, with a folder that is removed
    afterwards.
    """
    folder = tempfile.mkdtemp(prefix="coin_ray-cluster-", dir="/var/tmp")
    os.chmod(folder, 0o755)
    command = [*ISOLATE, sys.executable, __file__, *arguments]
    variables = os.environ | {FOLDER_VARIABLE: folder}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    process = subprocess.Popen(command, env=variables, preexec_fn=die_with_parent)
    try:
        return process.wait()
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _run_scenarios(folder: Path, options: argparse.Namespace) -> int:
    if options.list:
        for scenario in SCENARIOS:
            print(f"{scenario.name:20} {scenario.event}")
        return 0
    names = [name for name in options.only.split(",") if name]
    unknown = set(names) - {scenario.name for scenario in SCENARIOS}
    if unknown:
        print(f"no scenario is called {', '.join(sorted(unknown))}", file=sys.stderr)
        return NO_TEST
    _use_private_tmp(folder)
    started = time.monotonic()
    cluster = RealCluster(folder)
    cluster.up()
    print(f"up: {time.monotonic() - started:.0f} s, 3 nodes", flush=True)
    failures = 0
    references: dict[str, Job] = {}
    for scenario in _selected(names):
        if not scenario.missing():
            failures += _run_scenario(cluster, scenario, references, options)
            continue
        _show_row(skipped_row(scenario), options)
    if options.demo:
        _compare_demo(cluster)
    started = time.monotonic()
    cluster.down()
    print(f"down: no process of Ray after {time.monotonic() - started:.0f} s")
    return 1 if failures else 0


def _compare_demo(cluster: RealCluster) -> None:
    """Print the time of the whole demo on the cluster and without one."""
    job = cluster.submit("whole-demo", DEMO)
    cluster.finish(job)
    calls = job.calls()
    alone = cluster.seconds_alone()
    print(
        f"demo: {calls['made']} calls, {job.seconds:.0f} s on the cluster,"
        f" {alone:.0f} s without: {job.seconds / alone:.2f}",
        flush=True,
    )


def _selected(names: Sequence[str]) -> list[Scenario]:
    """Return the scenarios with these names, after those with which they are compared;
    without names all of them.
    """
    chosen = [scenario for scenario in SCENARIOS if scenario.name in names]
    references = {reference(scenario.program) for scenario in chosen}
    wanted = {*names, *references} if names else {s.name for s in SCENARIOS}
    return [scenario for scenario in SCENARIOS if scenario.name in wanted]


def _run_scenario(
    cluster: RealCluster,
    scenario: Scenario,
    references: dict[str, Job],
    options: argparse.Namespace,
) -> int:
    """Run one scenario and return the number of its problems. After an error the
    cluster is started afresh.
    """
    try:
        job, row = run_scenario(cluster, scenario, references.get(scenario.program))
    except Exception:
        print(f"{scenario.name}: {traceback.format_exc()}", flush=True)
        _keep_logs(cluster, scenario.name, options.keep)
        cluster.start_afresh()
        return 1
    _keep_logs(cluster, scenario.name, options.keep)
    references.setdefault(scenario.program, job)
    _show_row(str(row), options)
    problems = row.problems()
    for problem in problems:
        print(f"{scenario.name}: {problem}", flush=True)
    return len(problems)


def _show_row(row: str, options: argparse.Namespace) -> None:
    print(row, flush=True)
    if not options.no_table:
        docs_page.write_table([row])


def _use_private_tmp(folder: Path) -> None:
    """Give this process a ``/tmp`` of its own: Ray's launcher keeps files there."""
    private = folder / "tmp"
    private.mkdir()
    run_command("mount", "--bind", str(private), "/tmp")


def _keep_logs(cluster: RealCluster, name: str, folder: str) -> None:
    if not folder:
        return
    target = Path(folder) / name
    target.mkdir(parents=True, exist_ok=True)
    for machine in cluster.machines:
        for log in machine.path("/tmp/ray").glob("session_2*/logs/*"):
            if log.is_file():
                shutil.copy(log, target / f"{machine.name}-{log.name}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
