from __future__ import annotations

import asyncio
import importlib
import pickle
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from coin_ray.errors import ConfigError
from coin_ray.serving.server import create_app
from coin_ray.serving.student import load_served_predictor
from tests.builders import CLASSES
from tests.images import jpeg
from tests.serving.helpers import client_of, detect_request, post

cloudpickle = importlib.import_module("ray.cloudpickle")
pytest.importorskip("grpc_reflection", reason="needs the extra serve")
serve = importlib.import_module("ray.serve")
call_app_builder = importlib.import_module(
    "ray.serve._private.api"
).call_user_app_builder_with_args_if_necessary

import coin_ray.serving
from coin_ray.serving.application import (
    REQUESTS_MARGIN,
    ServeSettings,
    build,
    create_replica_app,
    settings_from_environment,
)

REQUESTS: list[Any] = [
    detect_request(jpeg(90), CLASSES),
    detect_request(jpeg(200, (60, 90)), ("cat",)),
    detect_request(b"text", CLASSES),
    detect_request(classes=("zebra",)),
    b"no json",
]


def _without_times(response: httpx.Response) -> tuple[int, dict[str, Any]]:
    body = {name: part for name, part in response.json().items() if name != "usage"}
    return response.status_code, body


def test_a_replica_s_application_answers_like_the_local_server(
    student_folder: str,
) -> None:
    local = post(create_app(load_served_predictor(student_folder)), *REQUESTS)
    settings = ServeSettings(serve="checkpoint", models=(student_folder,))
    replica = post(create_replica_app(settings), *REQUESTS)
    statuses = [response.status_code for response in replica]
    assert statuses == [200, 200, 415, 400, 400]
    assert replica[0].json()["detections"]
    assert list(map(_without_times, replica)) == list(map(_without_times, local))


def test_a_deployment_carries_its_settings_to_the_replica(student_folder: str) -> None:
    settings = ServeSettings(
        serve="checkpoint", models=(student_folder,), queue_max=7, replicas=3, gpus=0.5
    )
    deployment = build(settings)._bound_deployment
    assert (deployment.name, deployment.num_replicas) == ("coin-detector", 3)
    assert deployment.max_ongoing_requests == 7 + REQUESTS_MARGIN
    assert deployment.max_queued_requests == 7
    assert deployment.ray_actor_options["num_gpus"] == 0.5
    replica_class = pickle.loads(cloudpickle.dumps(deployment.func_or_class))

    async def health_of_failed_replica() -> Any:
        replica = replica_class.__new__(replica_class)
        await replica.__init__()  # as Ray calls it
        assert isinstance(replica.app, FastAPI)
        replica.check_health()
        replica.app.state.service.queue._failures = 100
        with pytest.raises(RuntimeError, match="has failed"):
            replica.check_health()
        async with client_of(replica.app) as client:
            return (await client.get("/health")).json()

    health = asyncio.run(health_of_failed_replica())
    assert (health["model"], health["queue_max"]) == ("harbour", 7)
    assert not health["ready"]


def test_serve_run_s_arguments_are_settings() -> None:
    arguments = {"serve": "onnx", "models": "a.onnx,b.onnx"}
    resources = {"gpus": "1", "replicas": "4"}
    deployment = call_app_builder(build, arguments | resources)._bound_deployment
    assert deployment.num_replicas == 4
    assert deployment.ray_actor_options["num_gpus"] == 1
    message = r"serving:build: 1 validation error for ServeSettings\nmodel\n"
    with pytest.raises(ConfigError, match=message):
        call_app_builder(build, {"model": "a.onnx"})


def test_settings_come_from_the_environment() -> None:
    environment = {
        "COIN_SERVE": "onnx",
        "COIN_SERVE_MODELS": "a.onnx,b.onnx",
        "COIN_SERVE_REPLICAS": "2",
        "COIN_SERVE_TOKEN_ENV": "KEY",
        "HOME": "/",
        "COIN": "1",
    }
    expected = ServeSettings(
        serve="onnx", models=("a.onnx", "b.onnx"), replicas=2, token_env="KEY"
    )
    assert settings_from_environment(environment) == expected
    assert settings_from_environment({}) == ServeSettings()
    assert coin_ray.serving.app._bound_deployment.name == "coin-detector"


WRONG_SETTINGS = [
    ({"COIN_SERVE": "yolo"}, "serve"),
    ({"COIN_SERVE_MODEL": "x"}, "model"),
    ({"COIN_SERVE_REPLICAS": "0"}, "replicas"),
    ({"COIN_SERVE_QUEUE_MAX": "many"}, "queue_max"),
]


@pytest.mark.parametrize(("environment", "name"), WRONG_SETTINGS)
def test_wrong_serve_settings_are_named(environment: dict[str, str], name: str) -> None:
    message = rf"COIN_SERVE_\*: 1 validation error for ServeSettings\n{name}\n"
    with pytest.raises(ConfigError, match=message):
        settings_from_environment(environment)


def test_a_secret_given_by_mistake_is_not_in_the_message() -> None:
    secret = "s3cret-0123"
    environment = {"COIN_SERVE_TOKEN": secret, "COIN_SERVE_CPUS": secret}
    with pytest.raises(ConfigError, match="token") as caught:
        settings_from_environment(environment)
    assert "s3cret" not in str(caught.value)


def test_without_the_token_s_variable_the_server_does_not_start(
    student_folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ServeSettings(
        serve="checkpoint", models=(student_folder,), token_env="DETECTOR_KEY"
    )
    monkeypatch.delenv("DETECTOR_KEY", raising=False)
    with pytest.raises(ConfigError, match="DETECTOR_KEY"):
        create_replica_app(settings)
    monkeypatch.setenv("DETECTOR_KEY", "right")
    app = create_replica_app(settings)
    (refused,) = post(app, detect_request())
    (answered,) = post(
        app, detect_request(classes=CLASSES), authorization="Bearer right"
    )
    assert (refused.status_code, answered.status_code) == (401, 200)


@pytest.fixture
def serving_url() -> Iterator[str]:
    """Ray with its HTTP proxy on a free port; yields the URL."""
    import ray

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(address="local", num_cpus=2, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()
    ray.shutdown()


@pytest.mark.slow
def test_under_ray_serve_the_answers_are_those_of_the_local_server(
    student_folder: str, serving_url: str
) -> None:
    settings = ServeSettings(serve="checkpoint", models=(student_folder,), cpus=0.5)
    serve.run(build(settings))
    with httpx.Client(base_url=serving_url, timeout=60) as client:
        assert client.get("/health").json()["classes"] == list(CLASSES)
        remote = []
        for body in REQUESTS:
            sent = {"content": body} if isinstance(body, bytes) else {"json": body}
            remote.append(client.post("/v1/detect", **sent))
    local = post(create_app(load_served_predictor(student_folder)), *REQUESTS)
    assert list(map(_without_times, remote)) == list(map(_without_times, local))
