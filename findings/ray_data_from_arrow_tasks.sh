#!/usr/bin/env bash
# ray.data.from_arrow runs a task of one CPU for each block of a table that lies in memory.
#
# Packages: ray[data] 2.60.0, Python 3.11.
#
# Behaviour: from_arrow cuts the table in the caller, puts each slice into the object store, and then starts a remote
# task of one CPU for each of them, which only reads its schema and size, and waits for all. from_blocks, documented
# as "primarily used for testing", computes the same in the caller and starts none. from_items starts none either.
#
# Seen: 40 blocks: 40 tasks by from_arrow, none by from_blocks. On a head without CPUs from_blocks returns at once and
# from_arrow does not return.
#
# Why it matters: on a cluster with an autoscaler that starts from nothing the call waits for a node, although nothing
# has been asked for yet; and the tasks all wait at the same time, so that a table of 300 blocks is a request for 300
# CPUs. The autoscaler starts every node that it may, those with GPUs too once the others are at their limit
# (ray_conserve_gpu_nodes.sh), for work of milliseconds; each is paid for until its idle time has passed.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'ray[data]==2.60.0' 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import logging
import os
import sys
import threading

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ |= {"RAY_raylet_start_wait_time_s": "300", "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300"}  # for a busy machine
import pyarrow
import ray
import ray.data

BLOCKS = 40
table = pyarrow.table({"path": [f"{n}.jpg" for n in range(10 * BLOCKS)]})
slices = [table.slice(10 * n, 10) for n in range(BLOCKS)]


def start(cpus):
    ray.init(num_cpus=cpus, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False


def tasks_of(make):
    """How many tasks ran while the data set was made."""
    data = make()
    assert data.num_blocks() == BLOCKS, data.num_blocks()
    names = [event["args"].get("name", "") for event in ray.timeline() if event["cat"].startswith("task::")]
    return len([name for name in names if name])


start(cpus=1)
by_blocks = tasks_of(lambda: ray.data.from_blocks(slices))
by_arrow = tasks_of(lambda: ray.data.from_arrow(table, override_num_blocks=BLOCKS))
ray.shutdown()
print(f"tasks for {BLOCKS} blocks of a table in memory: from_blocks {by_blocks}, from_arrow {by_arrow}")

start(cpus=0)  # as on a head that leaves its work to nodes that an autoscaler starts
threads = {
    name: threading.Thread(target=make, daemon=True)
    for name, make in {
        "from_blocks": lambda: ray.data.from_blocks(slices),
        "from_arrow": lambda: ray.data.from_arrow(table, override_num_blocks=BLOCKS),
    }.items()
}
for thread in threads.values():
    thread.start()
    thread.join(30)
waiting = {name: thread.is_alive() for name, thread in threads.items()}
print("still waiting for a CPU after 30 s:", waiting)
good = waiting == {"from_blocks": False, "from_arrow": True} and (by_blocks, by_arrow) == (0, BLOCKS)
sys.stdout.flush()
os._exit(0 if good else 1)  # a thread still waits
PY
echo "as described"
