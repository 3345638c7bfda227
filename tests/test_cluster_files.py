"""Check the cluster files without a cluster: schemas, versions, resources, memory, secrets,
and the commands in the docs."""

from __future__ import annotations

import copy
import fnmatch
import re
import shlex
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import jsonschema  # type: ignore[import-untyped]
import pyarrow as pa
import pytest
import ray.data
import yaml
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.dashboard.modules.job.cli import logs, submit
from ray.scripts.scripts import cli as ray_cli

from coin_ray.commands.arguments import parse_run_arguments
from coin_ray.config import Collect, PipelineConfig, TrainingConfig
from coin_ray.config.presets import PRESETS
from coin_ray.stages import collect
from coin_ray.stages.collecting import pools
from coin_ray.stages.common import prediction as predicting
from coin_ray.stages.common import training_job as fitting

TOP = Path(__file__).parent.parent
LAUNCHED = ("cluster.yaml", "deploy/cluster-gcp.yaml", "deploy/cluster-onprem.yaml")
TYPED = LAUNCHED[:2]
KUBERNETES = ("deploy/raycluster.yaml", "deploy/rayjob.yaml")
PLAIN = ("Dockerfile", ".dockerignore", "docs/cluster.md", "docs/scale.md")
PROJECT = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
RAY_RANGE = SpecifierSet(
    next(d for d in PROJECT["dependencies"] if d.startswith("ray[")).partition("]")[2]
)


def _read_text(name: str) -> str:
    return (TOP / name).read_text()


def _read_yaml(name: str) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load(_read_text(name))
    return fields


def _ray_cluster_spec(name: str) -> dict[str, Any]:
    """Return the RayCluster spec of a Kubernetes file."""
    spec: dict[str, Any] = _read_yaml(name)["spec"]
    cluster_spec: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return cluster_spec


def _node_commands(name: str) -> list[str]:
    """Return all commands that a launched node runs."""
    fields = _read_yaml(name)
    kinds = (
        "initialization",
        "setup",
        "head_setup",
        "worker_setup",
        "head_start_ray",
        "worker_start_ray",
    )
    return [c for kind in kinds for c in fields.get(f"{kind}_commands", [])]


def _validate_like_ray_up(fields: dict[str, Any]) -> None:
    """Validate as ``ray up`` does: fill in defaults, then check Ray's schema and its rules
    on node types."""
    validate_config(prepare_config(copy.deepcopy(fields)))


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_s_own_check_accepts_the_cluster(name: str) -> None:
    _validate_like_ray_up(_read_yaml(name))


WRONG = [
    ({"max_worker": 3}, jsonschema.ValidationError),
    ({"idle_timeout_minutes": "ten"}, jsonschema.ValidationError),
    ({"provider": {"region": "us-west-2"}}, (jsonschema.ValidationError, KeyError)),
    ({"head_node_type": "boss"}, ValueError),
]


@pytest.mark.parametrize(("change", "error"), WRONG)
def test_ray_s_own_check_refuses_a_wrong_cluster(
    change: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        _validate_like_ray_up(_read_yaml("cluster.yaml") | change)


@pytest.mark.parametrize("name", TYPED)
def test_every_node_type_can_be_reached(name: str) -> None:
    fields = _read_yaml(name)
    types, head = fields["available_node_types"], fields["head_node_type"]
    assert head in types
    workers = {k: v for k, v in types.items() if k != head}
    assert all(
        0 <= v["min_workers"] <= v["max_workers"] and v["max_workers"] >= 1
        for v in workers.values()
    )
    assert sum(v["min_workers"] for v in workers.values()) <= fields["max_workers"]
    assert fields["max_workers"] >= sum(v["max_workers"] for v in workers.values()), (
        "a full type must not keep another one out"
    )
    assert all("role" in v["labels"] for v in types.values())
    assert len({v["labels"]["role"] for v in types.values()}) == len(types)


def _ray_versions(name: str) -> list[str]:
    return re.findall(
        r"rayproject/ray:(\d+\.\d+\.\d+)-py311", _read_text(name)
    ) + re.findall(r'rayVersion: "(.+)"', _read_text(name))


@pytest.mark.parametrize("name", [*TYPED, *KUBERNETES, "Dockerfile"])
def test_ray_is_pinned_within_the_range_of_the_package(name: str) -> None:
    versions = _ray_versions(name)
    assert versions
    assert all(Version(v) in RAY_RANGE for v in versions)
    assert (
        len({v for n in (*TYPED, *KUBERNETES, "Dockerfile") for v in _ray_versions(n)})
        == 1
    )
    assert ":latest" not in _read_text(name)
    assert Version("3.11") in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.parametrize("name", LAUNCHED)
def test_nodes_install_the_wheel_that_is_mounted(name: str) -> None:
    wheel = re.search(
        r'"([^"]*)/coin_ray-([\d.]+)-py3-none-any\.whl\[([\w,]+)\]"',
        "\n".join(_read_yaml(name)["setup_commands"]),
    )
    assert wheel is not None
    folder, version, extras = wheel.groups()
    assert version == PROJECT["version"]
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert "s3" in extras.split(",")
    assert _read_yaml(name)["file_mounts"][folder.replace("$HOME", "~")] == "dist"


@pytest.mark.parametrize("name", LAUNCHED)
def test_only_holders_of_the_token_reach_a_launched_cluster(name: str) -> None:
    fields = _read_yaml(name)
    (token_path,) = [
        path for path in fields["file_mounts"] if path.endswith("/.ray/auth_token")
    ]
    assert fields["file_mounts"][token_path] == "~/.ray/auth_token"
    set_for_all_commands = any(
        "RAY_AUTH_MODE=token" in option
        for option in fields.get("docker", {}).get("run_options", [])
    )
    starts = [c for c in _node_commands(name) if "ray start" in c]
    assert len(starts) == 2
    assert all(
        set_for_all_commands
        or re.search(r"RAY_AUTH_MODE=token (\S+=\S+ )*ray start", c)
        for c in starts
    )
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "0.0.0.0" not in _read_text(name)


def test_own_machines_name_their_addresses_and_find_ray_in_every_shell() -> None:
    """Ray takes 127.0.0.1 for a machine without a default route; ``ray down`` calls a
    bare ``ray stop``; the second autoscaler counts the head as a worker."""
    name = "deploy/cluster-onprem.yaml"
    head_ip = _read_yaml(name)["provider"]["head_ip"]
    head, worker = [c for c in _node_commands(name) if "ray start" in c]
    assert f"--node-ip-address={head_ip} " in head
    assert "RAY_enable_autoscaler_v2=0 " in head
    assert "--node-ip-address=$address " in worker
    assert "GLOO_SOCKET_IFNAME=$interface ray start" in worker
    assert "--block" in worker, "processes of Ray would outlive the head"
    (activation,) = [c for c in _node_commands(name) if c.endswith(">> ~/.bashrc")]
    assert "'source ~/coin_ray/venv/bin/activate'" in activation
    assert "'export RAY_AUTH_MODE=token'" in activation


def _health_check(name: str, setting: str) -> int:
    """Return a setting of Ray's health check, with which the head is started."""
    variable = f"RAY_health_check_{setting}"
    if name in LAUNCHED:
        (head,) = [c for c in _node_commands(name) if "ray start --head" in c]
        return int(re.findall(rf"{variable}=(\d+)", head)[0])
    spec = _ray_cluster_spec(name)["headGroupSpec"]["template"]["spec"]
    variables = {
        entry["name"]: entry["value"] for entry in spec["containers"][0]["env"]
    }
    return int(variables[variable])


@pytest.mark.parametrize("name", [*LAUNCHED, *KUBERNETES])
def test_a_lost_node_is_missed_soon_and_a_short_outage_loses_none(name: str) -> None:
    """Ray's defaults need 65 s. After 20 s without a network, TCP sends the first check
    again 25.4 s after it, and gets a reset, which counts as a failure of the check that
    runs then: it must not be the last one."""
    period = _health_check(name, "period_ms") / 1000
    timeout = _health_check(name, "timeout_ms") / 1000
    checks = _health_check(name, "failure_threshold")
    last_check_starts = (checks - 1) * (period + timeout)
    assert last_check_starts - period > 26.5
    assert last_check_starts + timeout + period <= 32


@pytest.mark.parametrize("name", KUBERNETES)
def test_only_holders_of_the_token_reach_a_cluster_on_kubernetes(name: str) -> None:
    assert _ray_cluster_spec(name)["authOptions"] == {"mode": "token"}


def _parse_bytes(size: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(g|Gi|)", size).groups()  # type: ignore[union-attr]
    return float(int(number) * (2**30 if unit else 1))


@pytest.mark.parametrize("name", TYPED)
def test_shared_memory_holds_the_object_store(name: str) -> None:
    (shared,) = [
        o.partition("=")[2]
        for o in _read_yaml(name)["docker"]["run_options"]
        if o.startswith("--shm-size")
    ]
    stores = re.findall(r"--object-store-memory=(\d+)", " ".join(_node_commands(name)))
    assert len(stores) == 2
    assert all(_parse_bytes(shared) >= 1.1 * _parse_bytes(store) for store in stores)


def _pod_groups(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    cluster = _ray_cluster_spec(name)
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_resources_are_well_formed(name: str) -> None:
    """Check the required fields of KubeRay's v1 resources and their values."""
    fields = _read_yaml(name)
    assert fields["apiVersion"] == "ray.io/v1"
    assert (
        fields["kind"]
        == {"deploy/raycluster.yaml": "RayCluster", "deploy/rayjob.yaml": "RayJob"}[
            name
        ]
    )
    assert len({"name", "generateName"} & set(fields["metadata"])) == 1
    assert _ray_cluster_spec(name)["enableInTreeAutoscaling"] is True
    for group_name, group in _pod_groups(name):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert group_name == "head" or {
            "groupName",
            "replicas",
            "minReplicas",
            "maxReplicas",
        } <= set(group)
        assert (
            group_name == "head"
            or 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        )
        assert all(isinstance(v, str) for v in group["rayStartParams"].values()), (
            "KubeRay wants text"
        )
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert pod["serviceAccountName"]
        (volume,) = pod["volumes"]
        assert container["volumeMounts"] == [
            {"name": volume["name"], "mountPath": "/dev/shm"}
        ]
        shared = _parse_bytes(volume["emptyDir"]["sizeLimit"])
        store = _parse_bytes(group["rayStartParams"]["object-store-memory"])
        assert (
            1.1 * store
            <= shared
            < _parse_bytes(container["resources"]["limits"]["memory"])
        )


def test_the_job_runs_on_the_cluster_of_the_other_file() -> None:
    assert _ray_cluster_spec("deploy/rayjob.yaml") == _ray_cluster_spec(
        "deploy/raycluster.yaml"
    )


def test_the_job_starts_the_pipeline_of_the_image() -> None:
    spec = _read_yaml("deploy/rayjob.yaml")["spec"]
    program, script, *arguments = shlex.split(spec["entrypoint"])
    assert (program, script) == ("python", f"{_image_workdir()}/pipelines/full.py")
    config, options = parse_run_arguments(arguments)
    assert options.root.startswith("s3://")
    assert config.cloud.max_usd is not None
    assert config.propagate.fit.gpu
    assert config.distill.fit.gpu
    assert set(yaml.safe_load(spec["runtimeEnvYAML"])) == {"env_vars"}
    assert spec["shutdownAfterJobFinishes"] is True
    assert spec["submissionMode"] in ("K8sJobMode", "HTTPMode", "SidecarMode")


# -- what the stages ask for

Resources = Mapping[str, float]


def _node_resources(name: str) -> list[Resources]:
    if name in KUBERNETES:
        return [
            {
                "CPU": float(group["rayStartParams"].get("num-cpus", limits["cpu"])),
                "GPU": float(limits.get("nvidia.com/gpu", 0)),
            }
            for _, group in _pod_groups(name)
            for limits in [
                group["template"]["spec"]["containers"][0]["resources"]["limits"]
            ]
        ]
    return [
        node["resources"] for node in _read_yaml(name)["available_node_types"].values()
    ]


def _holds(node: Resources, request: Resources) -> bool:
    return all(node.get(kind, 0) >= amount for kind, amount in request.items())


class _RecordingDataset:
    """Stands in for a dataset and records the resources that its actors request."""

    def __init__(self) -> None:
        self.requests: list[Resources] = []

    def map_batches(
        self, _: object, *, num_cpus: float, num_gpus: float = 0, **options: object
    ) -> _RecordingDataset:
        self.requests.append({"CPU": num_cpus, "GPU": num_gpus})
        return self

    def iter_batches(self, **_: object) -> Iterator[pa.Table]:
        return iter(())


def _requests_of_stages(
    monkeypatch: pytest.MonkeyPatch, config: PipelineConfig, cpus: int, largest: int
) -> dict[str, Resources]:
    """Return the resources that collect, training and predictions request of a cluster that
    has ``cpus`` at that moment, ``largest`` of them on one node."""
    dataset = _RecordingDataset()
    for module in (collect, fitting, predicting):
        monkeypatch.setattr(module, "cluster_cpus", lambda: cpus, raising=False)
        monkeypatch.setattr(module, "largest_node_cpus", lambda: largest, raising=False)
        monkeypatch.setattr(module, "on_cluster", lambda: True, raising=False)
        monkeypatch.setattr(module, "ensure_ray", lambda: None, raising=False)
    monkeypatch.setattr(ray.data, "from_blocks", lambda _: dataset)
    monkeypatch.setattr(pools, "cluster_cpus", lambda: cpus)
    list(collect._label_answers(dataset, config, "parts"))  # type: ignore[arg-type]
    list(
        predicting._predict_on_cluster(
            {"student": "x"}, pa.table({"uri": ["a"]}), config
        )
    )
    labeler, predictor = dataset.requests
    fit = fitting._scaling_config(config.distill.fit).resources_per_worker
    assert fit is not None
    return {"labeler": labeler, "fit": fit, "predictor": predictor}


def _config_on_gpus(labeler_gpus: float) -> PipelineConfig:
    preset = PRESETS["folder"]()
    fit = TrainingConfig(gpu=True)
    return replace(
        preset,
        collect=Collect(labeler_gpus=labeler_gpus),
        propagate=replace(preset.propagate, fit=fit),
        distill=replace(preset.distill, fit=fit),
    )


@pytest.mark.parametrize("labeler_gpus", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", [*TYPED, *KUBERNETES])
def test_some_node_type_has_what_the_stages_ask_for(
    monkeypatch: pytest.MonkeyPatch, name: str, labeler_gpus: float
) -> None:
    """The cluster has one node that trains, as after propagation with one worker."""
    nodes = _node_resources(name)
    (train,) = [n for n in nodes if n.get("GPU")]
    requests = _requests_of_stages(
        monkeypatch, _config_on_gpus(labeler_gpus), int(train["CPU"]), int(train["CPU"])
    )
    assert not [
        step
        for step, request in requests.items()
        if not any(_holds(n, request) for n in nodes)
    ]


@pytest.mark.parametrize(
    "training", [_config_on_gpus(1.0), PRESETS["folder"]()], ids=["gpus", "cpus"]
)
@pytest.mark.parametrize("name", [*TYPED, *KUBERNETES])
def test_some_node_type_has_what_the_stages_ask_for_while_other_nodes_are_there(
    monkeypatch: pytest.MonkeyPatch, name: str, training: PipelineConfig
) -> None:
    nodes = _node_resources(name)
    requests = _requests_of_stages(
        monkeypatch,
        training,
        int(2 * sum(n["CPU"] for n in nodes)),
        int(max(n["CPU"] for n in nodes)),
    )
    assert not [
        step
        for step, request in requests.items()
        if not any(_holds(n, request) for n in nodes)
    ]


def test_too_small_a_node_is_noticed() -> None:
    assert _holds({"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 0.5})
    assert not _holds({"CPU": 8}, {"CPU": 1, "GPU": 1})
    assert not _holds({"CPU": 0}, {"CPU": 1})


# -- secrets

SECRET_NAME = (
    r"[\w.-]*(?:token|secret|password|passwd|api[_-]?key|access[_-]?key|credential)"
    r"[\w.-]*"
)
SECRET_VALUES = (
    re.compile(r"AKIA[0-9A-Z]{16}"),
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY"),
    re.compile(r"https?://[^\s/:@]+:[^\s/:@$]+@"),
    re.compile(
        rf"(?i)\b{SECRET_NAME}\s*=\s*[\"']?(?![\"'$<(]|\s|\.\.\.)[\w+/.-]{{6,}}"
    ),
    re.compile(
        rf"(?im)^\s*-?\s*{SECRET_NAME}\s*:\s*[\"']?(?![\"'$<{{]|~/)[\w+/-]{{12,}}[\"']?\s*$"
    ),
)
NO_VALUES = ("--cloud.token-env", "SecretId", "secret=coin-ray-detector-token")


def _find_secret_values(file_text: str) -> list[str]:
    """Return the parts of a text that look like the value of a secret, not its name."""
    return [
        m.group()
        for pattern in SECRET_VALUES
        for m in pattern.finditer(file_text)
        if not any(n in m.group() for n in NO_VALUES)
    ]


@pytest.mark.parametrize("name", [*LAUNCHED, *KUBERNETES, *PLAIN])
def test_no_file_holds_the_value_of_a_secret(name: str) -> None:
    assert _find_secret_values(_read_text(name)) == []


PLANTED = [
    "export DETECTOR_TOKEN=abcdef123456",
    'DDS_API_TOKEN="0f8fad5b-d9cb"',
    "  aws_secret_access_key: wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY",
    "AKIAIOSFODNN7EXAMPLE",
    "-----BEGIN RSA PRIVATE KEY-----",
    "http://user:hunter22@mlflow.example.com",
]


@pytest.mark.parametrize("planted", PLANTED)
def test_the_value_of_a_secret_is_noticed(planted: str) -> None:
    assert _find_secret_values(_read_text("cluster.yaml") + planted + "\n")


@pytest.mark.parametrize("name", KUBERNETES)
def test_pods_get_secrets_by_name(name: str) -> None:
    for _, group in _pod_groups(name):
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "coin-ray-secrets"}}]
        names = [entry["name"] for entry in container.get("env", [])]
        assert all(name.startswith("RAY_health_check_") for name in names)


# -- the image


def _image_instructions() -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", " ", _read_text("Dockerfile"))
    lines = [
        line
        for line in joined.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def _image_workdir() -> str:
    return next(
        argument for kind, argument in _image_instructions() if kind == "WORKDIR"
    )


def _is_ignored(path: str) -> bool:
    """Whether .dockerignore excludes a top-level path: the last rule that matches counts."""
    is_included = True
    for rule in (line.strip() for line in _read_text(".dockerignore").splitlines()):
        if (
            rule
            and not rule.startswith("#")
            and fnmatch.fnmatch(path, rule.lstrip("!"))
        ):
            is_included = rule.startswith("!")
    return not is_included


def test_the_image_is_of_a_plain_user_and_a_pinned_base() -> None:
    kinds = [kind for kind, _ in _image_instructions()]
    assert set(kinds) <= {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER"}
    assert kinds[0] == "FROM"
    assert re.fullmatch(
        r"[\w/.-]+:\d+\.\d+\.\d+[\w.-]*", dict(_image_instructions())["FROM"]
    )
    assert [argument for kind, argument in _image_instructions() if kind == "USER"][
        -1
    ] not in (
        "root",
        "0",
    )


def test_the_image_gets_all_it_copies_and_nothing_else() -> None:
    copied = [
        p
        for kind, argument in _image_instructions()
        if kind == "COPY"
        for p in argument.split()[:-1]
        if not p.startswith("--")
    ]
    assert {"pyproject.toml", "coin_ray", "pipelines"} <= set(copied)
    assert all((TOP / path).exists() and not _is_ignored(path) for path in copied)
    assert all(
        _is_ignored(path)
        for path in (".env", ".git", ".venv", "runs", "dist", "mlflow.db", "tests")
    )
    assert PROJECT["readme"] in copied


def test_the_image_installs_extras_that_exist() -> None:
    (install,) = [
        argument
        for kind, argument in _image_instructions()
        if kind == "RUN" and argument.startswith("pip install")
    ]
    extras = re.search(r'"\.\[([\w,]+)\]"', install)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])


# -- the docs


def _documented_commands(name: str, start: str) -> list[list[str]]:
    """Return the commands in a document's code blocks that contain ``start``, as words."""
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", _read_text(name), re.S)
    lines = [
        line for block in blocks for line in re.sub(r"\\\n\s*", " ", block).splitlines()
    ]
    return [
        shlex.split(line, comments=True)
        for line in lines
        if start in line and not line.lstrip().startswith("#")
    ]


def test_documented_pipelines_are_understood() -> None:
    runs = [
        words[words.index("pipelines/full.py") + 1 :]
        for words in _documented_commands("docs/cluster.md", "python pipelines/full.py")
    ]
    assert len(runs) >= 4
    for arguments in runs:
        config, options = parse_run_arguments(arguments)
        assert config.preset
        assert "://" in options.root


def _documented_ray_arguments(name: str, *command: str) -> list[list[str]]:
    """Return the arguments of each documented ``ray COMMAND``, up to a redirection or pipe
    of the shell."""
    ray_command = ["ray", *command]
    calls = []
    for words in _documented_commands(name, " ".join(ray_command)):
        if words[: len(ray_command)] != ray_command and not words[0].startswith("RAY_"):
            continue  # inside another command's quotes
        arguments = words[words.index("ray") + len(ray_command) :]
        end = next(
            (n for n, word in enumerate(arguments) if word in (">", "|", ";", "&&")),
            len(arguments),
        )
        calls.append(arguments[:end])
    return calls


def test_documented_jobs_have_options_that_exist() -> None:
    jobs = _documented_ray_arguments("docs/cluster.md", "job", "submit")
    assert len(jobs) >= 4
    for arguments in jobs:
        context = submit.make_context("submit", arguments)
        assert context.params["working_dir"] == "."
        assert context.params["entrypoint"][:2] == ("python", "pipelines/full.py")
    (follow,) = _documented_ray_arguments("docs/cluster.md", "job", "logs")
    assert logs.make_context("logs", follow).params["follow"] is True


LAUNCHER = [
    ("up", 3),
    ("down", 3),
    ("dashboard", 3),
    ("exec", 4),
    ("attach", 1),
    ("monitor", 1),
    ("get-auth-token", 2),
    ("start", 2),
]


@pytest.mark.parametrize(("command", "times"), LAUNCHER)
def test_documented_launcher_commands_have_options_that_exist(
    command: str, times: int
) -> None:
    calls = _documented_ray_arguments("docs/cluster.md", command)
    assert len(calls) == times
    for arguments in calls:
        context = ray_cli.commands[command].make_context(command, arguments)
        assert (
            TOP / context.params.get("cluster_config_file", "cluster.yaml")
        ).is_file()


def test_an_option_that_does_not_exist_is_noticed() -> None:
    with pytest.raises(click.ClickException):
        submit.make_context(
            "submit", ["--working-directory", ".", "--", "python", "x.py"]
        )
