"""The server as a Ray Serve application: on a cluster, with replicas that Ray replaces
when they fail.

``serve run coin_ray.serving:app`` takes its settings from ``COIN_SERVE``,
``COIN_SERVE_MODELS`` and so on (``Arguments``); ``serve run coin_ray.serving:build
serve=checkpoint models=runs/demo/export replicas=2`` takes them as words.

Batches are made by the service's own queue (``coin_ray.serving.batching``), as in the
local server: only images with the same question can share a batch, which
``serve.batch`` knows nothing of, and one queue answers 503 with Retry-After in both.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve

from coin_ray import storage
from coin_ray.config.files import from_yaml
from coin_ray.errors import ConfigError
from coin_ray.predictors.onnx_detectors import Detector
from coin_ray.serving.batching import BATCH_WAIT
from coin_ray.serving.champion import EVERY, Champion, Registry
from coin_ray.serving.local_cloud import load
from coin_ray.serving.server import create_app
from coin_ray.serving.teacher_proxy import CALLS_MAX, CloudBeside

PREFIX = "COIN_SERVE_"
MARGIN = 16


class Arguments(BaseModel):
    """What is served, and with what. In the environment: ``COIN_SERVE`` and
    ``COIN_SERVE_<NAME>``, several models by commas.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    serve: Literal["demo", "onnx", "transformers", "checkpoint", "champion"] = "demo"
    models: tuple[str, ...] = ()
    """serve champion: the name of the registered model."""
    registry: str = ""
    """serve champion: MLflow's tracking URI; empty: MLFLOW_TRACKING_URI."""
    every: float = Field(EVERY, gt=0)
    """serve champion: seconds between looks at the registry."""
    cloud: str = ""
    """config.yaml of a run: the page asks its cloud too."""
    cloud_calls: int = Field(CALLS_MAX, ge=1)
    """Calls that each replica may make to that cloud."""
    token_env: str | None = None
    pixels_max: int = Field(50_000_000, ge=1)
    """Pixels of an image, beyond which the answer is 413."""
    queue_max: int = Field(64, ge=1)
    batch_wait: float = Field(BATCH_WAIT, ge=0)
    replicas: int = Field(1, ge=1)
    cpus: float = Field(1.0, ge=0)
    gpus: float = Field(0.0, ge=0)

    @field_validator("models", mode="before")
    @classmethod
    def _separated(cls, value: Any) -> Any:
        return (
            tuple(name for name in value.split(",") if name)
            if isinstance(value, str)
            else value
        )


def from_environment(environment: Mapping[str, str]) -> Arguments:
    """Raises ConfigError naming the variable that is unknown or wrong."""
    given = {
        name.removeprefix(PREFIX).lower(): value
        for name, value in environment.items()
        if name.startswith(PREFIX)
    }
    if "COIN_SERVE" in environment:
        given["serve"] = environment["COIN_SERVE"]
    return _checked(given, f"environment variables COIN_SERVE and {PREFIX}*")


def _checked(given: Mapping[str, Any], where: str) -> Arguments:
    try:
        return Arguments.model_validate(given)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from None


def asgi_app(arguments: Arguments) -> FastAPI:
    """What a replica runs: the service with its detector loaded. Raises ConfigError if
    the token is not set, or there is no champion.
    """
    token = os.environ.get(arguments.token_env) if arguments.token_env else None
    if arguments.token_env and not token:
        raise ConfigError(
            f"the environment variable {arguments.token_env}, which token_env names, is"
            " not set on this machine"
        )
    if arguments.serve == "champion":
        registry = Registry(_one_name(arguments.models), arguments.registry)
        version = registry.version()
        champion: Champion | None = Champion(registry, version, arguments.every)
        detector: Detector = registry.load(version)
    else:
        champion, detector = None, load(arguments.serve, arguments.models)
    return create_app(
        detector,
        token=token,
        queue_max=arguments.queue_max,
        batch_wait=arguments.batch_wait,
        pixels_max=arguments.pixels_max,
        champion=champion,
        beside=_beside(arguments) if arguments.cloud else None,
    )


def _beside(arguments: Arguments) -> CloudBeside:
    """The run's cloud, with the answers that the run has paid for: they lie beside its
    config.yaml.
    """
    uri = storage.absolute(arguments.cloud)
    return CloudBeside(
        from_yaml(uri),
        arguments.cloud_calls,
        storage.join(uri.rpartition("/")[0], "journal"),
    )


def _one_name(models: tuple[str, ...]) -> str:
    if len(models) != 1:
        raise ConfigError(
            f"serve champion needs models=NAME, one registered model; got {len(models)}"
        )
    return models[0]


class Replica:
    """Ray asks each replica for its health and replaces those that raise."""

    app: FastAPI

    def check_health(self) -> None:
        """Raises RuntimeError if the detector failed several times in a row, as after
        an error of the GPU.
        """
        if not self.app.state.cloud.queue.healthy:
            raise RuntimeError("the detector has failed in each of the last images")


def build(args: Arguments | Mapping[str, Any]) -> serve.Application:
    """The application with ``args``; ``serve run`` gives its words as a dictionary.
    Raises ConfigError naming a wrong one.
    """
    arguments = (
        args
        if isinstance(args, Arguments)
        else _checked(args, "serve run coin_ray.serving:build")
    )

    def factory() -> FastAPI:
        return asgi_app(arguments)

    deployment = serve.deployment(
        serve.ingress(factory)(Replica),
        name="coin-detector",
        num_replicas=arguments.replicas,
        # beyond queue_max the replica itself refuses, with Retry-After
        max_ongoing_requests=arguments.queue_max + MARGIN,
        max_queued_requests=arguments.queue_max,
        ray_actor_options={"num_cpus": arguments.cpus, "num_gpus": arguments.gpus},
    )
    return deployment.bind()
