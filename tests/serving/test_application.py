from __future__ import annotations

import asyncio
import importlib
import json
import pickle
import socket
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from coin_ray.errors import ConfigError
from coin_ray.predictors.student import write_exported
from coin_ray.serving.local_cloud import create_app
from coin_ray.serving.student import load_student
from tests.builders import CLASSES, tiny_detector
from tests.serving.test_local_cloud import call, jpeg, post

cloudpickle = importlib.import_module("ray.cloudpickle")
pytest.importorskip("grpc_reflection", reason="needs the extra serve")
serve = importlib.import_module("ray.serve")
serve_builder = importlib.import_module(
    "ray.serve._private.api"
).call_user_app_builder_with_args_if_necessary

import coin_ray.serving  # noqa: E402
from coin_ray.serving.application import (
    MARGIN,
    Arguments,
    asgi_app,
    build,
    from_environment,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    place = str(tmp_path_factory.mktemp("runs") / "harbour")
    write_exported(tiny_detector(score_min=0.01), CLASSES, place)
    return place


QUESTIONS: list[Any] = [
    call(jpeg(90), CLASSES),
    call(jpeg(200, (60, 90)), ("cat",)),
    call(b"text", CLASSES),
    call(classes=("zebra",)),
    b"no json",
]


def without_times(response: httpx.Response) -> tuple[int, dict[str, Any]]:
    return response.status_code, {
        k: v for k, v in response.json().items() if k != "usage"
    }


def test_a_replica_s_application_answers_like_the_local_server(folder: str) -> None:
    twin = post(create_app(load_student(folder)), *QUESTIONS)
    replica = post(
        asgi_app(Arguments(serve="checkpoint", models=(folder,))), *QUESTIONS
    )
    assert [r.status_code for r in replica] == [200, 200, 415, 400, 400]
    assert replica[0].json()["detections"]
    assert list(map(without_times, replica)) == list(map(without_times, twin))


def test_a_deployment_carries_its_settings_to_the_replica(folder: str) -> None:
    arguments = Arguments(
        serve="checkpoint", models=(folder,), queue_max=7, replicas=3, gpus=0.5
    )
    deployment = build(arguments)._bound_deployment
    assert (deployment.name, deployment.num_replicas) == ("coin-detector", 3)
    assert (deployment.max_ongoing_requests, deployment.max_queued_requests) == (
        7 + MARGIN,
        7,
    )
    assert deployment.ray_actor_options["num_gpus"] == 0.5
    kind = pickle.loads(cloudpickle.dumps(deployment.func_or_class))

    async def health() -> Any:
        replica = kind.__new__(kind)
        await replica.__init__()  # as Ray calls it
        assert isinstance(replica.app, FastAPI)
        replica.check_health()
        replica.app.state.cloud.queue._failures = 100
        with pytest.raises(RuntimeError, match="has failed"):
            replica.check_health()
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(replica.app), base_url="http://local"
        ) as client:
            return (await client.get("/health")).json()

    content = asyncio.run(health())
    assert (content["model"], content["queue_max"], content["ready"]) == (
        "harbour",
        7,
        False,
    )


def test_serve_run_s_words_are_settings() -> None:
    application = serve_builder(
        build,
        {"serve": "onnx", "models": "a.onnx,b.onnx", "gpus": "1", "replicas": "4"},
    )
    assert application._bound_deployment.num_replicas == 4
    assert application._bound_deployment.ray_actor_options["num_gpus"] == 1
    with pytest.raises(
        ConfigError, match=r"serving:build: 1 validation error for Arguments\nmodel\n"
    ):
        serve_builder(build, {"model": "a.onnx"})


def test_settings_come_from_the_environment() -> None:
    given = {
        "COIN_SERVE": "onnx",
        "COIN_SERVE_MODELS": "a.onnx,b.onnx",
        "COIN_SERVE_REPLICAS": "2",
        "COIN_SERVE_TOKEN_ENV": "KEY",
    }
    arguments = from_environment({**given, "HOME": "/", "COIN": "1"})
    assert arguments == Arguments(
        serve="onnx", models=("a.onnx", "b.onnx"), replicas=2, token_env="KEY"
    )
    assert from_environment({}) == Arguments()
    assert coin_ray.serving.app._bound_deployment.name == "coin-detector"


WRONG = [
    ({"COIN_SERVE": "yolo"}, "serve"),
    ({"COIN_SERVE_MODEL": "x"}, "model"),
    ({"COIN_SERVE_REPLICAS": "0"}, "replicas"),
    ({"COIN_SERVE_QUEUE_MAX": "many"}, "queue_max"),
]


@pytest.mark.parametrize(("environment", "name"), WRONG)
def test_wrong_settings_are_named(environment: dict[str, str], name: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"COIN_SERVE_\*: 1 validation error for Arguments\n{name}\n"
    ):
        from_environment(environment)


def test_a_secret_given_by_mistake_is_not_told() -> None:
    with pytest.raises(ConfigError, match="token") as caught:
        from_environment(
            {"COIN_SERVE_TOKEN": "s3cret-0123", "COIN_SERVE_CPUS": "s3cret-0123"}
        )
    assert "s3cret" not in str(caught.value)


def test_a_token_that_is_not_set_is_no_open_door(
    folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = Arguments(
        serve="checkpoint", models=(folder,), token_env="DETECTOR_KEY"
    )
    monkeypatch.delenv("DETECTOR_KEY", raising=False)
    with pytest.raises(ConfigError, match="DETECTOR_KEY"):
        asgi_app(arguments)
    monkeypatch.setenv("DETECTOR_KEY", "right")
    app = asgi_app(arguments)
    assert post(app, call())[0].status_code == 401
    assert (
        post(app, call(classes=CLASSES), authorization="Bearer right")[0].status_code
        == 200
    )


@pytest.fixture
def cluster() -> Iterator[str]:
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
    folder: str, cluster: str
) -> None:
    serve.run(build(Arguments(serve="checkpoint", models=(folder,), cpus=0.5)))
    with httpx.Client(base_url=cluster, timeout=60) as client:
        assert client.get("/health").json()["classes"] == list(CLASSES)
        remote = [
            client.post(
                "/v1/detect", content=q if isinstance(q, bytes) else json.dumps(q)
            )
            for q in QUESTIONS
        ]
    twin = post(create_app(load_student(folder)), *QUESTIONS)
    assert list(map(without_times, remote)) == list(map(without_times, twin))
