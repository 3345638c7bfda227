"""The student that MLflow's registry calls the champion: put there by hand or by
``python -m coin_ray.serving.champion``, followed by servers.

python -m coin_ray.serving.champion runs/demo/export --name coin-student --registry sqlite:///runs/demo/mlflow.db
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from PIL import Image

from coin_ray import storage
from coin_ray.errors import CoinError, ConfigError, InputError
from coin_ray.predictors.onnx_detectors import Detector
from coin_ray.serving.student import StudentDetector, load_student

if TYPE_CHECKING:
    from mlflow import MlflowClient

ALIAS = "champion"
EXPERIMENT = "coin_ray-students"
EVERY = 10.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Registry:
    """A registered model and its alias. ``uri``: MLflow's tracking server; empty: what
    MLFLOW_TRACKING_URI says.
    """

    name: str
    uri: str = ""
    alias: str = ALIAS

    def version(self) -> str:
        """The version that has the alias. Raises ConfigError if there is none, or the
        registry can't be reached.
        """
        try:
            return str(
                self._client().get_model_version_by_alias(self.name, self.alias).version
            )
        except Exception as error:  # MLflow's stores raise errors of their own kinds
            raise ConfigError(
                f"no {self.name}@{self.alias} in the registry"
                f" {self.uri or '(MLFLOW_TRACKING_URI)'}: {str(error)[:200]}; register"
                " an export with python -m coin_ray.serving.champion, or set the alias"
            ) from error

    def load(self, version: str) -> StudentDetector:
        """The student of a version, tried on one image. Raises InputError if it can't
        be read.
        """
        import mlflow

        with tempfile.TemporaryDirectory() as folder:
            try:
                source = self._client().get_model_version_download_uri(
                    self.name, version
                )
                place = mlflow.artifacts.download_artifacts(
                    artifact_uri=source, dst_path=folder, tracking_uri=self.uri or None
                )
            except Exception as error:
                raise InputError(
                    f"version {version} of {self.name} can't be downloaded:"
                    f" {str(error)[:200]}"
                ) from error
            student = replace(load_student(place), name=f"{self.name}/{version}")
        student.detect(Image.new("RGB", (64, 64)), student.classes, 0.5)
        return student

    def register(self, folder: str) -> str:
        """Make an export (a local folder) the next version, and give it the alias;
        returns the version. Raises InputError if it is none.
        """
        load_student(folder)
        client = self._client()
        known = client.get_experiment_by_name(EXPERIMENT)
        experiment = (
            known.experiment_id
            if known
            else client.create_experiment(EXPERIMENT, artifact_location=self._files())
        )
        run = client.create_run(experiment).info.run_id
        client.log_artifacts(run, folder, "student")
        client.set_terminated(run)
        if not client.search_registered_models(filter_string=f"name = '{self.name}'"):
            client.create_registered_model(self.name)
        version = str(
            client.create_model_version(self.name, f"runs:/{run}/student", run).version
        )
        client.set_registered_model_alias(self.name, self.alias, version)
        return version

    def _files(self) -> str | None:
        """Beside a database on this disk; a tracking server has a place of its own."""
        place = self.uri.removeprefix("sqlite:///")
        return (
            str(PurePath(storage.absolute(place)).parent / "mlflow")
            if place != self.uri
            else None
        )

    def _client(self) -> MlflowClient:
        from mlflow import MlflowClient

        return MlflowClient(self.uri or None, self.uri or None)


class Champion:
    """Looks at the registry every ``every`` seconds. ``version``: of the student that
    is in use.
    """

    def __init__(self, registry: Registry, version: str, every: float = EVERY) -> None:
        self._registry, self.version, self._every = registry, version, every
        self._failed = ""

    async def follow(
        self, swap: Callable[[Detector], Any], failed: Callable[[], Any]
    ) -> None:
        """Load each new champion beside the present one, then ``swap``. What can't be
        read is told once and tried again; nothing stops.
        """
        while True:
            await asyncio.sleep(self._every)
            try:
                version = await asyncio.to_thread(self._registry.version)
                if version == self.version:
                    continue
                swap(await asyncio.to_thread(self._registry.load, version))
                self.version, self._failed = version, ""
                logger.info("serving version %s of %s", version, self._registry.name)
            # a registry in trouble, or a broken model, must not end the service
            except Exception as error:
                failed()
                if str(error) != self._failed:
                    logger.warning("version %s stays: %s", self.version, error)
                self._failed = str(error)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="coin_ray.serving.champion",
        description="Register an export and make it the champion.",
    )
    parser.add_argument("folder", help="written by pipelines/export.py, as ROOT/export")
    parser.add_argument("--name", default="coin-student", help="the registered model")
    parser.add_argument(
        "--registry",
        default="",
        help="MLflow's tracking URI (default: MLFLOW_TRACKING_URI)",
    )
    parser.add_argument("--alias", default=ALIAS)
    asked = parser.parse_args()
    try:
        version = Registry(asked.name, asked.registry, asked.alias).register(
            storage.absolute(asked.folder)
        )
    except CoinError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{asked.name} version {version} is the {asked.alias}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
