"""What the cluster files promise, without a cluster: schemas, versions, resources,
memory, secrets, and the commands in the docs."""

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
from coin_ray.config import Collect, TrainingConfig, PipelineConfig
from coin_ray.config.presets import PRESETS
from coin_ray.stages import collect
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


def text(name: str) -> str:
    return (TOP / name).read_text()


def load(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(text(name))
    return content


def cluster_of(name: str) -> dict[str, Any]:
    """The RayCluster spec of a Kubernetes file."""
    spec: dict[str, Any] = load(name)["spec"]
    found: dict[str, Any] = spec.get("rayClusterSpec", spec)
    return found


def commands(name: str) -> list[str]:
    """Everything that a launched node is told."""
    content = load(name)
    kinds = (
        "initialization",
        "setup",
        "head_setup",
        "worker_setup",
        "head_start_ray",
        "worker_start_ray",
    )
    return [c for kind in kinds for c in content.get(f"{kind}_commands", [])]


def check_launcher(content: dict[str, Any]) -> None:
    """As ``ray up`` does: defaults filled in, then Ray's schema and its rules on node
    types."""
    validate_config(prepare_config(copy.deepcopy(content)))


@pytest.mark.parametrize("name", LAUNCHED)
def test_ray_s_own_check_accepts_the_cluster(name: str) -> None:
    check_launcher(load(name))


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
        check_launcher(load("cluster.yaml") | change)


@pytest.mark.parametrize("name", TYPED)
def test_every_node_type_can_be_reached(name: str) -> None:
    content = load(name)
    types, head = content["available_node_types"], content["head_node_type"]
    assert head in types
    workers = {k: v for k, v in types.items() if k != head}
    assert all(
        0 <= v["min_workers"] <= v["max_workers"] and v["max_workers"] >= 1
        for v in workers.values()
    )
    assert sum(v["min_workers"] for v in workers.values()) <= content["max_workers"]
    assert content["max_workers"] >= sum(v["max_workers"] for v in workers.values()), (
        "a full type must not keep another one out"
    )
    assert all("role" in v["labels"] for v in types.values())
    assert len({v["labels"]["role"] for v in types.values()}) == len(types)


def ray_versions(name: str) -> list[str]:
    return re.findall(r"rayproject/ray:(\d+\.\d+\.\d+)-py311", text(name)) + re.findall(
        r'rayVersion: "(.+)"', text(name)
    )


@pytest.mark.parametrize("name", [*TYPED, *KUBERNETES, "Dockerfile"])
def test_ray_is_pinned_within_the_range_of_the_package(name: str) -> None:
    found = ray_versions(name)
    assert found
    assert all(Version(v) in RAY_RANGE for v in found)
    assert (
        len({v for n in (*TYPED, *KUBERNETES, "Dockerfile") for v in ray_versions(n)})
        == 1
    )
    assert ":latest" not in text(name)
    assert Version("3.11") in SpecifierSet(PROJECT["requires-python"])


@pytest.mark.parametrize("name", LAUNCHED)
def test_nodes_install_the_wheel_that_is_mounted(name: str) -> None:
    wheel = re.search(
        r'"([^"]*)/coin_ray-([\d.]+)-py3-none-any\.whl\[([\w,]+)\]"',
        "\n".join(load(name)["setup_commands"]),
    )
    assert wheel is not None
    folder, version, extras = wheel.groups()
    assert version == PROJECT["version"]
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert "s3" in extras.split(",")
    assert load(name)["file_mounts"][folder.replace("$HOME", "~")] == "dist"


@pytest.mark.parametrize("name", LAUNCHED)
def test_only_holders_of_the_token_reach_a_launched_cluster(name: str) -> None:
    content = load(name)
    (mounted,) = [
        place for place in content["file_mounts"] if place.endswith("/.ray/auth_token")
    ]
    assert content["file_mounts"][mounted] == "~/.ray/auth_token"
    everywhere = any(
        "RAY_AUTH_MODE=token" in option
        for option in content.get("docker", {}).get("run_options", [])
    )
    starts = [c for c in commands(name) if "ray start" in c]
    assert len(starts) == 2
    assert all(everywhere or "RAY_AUTH_MODE=token ray start" in c for c in starts)
    assert "--dashboard-host=127.0.0.1" in starts[0]
    assert "0.0.0.0" not in text(name)


@pytest.mark.parametrize("name", KUBERNETES)
def test_only_holders_of_the_token_reach_a_cluster_on_kubernetes(name: str) -> None:
    assert cluster_of(name)["authOptions"] == {"mode": "token"}


def bytes_of(size: str) -> float:
    number, unit = re.fullmatch(r"(\d+)(g|Gi|)", size).groups()  # type: ignore[union-attr]
    return float(int(number) * (2**30 if unit else 1))


@pytest.mark.parametrize("name", TYPED)
def test_shared_memory_holds_the_object_store(name: str) -> None:
    (shared,) = [
        o.partition("=")[2]
        for o in load(name)["docker"]["run_options"]
        if o.startswith("--shm-size")
    ]
    stores = re.findall(r"--object-store-memory=(\d+)", " ".join(commands(name)))
    assert len(stores) == 2
    assert all(bytes_of(shared) >= 1.1 * bytes_of(store) for store in stores)


def groups(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    cluster = cluster_of(name)
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


@pytest.mark.parametrize("name", KUBERNETES)
def test_kubernetes_resources_are_well_formed(name: str) -> None:
    """The required fields of KubeRay's v1 resources, and what they are to be."""
    content = load(name)
    assert content["apiVersion"] == "ray.io/v1"
    assert (
        content["kind"]
        == {"deploy/raycluster.yaml": "RayCluster", "deploy/rayjob.yaml": "RayJob"}[
            name
        ]
    )
    assert len({"name", "generateName"} & set(content["metadata"])) == 1
    assert cluster_of(name)["enableInTreeAutoscaling"] is True
    for group_name, group in groups(name):
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
        shared = bytes_of(volume["emptyDir"]["sizeLimit"])
        store = bytes_of(group["rayStartParams"]["object-store-memory"])
        assert (
            1.1 * store <= shared < bytes_of(container["resources"]["limits"]["memory"])
        )


def test_the_job_runs_on_the_cluster_of_the_other_file() -> None:
    assert cluster_of("deploy/rayjob.yaml") == cluster_of("deploy/raycluster.yaml")


def test_the_job_starts_the_pipeline_of_the_image() -> None:
    spec = load("deploy/rayjob.yaml")["spec"]
    program, script, *arguments = shlex.split(spec["entrypoint"])
    assert (program, script) == ("python", f"{workdir()}/pipelines/full.py")
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


def node_types(name: str) -> list[Resources]:
    if name in KUBERNETES:
        return [
            {
                "CPU": float(group["rayStartParams"].get("num-cpus", limits["cpu"])),
                "GPU": float(limits.get("nvidia.com/gpu", 0)),
            }
            for _, group in groups(name)
            for limits in [
                group["template"]["spec"]["containers"][0]["resources"]["limits"]
            ]
        ]
    return [node["resources"] for node in load(name)["available_node_types"].values()]


def holds(node: Resources, asked: Resources) -> bool:
    return all(node.get(kind, 0) >= amount for kind, amount in asked.items())


class Recorder:
    """Stands for a dataset and remembers what its actors ask for."""

    def __init__(self) -> None:
        self.asked: list[Resources] = []

    def map_batches(
        self, _: object, *, num_cpus: float, num_gpus: float = 0, **more: object
    ) -> Recorder:
        self.asked.append({"CPU": num_cpus, "GPU": num_gpus})
        return self

    def iter_batches(self, **_: object) -> Iterator[pa.Table]:
        return iter(())


def asked_by_stages(
    monkeypatch: pytest.MonkeyPatch, config: PipelineConfig, cpus: int, largest: int
) -> dict[str, Resources]:
    """What collect, the fits and predictions would ask of a cluster that has ``cpus``
    at that moment, ``largest`` of them on one node."""
    recorder = Recorder()
    for module in (collect, fitting, predicting):
        monkeypatch.setattr(module, "cluster_cpus", lambda: cpus, raising=False)
        monkeypatch.setattr(module, "largest_node_cpus", lambda: largest, raising=False)
        monkeypatch.setattr(module, "on_cluster", lambda: True, raising=False)
        monkeypatch.setattr(module, "ensure_ray", lambda: None, raising=False)
    monkeypatch.setattr(ray.data, "from_arrow", lambda _, **__: recorder)
    list(collect._label_answers(recorder, config, "parts"))  # type: ignore[arg-type]
    list(predicting._predict_on_cluster({"student": "x"}, pa.table({"uri": ["a"]}), config))
    labeler, predictor = recorder.asked
    fit = fitting._scaling_config(config.distill.fit).resources_per_worker
    assert fit is not None
    return {"labeler": labeler, "fit": fit, "predictor": predictor}


def on_gpus(labeler_gpus: float) -> PipelineConfig:
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
    """While one node that trains is there, as after propagation with one worker."""
    nodes = node_types(name)
    (train,) = [n for n in nodes if n.get("GPU")]
    asked = asked_by_stages(
        monkeypatch, on_gpus(labeler_gpus), int(train["CPU"]), int(train["CPU"])
    )
    assert not [
        step
        for step, wanted in asked.items()
        if not any(holds(n, wanted) for n in nodes)
    ]


@pytest.mark.parametrize(
    "training", [on_gpus(1.0), PRESETS["folder"]()], ids=["gpus", "cpus"]
)
@pytest.mark.parametrize("name", [*TYPED, *KUBERNETES])
def test_some_node_type_has_what_the_stages_ask_for_while_other_nodes_are_there(
    monkeypatch: pytest.MonkeyPatch, name: str, training: PipelineConfig
) -> None:
    nodes = node_types(name)
    asked = asked_by_stages(
        monkeypatch,
        training,
        int(2 * sum(n["CPU"] for n in nodes)),
        int(max(n["CPU"] for n in nodes)),
    )
    assert not [
        step
        for step, wanted in asked.items()
        if not any(holds(n, wanted) for n in nodes)
    ]


def test_too_small_a_node_is_noticed() -> None:
    assert holds({"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 0.5})
    assert not holds({"CPU": 8}, {"CPU": 1, "GPU": 1})
    assert not holds({"CPU": 0}, {"CPU": 1})


# -- secrets

SECRET_NAME = r"[\w.-]*(?:token|secret|password|passwd|api[_-]?key|access[_-]?key|credential)[\w.-]*"
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


def secret_values(content: str) -> list[str]:
    """What looks like the value of a secret, not the name of one."""
    return [
        m.group()
        for pattern in SECRET_VALUES
        for m in pattern.finditer(content)
        if not any(n in m.group() for n in NO_VALUES)
    ]


@pytest.mark.parametrize("name", [*LAUNCHED, *KUBERNETES, *PLAIN])
def test_no_file_holds_the_value_of_a_secret(name: str) -> None:
    assert secret_values(text(name)) == []


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
    assert secret_values(text("cluster.yaml") + planted + "\n")


@pytest.mark.parametrize("name", KUBERNETES)
def test_pods_get_secrets_by_name(name: str) -> None:
    for _, group in groups(name):
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "coin-ray-secrets"}}]
        assert "env" not in container


# -- the image


def instructions() -> list[tuple[str, str]]:
    joined = re.sub(r"\\\n\s*", " ", text("Dockerfile"))
    lines = [
        line
        for line in joined.splitlines()
        if line.strip() and not line.startswith("#")
    ]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def workdir() -> str:
    return next(value for kind, value in instructions() if kind == "WORKDIR")


def ignored(path: str) -> bool:
    """Whether .dockerignore keeps a top-level path out: the last rule that matches
    counts."""
    kept = True
    for rule in (line.strip() for line in text(".dockerignore").splitlines()):
        if (
            rule
            and not rule.startswith("#")
            and fnmatch.fnmatch(path, rule.lstrip("!"))
        ):
            kept = rule.startswith("!")
    return not kept


def test_the_image_is_of_a_plain_user_and_a_pinned_base() -> None:
    kinds = [kind for kind, _ in instructions()]
    assert set(kinds) <= {"FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER"}
    assert kinds[0] == "FROM"
    assert re.fullmatch(r"[\w/.-]+:\d+\.\d+\.\d+[\w.-]*", dict(instructions())["FROM"])
    assert [value for kind, value in instructions() if kind == "USER"][-1] not in (
        "root",
        "0",
    )


def test_the_image_gets_all_it_copies_and_nothing_else() -> None:
    copied = [
        p
        for kind, value in instructions()
        if kind == "COPY"
        for p in value.split()[:-1]
        if not p.startswith("--")
    ]
    assert {"pyproject.toml", "coin_ray", "pipelines"} <= set(copied)
    assert all((TOP / path).exists() and not ignored(path) for path in copied)
    assert all(
        ignored(path)
        for path in (".env", ".git", ".venv", "runs", "dist", "mlflow.db", "tests")
    )
    assert PROJECT["readme"] in copied


def test_the_image_installs_extras_that_exist() -> None:
    (install,) = [
        value
        for kind, value in instructions()
        if kind == "RUN" and value.startswith("pip install")
    ]
    extras = re.search(r'"\.\[([\w,]+)\]"', install)
    assert extras is not None
    assert set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])


# -- the docs


def documented(name: str, start: str) -> list[list[str]]:
    """Commands in a document's code blocks that contain ``start``, as words."""
    blocks = re.findall(r"```(?:bash|sh)?\n(.*?)```", text(name), re.S)
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
        for words in documented("docs/cluster.md", "python pipelines/full.py")
    ]
    assert len(runs) >= 4
    for arguments in runs:
        config, options = parse_run_arguments(arguments)
        assert config.preset
        assert "://" in options.root


def calls_of_ray(name: str, *command: str) -> list[list[str]]:
    """Arguments of each documented ``ray COMMAND``, up to what is the shell's."""
    wanted = ["ray", *command]
    found = []
    for words in documented(name, " ".join(wanted)):
        if words[: len(wanted)] != wanted and not words[0].startswith("RAY_"):
            continue  # inside another command's quotes
        rest = words[words.index("ray") + len(wanted) :]
        end = next(
            (n for n, word in enumerate(rest) if word in (">", "|", ";", "&&")),
            len(rest),
        )
        found.append(rest[:end])
    return found


def test_documented_jobs_have_options_that_exist() -> None:
    jobs = calls_of_ray("docs/cluster.md", "job", "submit")
    assert len(jobs) >= 4
    for arguments in jobs:
        context = submit.make_context("submit", arguments)
        assert context.params["working_dir"] == "."
        assert context.params["entrypoint"][:2] == ("python", "pipelines/full.py")
    (follow,) = calls_of_ray("docs/cluster.md", "job", "logs")
    assert logs.make_context("logs", follow).params["follow"] is True


LAUNCHER = [
    ("up", 3),
    ("down", 3),
    ("dashboard", 3),
    ("exec", 3),
    ("attach", 1),
    ("monitor", 1),
    ("get-auth-token", 1),
    ("start", 2),
]


@pytest.mark.parametrize(("command", "times"), LAUNCHER)
def test_documented_launcher_commands_have_options_that_exist(
    command: str, times: int
) -> None:
    calls = calls_of_ray("docs/cluster.md", command)
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
