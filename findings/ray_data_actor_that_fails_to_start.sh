#!/usr/bin/env bash
# An actor of Ray Data's pool that fails to start once ends the data set; one that dies later is replaced for ever.
#
# Packages: ray[data] 2.60.0, Python 3.11.
#
# Behaviour: actors of map_batches are restarted without limit when their process or node is lost, and their tasks are
# given to the new one. A constructor that raises is not: Ray Core doesn't restart such an actor, and Ray Data's
# DataContext.max_consecutive_actor_init_deaths is 0, so that the first such failure ends the execution, also when
# other actors of the pool work.
#
# Seen: an actor that kills its own process once in the middle of its work: all 8 rows arrive. A pool of two whose
# first constructor raises once: ActorDiedError and no further row. The same with max_consecutive_actor_init_deaths =
# 3: all 8 rows.
#
# Why it matters: a pool that grows on an autoscaler's nodes starts actors for hours. One that meets a full disk, a
# mount that is not there yet or a file server's hiccup ends a run that would survive the loss of the whole node.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'ray[data]==2.60.0' 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
"$folder/venv/bin/python" - <<'PY' 2>log || { cat log >&2; exit 1; }
import logging
import os
import signal
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ |= {"RAY_raylet_start_wait_time_s": "300", "RAY_DASHBOARD_STARTUP_TIMEOUT_S": "300"}  # for a busy machine
import ray
import ray.data
from ray.exceptions import RayActorError

ROWS = 8


def happens_once(name):
    try:
        os.mkdir(name)
    except FileExistsError:
        return False
    return True


class DiesAtWork:
    def __init__(self, folder):
        self.folder = folder

    def __call__(self, batch):
        if happens_once(f"{self.folder}/died"):
            os.kill(os.getpid(), signal.SIGKILL)
        return batch


class FailsToStart:
    def __init__(self, folder, name):
        if happens_once(f"{folder}/{name}"):
            raise OSError("the share is not mounted yet")

    def __call__(self, batch):
        return batch


def count_rows(actor, *arguments):
    data = ray.data.range(ROWS, override_num_blocks=ROWS).map_batches(
        actor, fn_constructor_args=arguments, batch_size=1, compute=ray.data.ActorPoolStrategy(size=2), num_cpus=1
    )
    try:
        return sum(len(batch["id"]) for batch in data.iter_batches(batch_size=1))
    except RayActorError as error:
        return type(error).__name__


ray.init(num_cpus=3, include_dashboard=False, logging_level=logging.CRITICAL, log_to_driver=False)
context = ray.data.DataContext.get_current()
context.enable_progress_bars = False
logging.getLogger("ray.data").setLevel(logging.CRITICAL)
folder = os.getcwd()
at_work = count_rows(DiesAtWork, folder)
at_start = count_rows(FailsToStart, folder, "first")
default = context.max_consecutive_actor_init_deaths
context.max_consecutive_actor_init_deaths = 3
allowed = count_rows(FailsToStart, folder, "second")
ray.shutdown()
print(f"a process killed at work: {at_work} rows of {ROWS}")
print(f"a constructor that raises once, max_consecutive_actor_init_deaths {default}: {at_start}")
print(f"the same with 3: {allowed} rows")
expected = (ROWS, "ActorDiedError", 0, ROWS)
sys.exit((at_work, at_start, default, allowed) != expected)
PY
echo "as described"
