"""Join the cluster of the job, or start a small local one."""

from __future__ import annotations

import errno
import logging
import os

IN_FLIGHT_BATCHES = 4


def on_cluster() -> bool:
    """Whether this process belongs to a cluster: a submitted job, or RAY_ADDRESS set by
    hand.
    """
    return bool(os.environ.get("RAY_ADDRESS"))


def ensure_ray() -> None:
    """Under ``ray job submit`` or with RAY_ADDRESS join that cluster; otherwise start a
    local one, quietly, that ends with this process.
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
            # its C++ core speaks past log_to_driver
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
    # a quota that returns tomorrow is no hang
    context.execution_no_progress_timeout_s = -1
    quiet()


def quiet() -> None:
    """Progress is ours to show: a line of our own now and then, instead of Ray's plans
    and reports.
    """
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(
            logging.WARNING if on_cluster() else logging.ERROR
        )


def full_disk(told: str, place: str) -> None:
    """Raises OSError, as on this machine, if a worker's error tells of a full disk."""
    if os.strerror(errno.ENOSPC) in told:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), place)


def threads(workers: int = 1) -> int:
    """Of torch in each of ``workers`` processes on this machine: its share of the cores
    but one, which is left to all else.

    A thread that has to wait for a core holds up all others in every operation: on two
    cores two threads are slower than one.
    """
    return int(
        os.environ.get("OMP_NUM_THREADS")
        or max(1, (os.cpu_count() or 1) // workers - 1)
    )


def largest_node_cpus() -> int:
    """CPUs of the node that has most: no single worker can have more."""
    import ray

    return int(
        max(
            (node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]),
            default=1,
        )
    )


def cluster_cpus() -> int:
    import ray

    return int(ray.cluster_resources().get("CPU", 1))
