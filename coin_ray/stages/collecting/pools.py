"""The sizes of a collection's pools of actors. On a cluster they follow its nodes: Ray
Data starts actors while batches wait and nodes have room, and ends idle ones.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import yaml

from coin_ray.cloud.accounts import governor_limits
from coin_ray.config import PipelineConfig
from coin_ray.stages.common.cluster import cluster_cpus, on_cluster

CLUSTER_FILE = "~/ray_bootstrap_config.yaml"
"""The cluster's file on its head, where ``ray up`` puts it."""
ACTOR_RATE = 300.0
"""Images a second that one cloud actor can ask about, on one core."""
ACTOR_CALLS = 32
"""Calls under way from which on a further actor is of use."""
ACTORS_MAX = 16


def count_labelers(config: PipelineConfig) -> int | None:
    """Return the largest number of labelers: ``collect.labelers`` or, for ``auto``, one
    with a GPU, and otherwise as many as the CPUs less one. None if ``most_cpus`` has no
    limit.
    """
    if config.collect.labelers != "auto":
        return config.collect.labelers
    if config.collect.labeler_gpus or config.collect.labeler == "none":
        return 1
    cpus = most_cpus() - most_cloud_actors(config) * cloud_actor_cpus(config)
    return None if cpus == math.inf else max(1, int(cpus) - 1)


def most_cloud_actors(config: PipelineConfig) -> int:
    """Return the largest number of cloud actors, on all nodes that may join."""
    return count_cloud_actors(config, most_cpus())


def cloud_actor_cpus(config: PipelineConfig) -> int:
    """Return the CPUs that a cloud actor reserves. A single one mostly waits; several
    that are as many as the CPUs need one each, which spreads them over the nodes.
    """
    follows_cluster = on_cluster() and config.collect.actors == "auto"
    return 1 if follows_cluster and most_cloud_actors(config) > 1 else 0


def count_cloud_actors(config: PipelineConfig, cpus: float) -> int:
    """Return the number of cloud actors: ``collect.actors`` or, for ``auto``, as many as
    the services' limits and the CPUs can keep busy.
    """
    if config.collect.actors != "auto":
        return config.collect.actors
    rate = min(governor_limits(cloud).rate for cloud in config.clouds)
    calls = min(cloud.in_flight for cloud in config.clouds)
    useful = min(rate / ACTOR_RATE, calls / ACTOR_CALLS, cpus / 2, ACTORS_MAX)
    return max(1, int(useful))


def most_cpus() -> float:
    """Return how many CPUs the cluster can have without starting a node with GPUs, at
    least those of today. Infinite if no file says so: machines of one's own join by
    hand, and Kubernetes' file is not on the head.
    """
    if not on_cluster():
        return cluster_cpus()
    try:
        with open(os.path.expanduser(CLUSTER_FILE), encoding="utf-8") as file:
            potential = potential_cpus(yaml.safe_load(file))
    except FileNotFoundError:
        return math.inf
    return math.inf if potential is None else max(cluster_cpus(), potential)


def potential_cpus(cluster: Mapping[str, Any]) -> float | None:
    """Return the CPUs of a cluster's head and of all nodes without GPUs that its
    autoscaler may start; None if the file does not say how many a node has.
    """
    node_types = cluster.get("available_node_types")
    if not node_types:
        return None
    total = 0.0
    for name, node_type in node_types.items():
        resources = node_type.get("resources", {})
        if "CPU" not in resources:
            return None
        if name == cluster["head_node_type"]:
            total += resources["CPU"]
        elif not resources.get("GPU"):
            total += resources["CPU"] * node_type["max_workers"]
    return total
