"""Launch ``cluster.yaml`` by Ray's own launcher and autoscaler against a stand-in of EC2
and IAM. No address outside this process is used."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
import yaml
from moto import mock_aws
from ray.autoscaler._private.aws.config import bootstrap_aws
from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
from ray.autoscaler._private.node_provider_availability_tracker import (
    NodeAvailabilitySummary,
)
from ray.autoscaler._private.resource_demand_scheduler import ResourceDemandScheduler
from ray.autoscaler._private.util import prepare_config

from coin_ray.stages.collecting.pools import potential_cpus

CLUSTER_FILE = Path(__file__).parents[1] / "cluster.yaml"
PROFILES = ("coin-ray-head", "coin-ray-worker")
TRUST_POLICY = {
    "Version": "2012-10-17",
    "Statement": [
        {
            "Effect": "Allow",
            "Principal": {"Service": "ec2.amazonaws.com"},
            "Action": "sts:AssumeRole",
        }
    ],
}
Cluster = tuple[dict[str, Any], AWSNodeProvider]

pytestmark = pytest.mark.slow


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Cluster]:
    """The cluster's file as ``ray up`` completes it on AWS, and the provider of its
    nodes."""
    (tmp_path / ".ssh").mkdir()
    for name, setting in {
        "HOME": str(tmp_path),
        "AWS_ACCESS_KEY_ID": "stand-in",
        "AWS_SECRET_ACCESS_KEY": "stand-in",
        "AWS_DEFAULT_REGION": "us-west-2",
    }.items():
        monkeypatch.setenv(name, setting)
    with mock_aws():
        _create_profiles()
        config = bootstrap_aws(prepare_config(yaml.safe_load(CLUSTER_FILE.read_text())))
        yield config, AWSNodeProvider(config["provider"], config["cluster_name"])


def _create_profiles() -> None:
    iam = boto3.client("iam")
    for name in PROFILES:
        policy = json.dumps(TRUST_POLICY)
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=policy)
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)


def _launch(cluster: Cluster, node_type: str) -> None:
    config, provider = cluster
    node_config = config["available_node_types"][node_type]["node_config"]
    tags = {
        "ray-node-type": "head" if node_type == "head" else "worker",
        "ray-user-node-type": node_type,
        "ray-node-name": f"coin-ray-{node_type}",
        "ray-launch-config": "first",
    }
    provider.create_node(copy.deepcopy(node_config), tags, 1)


def _running_instances() -> list[dict[str, Any]]:
    reservations = boto3.client("ec2").describe_instances()["Reservations"]
    instances = [i for reservation in reservations for i in reservation["Instances"]]
    return [i for i in instances if i["State"]["Name"] in ("pending", "running")]


def _nodes_to_launch(
    cluster: Cluster, demands: list[dict[str, float]]
) -> dict[str, int]:
    """Return how many nodes of each type Ray's autoscaler starts for these requests when
    only the head is there."""
    config, provider = cluster
    scheduler = ResourceDemandScheduler(
        provider,
        config["available_node_types"],
        config["max_workers"],
        config["head_node_type"],
        config["upscaling_speed"],
    )
    nodes, unfulfilled = scheduler.get_nodes_to_launch(
        nodes=provider.non_terminated_nodes({}),
        launching_nodes={},
        resource_demands=demands,
        unused_resources_by_ip={},
        pending_placement_groups=[],
        max_resources_by_ip={},
        ensure_min_cluster_size=[],
        node_availability_summary=NodeAvailabilitySummary({}),
    )
    assert unfulfilled == []
    return {name: count for name, count in nodes.items() if count}


def test_the_head_has_its_type_and_its_profile(cluster: Cluster) -> None:
    _launch(cluster, "head")
    (instance,) = _running_instances()
    assert instance["InstanceType"] == "m7i.xlarge"
    assert instance["IamInstanceProfile"]["Arn"].endswith("/coin-ray-head")
    assert "InstanceLifecycle" not in instance, "the head must not be a spot machine"


def test_only_nodes_that_a_step_requests_are_launched(cluster: Cluster) -> None:
    _launch(cluster, "head")
    assert _nodes_to_launch(cluster, []) == {}
    assert _nodes_to_launch(cluster, [{"CPU": 1.0}] * 6) == {"label": 1}
    labelers = int(potential_cpus(cluster[0]) or 0) - 1
    assert _nodes_to_launch(cluster, [{"CPU": 1.0}] * labelers) == {"label": 4}
    training = [{"CPU": 1.0, "GPU": 1.0}]
    assert _nodes_to_launch(cluster, training) == {"train": 1}
    assert _nodes_to_launch(cluster, training * 2) == {"train": 2}


def test_training_runs_on_the_spot_market(cluster: Cluster) -> None:
    _launch(cluster, "train")
    (instance,) = _running_instances()
    assert instance["InstanceType"] == "g6.2xlarge"
    assert instance["InstanceLifecycle"] == "spot"
    assert instance["IamInstanceProfile"]["Arn"].endswith("/coin-ray-worker")


def test_all_machines_end_with_the_cluster(cluster: Cluster) -> None:
    for node_type in ("head", "label", "train"):
        _launch(cluster, node_type)
    types = Counter(i["InstanceType"] for i in _running_instances())
    assert types == {"m7i.xlarge": 1, "m7i.2xlarge": 1, "g6.2xlarge": 1}
    _, provider = cluster
    provider.terminate_nodes(provider.non_terminated_nodes({}))
    assert _running_instances() == []
