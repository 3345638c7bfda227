"""Join the cluster of the job, or start a small local one."""

from __future__ import annotations

import errno
import logging
import os
import re

from coin_ray.errors import StorageUnavailable
from coin_ray.stages.common.ray_logs import shorten_ray_logs

UNAVAILABLE_TEXT = re.compile(r"StorageUnavailable: (.+)")
"""The error of a worker in the text of Ray's error, and its message."""
IN_FLIGHT_BATCHES = 4
ACTOR_START_RETRIES = 3
"""How often in a row an actor of a pool may fail to start on a cluster, where nodes come
and go, before its stage fails."""


def on_cluster() -> bool:
    """Return whether this process belongs to a cluster: a submitted job, or RAY_ADDRESS
    set by hand.
    """
    return bool(os.environ.get("RAY_ADDRESS"))


def ensure_ray() -> None:
    """Join the cluster under ``ray job submit`` or with RAY_ADDRESS; otherwise start a
    local one, without its log lines, that ends with this process.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault(
        "RAY_DATA_DEFAULT_ASYNC_BATCH_UDF_MAX_CONCURRENCY", str(IN_FLIGHT_BATCHES)
    )
    import ray

    if not ray.is_initialized():
        if on_cluster():
            ray.init(logging_level=logging.WARNING)
        else:
            # Ray's C++ core ignores log_to_driver
            os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
            ray.init(
                address="local",
                include_dashboard=False,
                logging_level=logging.ERROR,
                log_to_driver=False,
            )
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    # a stage that waits for tomorrow's quota does not hang
    context.execution_no_progress_timeout_s = -1
    if on_cluster():
        context.max_consecutive_actor_init_deaths = ACTOR_START_RETRIES
    quiet_ray_logs()


def node_address() -> str:
    """Return the address by which the processes of the run reach this machine: its
    node's on a cluster, which this joins, and otherwise the loopback address.
    """
    if not on_cluster():
        return "127.0.0.1"
    ensure_ray()
    import ray.util

    address: str = ray.util.get_node_ip_address()
    return address


def quiet_ray_logs() -> None:
    """Leave out Ray's plans and reports: the stages print their own progress. What is
    handled is one line.
    """
    level = logging.WARNING if on_cluster() else logging.ERROR
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(level)
    shorten_ray_logs()


def raise_if_storage_failed(error: str, path: str) -> None:
    """Raise the OSError of a full disk, or StorageUnavailable, if the text of a worker's
    error contains one.
    """
    message = os.strerror(errno.ENOSPC)
    if message in error:
        raise OSError(errno.ENOSPC, message, path)
    unavailable = UNAVAILABLE_TEXT.search(error)
    if unavailable:
        raise StorageUnavailable(unavailable[1])


def count_torch_threads(workers: int = 1) -> int:
    """Return how many threads torch should use in each of ``workers`` processes on this
    machine: its share of the cores, less one for everything else.

    A thread that waits for a core holds up all others in every operation: on two cores
    two threads are slower than one.
    """
    configured = os.environ.get("OMP_NUM_THREADS")
    if configured:
        return int(configured)
    cores = os.cpu_count() or 1
    return max(1, cores // workers - 1)


def largest_node_cpus() -> int:
    """Return the CPUs of the node that has most: no single worker can have more."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return int(max((resources.get("CPU", 0) for resources in nodes), default=1))


def cluster_cpus() -> int:
    """Return the CPUs of all nodes together."""
    import ray

    return int(ray.cluster_resources().get("CPU", 1))
