"""The server as a Ray Serve application: on a cluster, with replicas that Ray replaces
when they fail.

``serve run coin_ray.serving:app`` takes its settings from ``COIN_SERVE``,
``COIN_SERVE_MODELS`` and so on (``ServeSettings``); ``serve run coin_ray.serving:build
serve=checkpoint models=runs/demo/export replicas=2`` takes them as arguments.

Batches are made by the service's own queue (``coin_ray.serving.batching``), as in the
local server: only images with the same classes and threshold can share a batch, which
``serve.batch`` does not support, and one queue answers 503 with Retry-After in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray import serve

from coin_ray import storage
from coin_ray.config.fingerprints import to_identity
from coin_ray.config.yaml_files import read_config
from coin_ray.data.intensity import found_range
from coin_ray.errors import ConfigError
from coin_ray.serving.batching import BATCH_WAIT
from coin_ray.serving.champion import (
    POLL_SECONDS,
    ChampionFollower,
    StudentRegistry,
)
from coin_ray.serving.detectors import ServedDetector
from coin_ray.serving.local_cloud import load_served_detector, token_from_environment
from coin_ray.serving.server import create_app
from coin_ray.serving.teacher_proxy import CALLS_MAX, TeacherProxy

PREFIX = "COIN_SERVE_"
REQUESTS_MARGIN = 16


class ServeSettings(BaseModel):
    """What is served, and with what resources. In the environment: ``COIN_SERVE`` and
    ``COIN_SERVE_<NAME>``, several models separated by commas.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    serve: Literal["demo", "onnx", "transformers", "checkpoint", "champion"] = "demo"
    models: tuple[str, ...] = ()
    """serve champion: the name of the registered model."""
    registry: str = ""
    """serve champion: MLflow's tracking URI; empty: MLFLOW_TRACKING_URI."""
    every: float = Field(POLL_SECONDS, gt=0)
    """serve champion: seconds between requests to the registry."""
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
    def _split_at_commas(cls, models: object) -> object:
        if not isinstance(models, str):
            return models
        return tuple(name for name in models.split(",") if name)


def settings_from_environment(environment: Mapping[str, str]) -> ServeSettings:
    """Read the settings. Raises ConfigError naming the variable that is unknown or
    wrong.
    """
    settings = {
        name.removeprefix(PREFIX).lower(): text
        for name, text in environment.items()
        if name.startswith(PREFIX)
    }
    if "COIN_SERVE" in environment:
        settings["serve"] = environment["COIN_SERVE"]
    return _validate(settings, f"environment variables COIN_SERVE and {PREFIX}*")


def _validate(settings: Mapping[str, object], source: str) -> ServeSettings:
    try:
        return ServeSettings.model_validate(settings)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def create_replica_app(settings: ServeSettings) -> FastAPI:
    """Return what a replica runs: the service with its detector loaded. Raises
    ConfigError if the token is not set, or there is no champion.
    """
    token = token_from_environment(settings.token_env)
    champion: ChampionFollower | None = None
    detector: ServedDetector
    if settings.serve == "champion":
        registry = StudentRegistry(_single_name(settings.models), settings.registry)
        version = registry.version()
        champion = ChampionFollower(registry, version, settings.every)
        detector = registry.load(version)
    else:
        detector = load_served_detector(settings.serve, settings.models)
    return create_app(
        detector,
        token=token,
        queue_max=settings.queue_max,
        batch_wait=settings.batch_wait,
        pixels_max=settings.pixels_max,
        champion=champion,
        teacher_proxy=_teacher_proxy(settings) if settings.cloud else None,
    )


def _teacher_proxy(settings: ServeSettings) -> TeacherProxy:
    """Return the run's cloud, with the answers that the run has paid for, which are
    beside its config.yaml.
    """
    config_uri = storage.absolute_uri(settings.cloud)
    root = config_uri.rpartition("/")[0]
    journal = storage.join(root, "journal")
    config = read_config(config_uri)
    intensity_range = found_range(root, to_identity(config.data))
    if intensity_range is not None:
        config = config.with_intensity_range(intensity_range)
    return TeacherProxy(config, settings.cloud_calls, journal)


def _single_name(models: tuple[str, ...]) -> str:
    if len(models) != 1:
        raise ConfigError(
            f"serve champion needs models=NAME, one registered model; got {len(models)}"
        )
    return models[0]


class Replica:
    """Ray asks each replica for its health and replaces those that raise."""

    app: FastAPI

    def check_health(self) -> None:
        """Raise RuntimeError if the detector failed several times in a row, as after an
        error of the GPU.
        """
        if not self.app.state.service.queue.healthy:
            raise RuntimeError("the detector has failed on each of the last images")


def build(args: ServeSettings | Mapping[str, object]) -> serve.Application:
    """Return the application with these settings; ``serve run`` passes its arguments as
    a dictionary. Raises ConfigError naming a wrong one.
    """
    if isinstance(args, ServeSettings):
        settings = args
    else:
        settings = _validate(args, "serve run coin_ray.serving:build")

    def create_app_in_replica() -> FastAPI:
        return create_replica_app(settings)

    deployment = serve.deployment(
        serve.ingress(create_app_in_replica)(Replica),
        name="coin-detector",
        num_replicas=settings.replicas,
        # beyond queue_max the replica itself refuses, with Retry-After
        max_ongoing_requests=settings.queue_max + REQUESTS_MARGIN,
        max_queued_requests=settings.queue_max,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": settings.gpus},
    )
    return deployment.bind()
