#!/usr/bin/env bash
# Ray's autoscaler starts GPU nodes for requests of CPUs alone, although AUTOSCALER_CONSERVE_GPU_NODES is on.
#
# Packages: ray[default] 2.60.0, Python 3.11.
#
# Behaviour: the setting (on by default) orders node types: those without GPUs come first. It excludes none. Once they
# are at max_workers, further requests of CPUs start nodes with GPUs. So do tasks that wait, and so does
# ray.autoscaler.sdk.request_resources, by which Ray Data asks for twice what it has while CPUs are its bound.
#
# Seen: a type of 8 CPUs, at most 2 nodes, and one of 8 CPUs and a GPU, at most 4. 16 CPUs start two small nodes;
# 40 CPUs start two small nodes and three with GPUs.
#
# Why it matters: a pool of actors on CPUs without a largest size (ActorPoolStrategy(min_size=1)) grows until all
# nodes with GPUs of the cluster run, for work that needs none. Its largest size must be the CPUs of the node types
# without GPUs, which Ray does not tell a driver.

set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --no-compile --disable-pip-version-check 'ray[default]==2.60.0' 2>"$folder/pip.log" ||
    { cat "$folder/pip.log" >&2; exit 3; }
cd "$folder"
"$folder/venv/bin/python" - <<'PY'
import logging

logging.disable(logging.CRITICAL)
from ray.autoscaler._private.constants import AUTOSCALER_CONSERVE_GPU_NODES
from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ProtobufUtil, ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint

NODE_TYPES = {
    "head": NodeTypeConfig(name="head", min_worker_nodes=0, max_worker_nodes=1, resources={"CPU": 0}),
    "small": NodeTypeConfig(name="small", min_worker_nodes=0, max_worker_nodes=2, resources={"CPU": 8}),
    "gpu": NodeTypeConfig(name="gpu", min_worker_nodes=0, max_worker_nodes=4, resources={"CPU": 8, "GPU": 1}),
}


def launched(cpus, standing):
    """The nodes that start for so many requests of one CPU: waiting tasks, or a standing request."""
    requests = ResourceRequestUtil.group_by_count([ResourceRequestUtil.make({"CPU": 1})] * cpus)
    demand = {"resource_requests": requests}
    if standing:
        demand = {"cluster_resource_constraints": [ClusterResourceConstraint(resource_requests=requests)]}
    reply = ResourceDemandScheduler(None).schedule(
        SchedulingRequest(disable_launch_config_check=True, node_type_configs=NODE_TYPES, max_num_nodes=8, **demand)
    )
    return {launch.instance_type: launch.count for launch in reply.to_launch if launch.instance_type != "head"}


print("AUTOSCALER_CONSERVE_GPU_NODES is", AUTOSCALER_CONSERVE_GPU_NODES)
for standing in (False, True):
    kind = "ray.autoscaler.sdk.request_resources" if standing else "waiting tasks"
    few, many = launched(16, standing), launched(40, standing)
    print(f"{kind}: 16 CPUs start {few}; 40 CPUs start {many}")
    assert few == {"small": 2}, few
    assert many == {"small": 2, "gpu": 3}, many
PY
echo "as described"
