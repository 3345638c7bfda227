"""MLflow: the driver makes the database and the experiment before any worker starts; one parent run, one child per step."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from coin_ray import storage
from coin_ray.config import Tracking
from coin_ray.configfile import fingerprint, to_yaml

PARAMETER_LIMIT = 500
_chosen_here: set[str] = set()
"""Addresses that a tracker chose. MLflow leaves them in the environment, where the next run of this process must not take them for the user's."""


class Tracked(Protocol):
    """A whole config: a frozen dataclass with these fields."""

    @property
    def preset(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def tracking(self) -> Tracking: ...


class Tracker:
    """Writes to MLflow, or nowhere when tracking is off. ``parent_run``: id of the pipeline's run."""

    def __init__(self, config: Tracked, root: str) -> None:
        self.enabled = config.tracking.enabled
        self.root, self.config = root, config
        self.uri, self.parent_run, self.experiment = "", "", ""
        if self.enabled:
            self._open()

    def _open(self) -> None:
        import mlflow

        local = "://" not in self.root
        default = f"sqlite:///{self.root}/mlflow.db" if local else f"sqlite:///{os.path.abspath('mlflow.db')}"
        for name in ("mlflow", "mlflow.system_metrics", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        environment = os.environ.get("MLFLOW_TRACKING_URI")
        theirs = None if environment in _chosen_here else environment
        self.uri = self.config.tracking.uri or theirs or default
        if self.uri != theirs:
            _chosen_here.add(self.uri)
        mlflow.set_tracking_uri(self.uri)
        existing = mlflow.get_experiment_by_name(self.config.tracking.experiment)
        artifacts = storage.join(self.root, "mlflow") if self.uri == default else None
        self.experiment = (
            existing.experiment_id if existing else mlflow.create_experiment(self.config.tracking.experiment, artifact_location=artifacts)
        )
        self.parent_run = self._parent()

    def _parent(self) -> str:
        """One parent run per config and root: a resumed pipeline continues it."""
        import mlflow

        record = storage.join(self.root, "mlflow", f"run-{fingerprint(self.config)}.json")
        if storage.exists(record):
            return str(storage.read_json(record)["run_id"])
        with mlflow.start_run(experiment_id=self.experiment, run_name=f"{self.config.preset}-{self.config.seed}") as run:
            mlflow.log_params(flat(self.config))
            mlflow.log_text(to_yaml(self.config), "config.yaml")
        storage.write_json(record, {"run_id": run.info.run_id})
        return str(run.info.run_id)

    @contextmanager
    def stage(self, name: str, stage_config: Any, digest: str) -> Iterator[StageRun]:
        """A child run around one step; failed steps are marked so."""
        if not self.enabled:
            yield StageRun(None, "")
            return
        import mlflow

        with mlflow.start_run(
            experiment_id=self.experiment,
            run_name=name,
            parent_run_id=self.parent_run,
            log_system_metrics=True,
            tags={"stage": name, "dataset_digest": digest},
        ) as run:
            mlflow.log_params({k: v[:PARAMETER_LIMIT] for k, v in flat(stage_config).items()})
            yield StageRun(run.info.run_id, self.uri)

    def summary(self, metrics: dict[str, float], page: str | None) -> None:
        """Final figures and the page, on the parent run."""
        if not self.enabled:
            return
        import mlflow

        with mlflow.start_run(run_id=self.parent_run):
            mlflow.log_metrics(metrics)
            if page and "://" not in page:
                mlflow.log_artifact(page)

    def files(self, contents: Mapping[str, str]) -> None:
        """Texts, as SVG or YAML, by file name, on the parent run."""
        if not self.enabled:
            return
        import mlflow

        with mlflow.start_run(run_id=self.parent_run):
            for name, text in contents.items():
                mlflow.log_text(text, name)


@dataclasses.dataclass(frozen=True)
class StageRun:
    run_id: str | None
    uri: str

    def finish(self, metrics: dict[str, Any], folder: str) -> None:
        """Log all numbers of a step's metrics and its tables' manifest."""
        if self.run_id is None:
            return
        import mlflow

        numbers = {k: float(v) for k, v in flatten(metrics).items() if isinstance(v, (int, float)) and v == v}
        if numbers:
            mlflow.log_metrics(numbers)
        mlflow.log_dict(json.loads(json.dumps(metrics, default=str)), "metrics.json")
        curve = storage.join(folder, "curve.json")
        if storage.exists(curve):
            log_curve(storage.read_json(curve))


def log_curve(curve: list[dict[str, float]]) -> None:
    """Every logged training step, in few calls."""
    import mlflow
    from mlflow.entities import Metric

    client, run = mlflow.MlflowClient(), mlflow.active_run()
    if run is None:
        return
    metrics = [Metric(k, v, 0, int(point["step"])) for point in curve for k, v in point.items() if k != "step"]
    for start in range(0, len(metrics), 500):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + 500])


def flat(config: Any) -> dict[str, str]:
    """A config's leaves as text, by dotted name."""
    plain = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else config
    return {k: str(v)[:PARAMETER_LIMIT] for k, v in flatten(plain).items()}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix or "value": value}
