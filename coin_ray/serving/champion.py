"""The student that MLflow's registry calls the champion: registered by hand or by
``coin-ray serve register``, followed by servers.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING

from PIL import Image

from coin_ray import storage
from coin_ray.config.mlflow_names import mlflow_name
from coin_ray.errors import ConfigError, InputError
from coin_ray.serving.detectors import ServedDetector
from coin_ray.serving.student import PredictorAdapter, load_served_predictor

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIAS = "champion"
MODEL_NAME = "coin-student"
EXPERIMENT = "coin_ray-students"
ARTIFACT = "student"
POLL_SECONDS = 10.0
TRIAL_IMAGE_SIZE = (64, 64)
SQLITE = "sqlite:///"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StudentRegistry:
    """A registered model and its alias. ``uri``: MLflow's tracking server; empty: the
    one in MLFLOW_TRACKING_URI. Names are written as MLflow takes them.
    """

    name: str
    uri: str = ""
    alias: str = ALIAS

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", mlflow_name(self.name, "model"))
        object.__setattr__(self, "alias", mlflow_name(self.alias, "alias"))

    def version(self) -> str:
        """Return the version that has the alias. Raises ConfigError if there is none, or
        the registry can't be reached.
        """
        try:
            model = self._client().get_model_version_by_alias(self.name, self.alias)
        except Exception as error:  # MLflow's stores raise errors of their own kinds
            raise ConfigError(
                f"no {self.name}@{self.alias} in the registry"
                f" {self.uri or '(MLFLOW_TRACKING_URI)'}: {str(error)[:200]}; register"
                " an export with coin-ray serve register, or set the alias"
            ) from error
        return str(model.version)

    def load(self, version: str) -> PredictorAdapter:
        """Load a version and try it on one image. Raises InputError if it can't be
        read.
        """
        with tempfile.TemporaryDirectory() as folder:
            export = self._download(version, folder)
            student = load_served_predictor(export)
        student = replace(student, name=f"{self.name}/{version}")
        student.detect(Image.new("RGB", TRIAL_IMAGE_SIZE), student.classes, 0.5)
        return student

    def _download(self, version: str, folder: str) -> str:
        import mlflow

        try:
            source = self._client().get_model_version_download_uri(self.name, version)
            path = mlflow.artifacts.download_artifacts(
                artifact_uri=source, dst_path=folder, tracking_uri=self.uri or None
            )
        except Exception as error:
            raise InputError(
                f"version {version} of {self.name} can't be downloaded:"
                f" {str(error)[:200]}"
            ) from error
        return str(path)

    def register(self, folder: str) -> str:
        """Make an export (a local folder) the next version with the alias; return the
        version. Raises InputError if it is none.
        """
        load_served_predictor(folder)
        client = self._client()
        run = client.create_run(self._experiment_id(client)).info.run_id
        client.log_artifacts(run, folder, ARTIFACT)
        client.set_terminated(run)
        quote = '"' if "'" in self.name else "'"
        condition = f"name = {quote}{self.name}{quote}"
        if not client.search_registered_models(filter_string=condition):
            client.create_registered_model(self.name)
        source = f"runs:/{run}/{ARTIFACT}"
        version = str(client.create_model_version(self.name, source, run).version)
        client.set_registered_model_alias(self.name, self.alias, version)
        return version

    def _experiment_id(self, client: MlflowClient) -> str:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is not None:
            return str(experiment.experiment_id)
        location = self._artifact_location()
        return str(client.create_experiment(EXPERIMENT, artifact_location=location))

    def _artifact_location(self) -> str | None:
        """Return a folder beside a database on this disk; None for a tracking server,
        which has its own.
        """
        if not self.uri.startswith(SQLITE):
            return None
        database = storage.absolute_uri(self.uri.removeprefix(SQLITE))
        return str(PurePath(database).parent / "mlflow")

    def _client(self) -> MlflowClient:
        from mlflow import MlflowClient

        return MlflowClient(self.uri or None, self.uri or None)


def register(
    folder: str, name: str = MODEL_NAME, registry: str = "", alias: str = ALIAS
) -> str:
    """Register the export in ``folder`` as the next version of ``name`` with ``alias``;
    return the version.

    ``registry``: MLflow's tracking URI; empty: the one in MLFLOW_TRACKING_URI. Raises
    InputError if the folder holds no export.
    """
    student_registry = StudentRegistry(name, registry, alias)
    return student_registry.register(storage.absolute_uri(folder))


class ChampionFollower:
    """Asks the registry every ``every`` seconds. ``version``: of the student in use."""

    def __init__(
        self, registry: StudentRegistry, version: str, every: float = POLL_SECONDS
    ) -> None:
        self._registry, self.version, self._every = registry, version, every
        self._last_error = ""

    async def follow(
        self,
        swap: Callable[[ServedDetector], object],
        on_error: Callable[[], object],
    ) -> None:
        """Load each new champion beside the current one, then ``swap``. A version that
        can't be read is logged once and tried again; nothing stops.
        """
        while True:
            await asyncio.sleep(self._every)
            try:
                await self._swap_if_new(swap)
            # a registry in trouble, or a broken model, must not end the service
            except Exception as error:
                on_error()
                if str(error) != self._last_error:
                    logger.warning("version %s stays: %s", self.version, error)
                self._last_error = str(error)

    async def _swap_if_new(self, swap: Callable[[ServedDetector], object]) -> None:
        version = await asyncio.to_thread(self._registry.version)
        if version == self.version:
            return
        swap(await asyncio.to_thread(self._registry.load, version))
        self.version, self._last_error = version, ""
        logger.info("serving version %s of %s", version, self._registry.name)
