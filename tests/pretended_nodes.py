"""A head whose autoscaler starts and ends nodes on this machine by Ray's own stand-in of
a cloud. ``ray.cluster_utils.AutoscalingCluster`` is no use here: it needs a file that
Ray's wheel lacks, and it first ends every Ray of the machine."""

from __future__ import annotations

import json
import socket
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import ray
import ray.util
from clusters import REPOSITORY, Cluster, wait_until
from ray._private.authentication.authentication_token_setup import (
    enable_token_auth_by_default,
    ensure_token_if_auth_enabled,
)

HEAD_ID = "f" * 51 + "00000"
"""The stand-in names its nodes itself, the head first."""
HEAD_TYPE = "ray.head.default"  # as the stand-in names it
STORE_BYTES = 10**8
NODE_TYPES: dict[str, dict[str, Any]] = {
    HEAD_TYPE: {"resources": {"CPU": 0}, "max_workers": 0},
    "label": {"resources": {"CPU": 2}, "max_workers": 2},
    "train": {"resources": {"CPU": 2, "GPU": 1}, "max_workers": 2},
}
"""As in ``cluster.yaml``, with fewer CPUs."""


class PretendedNodes(Cluster):
    """A cluster of ``NODE_TYPES`` that begins with its head; ``file`` is what its
    autoscaler reads. A node that is idle for nine seconds is ended.

    It wants Ray's token where a local Ray does: a process that has started one of those
    sends it from then on, and on a cluster without a token its actors never start.
    """

    def __init__(self) -> None:
        self.file = ""
        has_token = enable_token_auth_by_default()
        ensure_token_if_auth_enabled()
        super().__init__(
            0,
            {
                "PYTHONPATH": f"{REPOSITORY / 'tests'}:{REPOSITORY / 'tests/pipelines'}",
                "RAY_AUTH_MODE": "token" if has_token else "disabled",
                "RAY_FAKE_CLUSTER": "1",
                "RAY_enable_autoscaler_v2": "1",
                "AUTOSCALER_UPDATE_INTERVAL_S": "1",
                "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
                "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            },
        )

    def start_head(self) -> None:
        self.address = f"{ray.util.get_node_ip_address()}:{self.port}"
        self.file = str(Path(tempfile.mkdtemp(dir=self.folder)) / "cluster.json")
        Path(self.file).write_text(json.dumps(_cluster_file(self.address)))
        self.options = (
            f"--autoscaling-config={self.file}",
            f"--object-store-memory={STORE_BYTES}",
        )
        super().start_head()

    def _wait_until_reachable(self) -> None:
        """Wait for the head's port: no job is submitted here."""

        def answers() -> bool:
            assert self.head.poll() is None, f"the head has ended: {self.said()}"
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        wait_until(answers, "the head", seconds=300)


def count_node_types() -> Counter[str]:
    """Return how many nodes of each type are alive."""
    resources = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return Counter(
        "head"
        if "node:__internal_head__" in by_name
        else "train"
        if "GPU" in by_name
        else "label"
        for by_name in resources
    )


def _cluster_file(address: str) -> dict[str, Any]:
    """Return a launched cluster's file, complete, as Ray reads it on the head."""
    provider = (
        "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
    )
    lists = (
        "cluster_synced_files",
        "rsync_exclude",
        "rsync_filter",
        "initialization_commands",
        "setup_commands",
        "head_setup_commands",
        "worker_setup_commands",
        "head_start_ray_commands",
        "worker_start_ray_commands",
    )
    node_types = {
        name: {
            "node_config": {},
            "min_workers": 0,
            "resources": {**node_type["resources"], "object_store_memory": STORE_BYTES},
            "max_workers": node_type["max_workers"],
        }
        for name, node_type in NODE_TYPES.items()
    }
    return {
        "cluster_name": "pretended",
        "max_workers": 4,
        "upscaling_speed": 1.0,
        "idle_timeout_minutes": 0.15,
        "provider": {
            "type": "external",
            "module": provider,
            "gcs_address": address,
            "head_node_id": HEAD_ID,
            "launch_multiple": True,
        },
        "head_node_type": HEAD_TYPE,
        "available_node_types": node_types,
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
        **{name: [] for name in lists},
    }
