"""Tracking with a real ``mlflow server``: what a run writes, and a server that is lost
during the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from builders import CLASSES, tiny_detector
from clusters import free_port
from PIL import Image

from coin_ray import storage
from coin_ray.config import PipelineConfig, Tracking
from coin_ray.config.presets import demo
from coin_ray.errors import ConfigError
from coin_ray.predictors.student import load_exported_student, write_exported_student
from coin_ray.runs import runner, steps
from coin_ray.runs.steps import Context, Metrics, Step
from coin_ray.runs.tracking import Tracker

mlflow = pytest.importorskip("mlflow")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

CURVE = [{"step": float(i), "loss": 1 / (i + 1)} for i in range(1200)]
METRICS: dict[str, dict[str, Any]] = {
    "images": {"digest": "d" * 64, "count": {"train": 3}},
    "distill": {"boxes": 7},
    "evaluate": {"map50": {"student": 0.5, "cloud": None}},
    "export": {"bytes": 9, "parameters": 3},
}


class Server:
    """An MLflow server on SQLite.

    A frozen server accepts connections and does not respond.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "mlflow",
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--workers",
            "1",
        ]
        command += [
            "--backend-store-uri",
            f"sqlite:///{self.folder}/server.db",
            "--artifacts-destination",
            str(self.folder / "artifacts"),
        ]
        environment = {
            **os.environ,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        log = (self.folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        give_up_at = time.monotonic() + 500
        while not self._answers():
            assert self.process.poll() is None, (
                self.folder / "server.log"
            ).read_text()[-2000:]
            assert time.monotonic() < give_up_at
            time.sleep(0.2)

    def _answers(self) -> bool:
        try:
            return httpx.get(f"{self.uri}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def freeze(self) -> None:
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("server"))
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def no_environment_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "false")


def _pipeline() -> dict[str, Step]:
    steps: dict[str, Step] = {}
    for name in METRICS:
        inputs = tuple(steps.values())
        steps[name] = Step(name, name, identity="a test's", inputs=inputs)
    return steps


def _config(
    server: Server, experiment: str, model: str | None = None
) -> PipelineConfig:
    return replace(
        demo(), tracking=Tracking(uri=server.uri, experiment=experiment, model=model)
    )


@pytest.fixture
def run_steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the steps that were run, by stages that train nothing."""
    return _replace_stages(monkeypatch, lambda name: None)


def _replace_stages(
    monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]
) -> list[str]:
    """Replace the stages by ones that write metrics, a curve and an export.

    ``before`` is called with a step's name. Returns the names of the steps that were run.
    """
    run_steps: list[str] = []

    def work(context: Context[PipelineConfig]) -> Metrics:
        before(context.name)
        run_steps.append(context.name)
        if context.name == "images":
            storage.write_bytes(storage.join(context.folder, "images.parquet"), b"rows")
        if context.name == "distill":
            storage.write_json(storage.join(context.folder, "curve.json"), CURVE)
        if context.name == "export":
            write_exported_student(
                tiny_detector(score_min=0.01), CLASSES, context.folder
            )
        return METRICS[context.name]

    monkeypatch.setattr(
        runner,
        "run_step",
        lambda step, config, root, _: steps.run_step(step, config, root, work),
    )
    return run_steps


def _child_runs(experiment: str, parent: str) -> dict[str, list[Any]]:
    """Return the runs below the parent, by stage."""
    runs = mlflow.search_runs(experiment_names=[experiment], output_format="list")
    children = [
        run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent
    ]
    return {
        name: [run for run in children if run.data.tags["stage"] == name]
        for name in METRICS
    }


def test_a_run_leaves_steps_curve_data_set_and_a_registered_model(
    server: Server,
    run_steps: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches: list[int] = []
    send = mlflow.MlflowClient.log_batch

    def log_batch(
        self: Any, run_id: str, metrics: Any = (), *args: Any, **kwargs: Any
    ) -> Any:
        batches.append(len(metrics))
        return send(self, run_id, metrics, *args, **kwargs)

    monkeypatch.setattr(mlflow.MlflowClient, "log_batch", log_batch)
    config = _config(server, "whole", model="harbour")
    for _ in range(2):  # the second time nothing is written
        runner.run_pipeline(config, _pipeline(), str(tmp_path))
    assert run_steps == list(METRICS)
    assert [size for size in batches if size > 100] == [500, 500, 200], (
        "a curve is written in few requests"
    )
    parent = Tracker(config, str(tmp_path)).parent_run
    child_runs = _child_runs("whole", parent)
    assert {name: len(runs) for name, runs in child_runs.items()} == dict.fromkeys(
        METRICS, 1
    )
    assert all(
        run.info.status == "FINISHED" for runs in child_runs.values() for run in runs
    )
    (distilled,) = child_runs["distill"]
    assert distilled.data.metrics["boxes"] == 7
    client = mlflow.MlflowClient()
    assert [
        point.step for point in client.get_metric_history(distilled.info.run_id, "loss")
    ] == list(range(1200))
    (linked,) = client.get_run(distilled.info.run_id).inputs.dataset_inputs
    assert (linked.dataset.name, linked.dataset.digest) == ("images", "d" * 36)
    assert "images.parquet" in linked.dataset.source
    assert client.get_run(parent).data.metrics["map50/student"] == 0.5
    version = client.get_model_version_by_alias("harbour", "champion")
    assert (version.version, version.run_id) == ("1", parent)
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 255, (80, 120, 3), np.uint8)
    )
    expected = load_exported_student(_pipeline()["export"].folder(str(tmp_path)))(
        picture
    )  # type: ignore[operator]
    (answer,) = mlflow.pyfunc.load_model("models:/harbour@champion").predict([picture])
    assert answer["boxes"] == expected.boxes.tolist()
    assert [
        CLASSES.index(name) for name in answer["labels"]
    ] == expected.labels.tolist()


@pytest.mark.parametrize("fault", ["stop", "freeze"])
def test_a_lost_server_does_not_stop_the_run_and_gets_what_it_missed(
    fault: str,
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def lose(name: str) -> None:
        if name == "distill":
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "3")
            monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
            getattr(server, fault)()

    run_steps = _replace_stages(monkeypatch, lose)
    config = _config(server, f"lost by a {fault}")
    try:
        summary = runner.run_pipeline(config, _pipeline(), str(tmp_path))
        assert run_steps == list(METRICS)
        assert summary.map50["student"] == 0.5
        printed = capsys.readouterr().out
        assert printed.count("tracking failed") == 1
        assert "the same command writes what is missing" in printed
    finally:
        server.thaw()
        if fault == "stop" and server.process.poll() is not None:
            server.start()
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    assert runner.run_pipeline(config, _pipeline(), str(tmp_path)) == summary
    assert run_steps == list(METRICS), "no step was done again"
    child_runs = _child_runs(
        f"lost by a {fault}", Tracker(config, str(tmp_path)).parent_run
    )
    assert {name: len(runs) for name, runs in child_runs.items()} == dict.fromkeys(
        METRICS, 1
    ), "an incomplete run was continued"
    assert all(
        run.info.status == "FINISHED" and "metrics.json" in _artifacts(run)
        for runs in child_runs.values()
        for run in runs
    )
    history = mlflow.MlflowClient().get_metric_history(
        child_runs["distill"][0].info.run_id, "loss"
    )
    assert {point.step for point in history} == set(range(1200))
    print(f"server lost ({fault}) in distill: no step and no figure lost")


def _artifacts(run: Any) -> set[str]:
    return {file.path for file in mlflow.MlflowClient().list_artifacts(run.info.run_id)}


def test_an_unreachable_server_is_an_error_before_any_step(
    run_steps: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = replace(demo(), tracking=Tracking(uri=f"http://127.0.0.1:{free_port()}"))
    with pytest.raises(
        ConfigError, match=r"tracking failed at http://127.0.0.1.*--tracking.no-enabled"
    ):
        runner.run_pipeline(config, _pipeline(), str(tmp_path))
    assert run_steps == []
