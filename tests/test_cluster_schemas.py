"""Check Google's and Kubernetes' files against the fields of their APIs, offline.

The schemas are closed: a field that the API does not have is an error, which the launcher
or the operator would only say (or drop) once machines are paid for. Sources: Compute
Engine v1, ``Instance``; KubeRay 1.6, ``ray.io/v1`` RayCluster and RayJob; Kubernetes 1.33,
PodSpec. Fields that no file uses are left out where a misspelling can't reach them.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]
import pytest
import yaml

DEPLOY = Path(__file__).parents[1] / "deploy"
Schema = dict[str, Any]

TEXT: Schema = {"type": "string", "minLength": 1}
FLAG: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
INT64: Schema = {"type": ["integer", "string"], "pattern": r"^\d+$"}
QUANTITY: Schema = {
    "type": ["integer", "string"],
    "pattern": r"^\d+(\.\d+)?(m|k|M|G|T|Ki|Mi|Gi|Ti)?$",
}
TEXTS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def _fields(required: str = "", **properties: Schema) -> Schema:
    """Return the schema of an object with these fields and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def _list_of(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def _one_of(*words: str) -> Schema:
    return {"enum": list(words)}


# -- Compute Engine

INSTANCE = _fields(
    "machineType disks",
    machineType=TEXT,
    disks=_list_of(
        _fields(
            boot=FLAG,
            autoDelete=FLAG,
            type=_one_of("PERSISTENT", "SCRATCH"),
            initializeParams=_fields(diskSizeGb=INT64, sourceImage=TEXT, diskType=TEXT),
        )
    ),
    serviceAccounts=_list_of(
        _fields("email scopes", email=TEXT, scopes=_list_of(TEXT))
    ),
    scheduling=_fields(
        preemptible=FLAG,
        automaticRestart=FLAG,
        onHostMaintenance=_one_of("MIGRATE", "TERMINATE"),
        provisioningModel=_one_of("STANDARD", "SPOT"),
        instanceTerminationAction=_one_of("STOP", "DELETE"),
    ),
    metadata=_fields(items=_list_of(_fields("key", key=TEXT, value=TEXT))),
    guestAccelerators=_list_of(_fields(acceleratorType=TEXT, acceleratorCount=COUNT)),
    labels=TEXTS,
)

# -- Kubernetes

RESOURCES = _fields(
    limits={"type": "object", "additionalProperties": QUANTITY},
    requests={"type": "object", "additionalProperties": QUANTITY},
)
CONTAINER = _fields(
    "name image",
    name=TEXT,
    image=TEXT,
    imagePullPolicy=_one_of("Always", "IfNotPresent", "Never"),
    command=_list_of(TEXT),
    args=_list_of(TEXT),
    envFrom=_list_of(_fields(secretRef=_fields("name", name=TEXT, optional=FLAG))),
    env=_list_of(_fields("name", name=TEXT, value={"type": "string"})),
    ports=_list_of(_fields("containerPort", containerPort=COUNT, name=TEXT)),
    resources=RESOURCES,
    volumeMounts=_list_of(
        _fields("name mountPath", name=TEXT, mountPath=TEXT, readOnly=FLAG)
    ),
)
TOLERATION = _fields(
    key=TEXT,
    operator=_one_of("Exists", "Equal"),
    value={"type": "string"},
    effect=_one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
    tolerationSeconds=COUNT,
)
VOLUME = _fields(
    "name",
    name=TEXT,
    emptyDir=_fields(medium=_one_of("", "Memory"), sizeLimit=QUANTITY),
)
POD = _fields(
    "spec",
    metadata=_fields(labels=TEXTS, annotations=TEXTS),
    spec=_fields(
        "containers",
        containers=_list_of(CONTAINER),
        serviceAccountName=TEXT,
        tolerations=_list_of(TOLERATION),
        nodeSelector=TEXTS,
        restartPolicy=_one_of("Always", "OnFailure", "Never"),
        volumes=_list_of(VOLUME),
    ),
)
HEAD = _fields("template", rayStartParams=TEXTS, template=POD, serviceType=TEXT)
WORKERS = _fields(
    "groupName minReplicas maxReplicas template",
    groupName={"type": "string", "pattern": "^[a-z0-9]([a-z0-9-]*[a-z0-9])?$"},
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    idleTimeoutSeconds=COUNT,
    rayStartParams=TEXTS,
    template=POD,
)
RAY_CLUSTER = _fields(
    "headGroupSpec",
    rayVersion=TEXT,
    authOptions=_fields(mode=_one_of("disabled", "token"), secretName=TEXT),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=_fields(
        version=_one_of("v1", "v2"),
        upscalingMode=_one_of("Default", "Aggressive", "Conservative"),
        idleTimeoutSeconds=COUNT,
        resources=RESOURCES,
    ),
    headGroupSpec=HEAD,
    workerGroupSpecs=_list_of(WORKERS),
)
RAY_JOB = _fields(
    entrypoint=TEXT,
    runtimeEnvYAML=TEXT,
    submissionMode=_one_of("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
    backoffLimit=COUNT,
    activeDeadlineSeconds=COUNT,
    shutdownAfterJobFinishes=FLAG,
    ttlSecondsAfterFinished=COUNT,
    rayClusterSpec=RAY_CLUSTER,
)


def _kind(name: str, spec: Schema) -> Schema:
    return _fields(
        "apiVersion kind metadata spec",
        apiVersion={"const": "ray.io/v1"},
        kind={"const": name},
        metadata=_fields(name=TEXT, generateName=TEXT, labels=TEXTS),
        spec=spec,
    )


KINDS = {
    "raycluster.yaml": _kind("RayCluster", RAY_CLUSTER),
    "rayjob.yaml": _kind("RayJob", RAY_JOB),
}


def _read(name: str) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return fields


def _node_configs() -> dict[str, dict[str, Any]]:
    types = _read("cluster-gcp.yaml")["available_node_types"]
    return {name: node_type["node_config"] for name, node_type in types.items()}


def _problems(fields: dict[str, Any], schema: Schema) -> list[str]:
    errors = jsonschema.Draft202012Validator(schema).iter_errors(fields)
    return [f"{error.json_path}: {error.message}" for error in errors]


@pytest.mark.parametrize("name", _node_configs())
def test_google_has_every_field_of_a_node(name: str) -> None:
    assert _problems(_node_configs()[name], INSTANCE) == []


def test_a_node_with_a_gpu_can_be_preempted_and_is_not_migrated() -> None:
    """Machines with GPUs can't be migrated: Compute Engine refuses them otherwise."""
    scheduling = _node_configs()["train"]["scheduling"]
    assert scheduling["preemptible"] is True
    assert scheduling["onHostMaintenance"] == "TERMINATE"
    assert scheduling["automaticRestart"] is False


@pytest.mark.parametrize("name", KINDS)
def test_kubernetes_has_every_field_of_a_file(name: str) -> None:
    assert _problems(_read(name), KINDS[name]) == []


def test_a_job_s_cluster_is_deleted_after_a_time_only_if_it_is_deleted_at_all() -> None:
    spec = _read("rayjob.yaml")["spec"]
    assert "ttlSecondsAfterFinished" not in spec or spec["shutdownAfterJobFinishes"]


MISTAKES = [
    ("scheduling", [{"preemptible": True}], "$.scheduling"),
    ("machinetype", "g2-standard-8", "'machinetype' was unexpected"),
    ("metadata", {"items": [{"key": "a", "value": True}]}, "$.metadata.items[0].value"),
]


@pytest.mark.parametrize(("field", "content", "problem"), MISTAKES)
def test_a_mistake_in_google_s_file_is_noticed(
    field: str, content: object, problem: str
) -> None:
    (message,) = _problems(_node_configs()["train"] | {field: content}, INSTANCE)
    assert problem in message


def test_mistakes_in_kubernetes_files_are_noticed() -> None:
    fields = copy.deepcopy(_read("raycluster.yaml"))
    workers = fields["spec"]["workerGroupSpecs"][0]
    workers["maxReplica"] = workers.pop("maxReplicas")
    workers["rayStartParams"]["num-cpus"] = 8
    fields["spec"]["headGroupSpec"]["template"]["spec"]["container"] = []
    assert len(_problems(fields, KINDS["raycluster.yaml"])) == 4
