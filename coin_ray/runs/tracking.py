"""MLflow: the driver makes the database and the experiment before any worker starts;
one parent run, one child per step.

The driver alone writes. A server that is lost on the way stops nothing: what it has not
got is written when it is back.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from coin_ray import storage
from coin_ray.config import Tracking
from coin_ray.config.files import fingerprint, to_yaml
from coin_ray.errors import ConfigError
from coin_ray.runs.model_registry import image_set, registered

PARAMETER_LIMIT = 500
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}
"""For a server that does not answer: about a minute for a request, where MLflow itself
takes many."""
_chosen_here: set[str] = set()
"""Addresses that a tracker chose. MLflow leaves them in the environment, where the next
run of this process must not take them for the user's."""


class Tracked(Protocol):
    """A whole config: a frozen dataclass with these fields."""

    @property
    def preset(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def tracking(self) -> Tracking: ...


class Tracker:
    """Writes to MLflow, or nowhere when tracking is off. ``parent_run``: id of the
    pipeline's run.

    Raises ConfigError if the server can not be reached at the start. ``lost``: it could
    not be reached later; nothing more is tried.
    """

    def __init__(self, config: Tracked, root: str) -> None:
        self.enabled, self.lost = config.tracking.enabled, False
        self.root, self.config = root, config
        self.uri, self.parent_run, self.experiment = "", "", ""
        if not self.enabled:
            return
        try:
            self._open()
        except unreachable() as error:
            raise ConfigError(
                f"tracking failed at {without_password(self.uri)}: {_first_line(error)}. Start the server, name another by --tracking.uri, "
                "or give --tracking.no-enabled"
            ) from error

    def _open(self) -> None:
        import mlflow

        local = "://" not in self.root
        default = (
            f"sqlite:///{self.root}/mlflow.db"
            if local
            else f"sqlite:///{os.path.abspath('mlflow.db')}"
        )
        for name in ("mlflow", "mlflow.system_metrics", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        environment = os.environ.get("MLFLOW_TRACKING_URI")
        theirs = None if environment in _chosen_here else environment
        self.uri = self.config.tracking.uri or theirs or default
        if self.uri != theirs:
            _chosen_here.add(self.uri)
        mlflow.set_tracking_uri(self.uri)
        existing = mlflow.get_experiment_by_name(self.config.tracking.experiment)
        artifacts = storage.join(self.root, "mlflow") if self.uri == default else None
        self.experiment = (
            existing.experiment_id
            if existing
            else mlflow.create_experiment(
                self.config.tracking.experiment, artifact_location=artifacts
            )
        )
        self.parent_run = self._parent()

    def attempt(self, work: Callable[[], object]) -> bool:
        """Whether ``work`` reached the server. The first failure is told, and the last
        thing that is tried.
        """
        if not self.enabled or self.lost:
            return False
        try:
            work()
        except unreachable() as error:
            self.lost = True
            place = without_password(self.uri)
            print(
                f"tracking failed at {place}: {_first_line(error)}\nthe run goes on; the same command writes what is missing",
                flush=True,
            )
        return not self.lost

    def _parent(self) -> str:
        """One parent run per config and root: a resumed pipeline continues it."""
        import mlflow

        record = storage.join(
            self.root, "mlflow", f"run-{fingerprint(self.config)}.json"
        )
        if storage.exists(record):
            return str(storage.read_json(record)["run_id"])
        with mlflow.start_run(
            experiment_id=self.experiment,
            run_name=f"{self.config.preset}-{self.config.seed}",
        ) as run:
            mlflow.log_params(flat(self.config))
            mlflow.log_text(to_yaml(self.config), "config.yaml")
        storage.write_json(record, {"run_id": run.info.run_id})
        return str(run.info.run_id)

    @contextmanager
    def stage(
        self,
        name: str,
        stage_config: Any,
        digest: str,
        images: str = "",
        owed: str = "",
    ) -> Iterator[StageRun]:
        """A child run around one step; failed steps are marked so. ``images``: the
        table of the images, whose content ``digest`` names.

        ``owed``: a file that is there until the run is whole; an unfinished run of an
        earlier process is gone on with.
        """
        run = StageRun(self, owed)
        if run.owed and not storage.exists(owed):
            storage.write_json(owed, {})
        self.attempt(lambda: run.begin(name, stage_config, digest, images))
        try:
            yield run
        except BaseException:
            run.end("FAILED")
            raise
        run.end("FINISHED")

    def summary(self, metrics: dict[str, float], page: str | None) -> None:
        """Final figures and the page, on the parent run."""

        def write() -> None:
            import mlflow

            with mlflow.start_run(run_id=self.parent_run):
                mlflow.log_metrics(metrics)
                if page and "://" not in page:
                    mlflow.log_artifact(page)

        self.attempt(write)

    def files(self, contents: Mapping[str, str]) -> None:
        """Texts, as SVG or YAML, by file name, on the parent run."""

        def write() -> None:
            import mlflow

            with mlflow.start_run(run_id=self.parent_run):
                for name, text in contents.items():
                    mlflow.log_text(text, name)

        self.attempt(write)

    def register(self, export: str, figures: Mapping[str, float]) -> None:
        """The exported student (a URI) as the next version of the model
        ``tracking.model``, which its alias then names; once for an export.
        """
        record = storage.join(
            self.root,
            "mlflow",
            f"model-{fingerprint([self.config.tracking.model, self.uri, export])}.json",
        )
        if storage.exists(record):
            return
        version: list[str] = []
        if self.attempt(
            lambda: version.append(
                registered(self.config.tracking, self.parent_run, export, figures)
            )
        ):
            storage.write_json(record, {"version": version[0]})


class StageRun:
    """A child run; without tracking, or while the server is lost, nothing of it is
    written.
    """

    def __init__(self, tracker: Tracker, owed: str = "") -> None:
        self.tracker, self.owed = tracker, owed if tracker.enabled else ""
        self.run_id: str | None = None

    def begin(self, name: str, stage_config: Any, digest: str, images: str) -> None:
        import mlflow

        run = mlflow.start_run(
            run_id=self._earlier(),
            experiment_id=self.tracker.experiment,
            run_name=name,
            parent_run_id=self.tracker.parent_run,
            log_system_metrics=True,
            tags={"stage": name, "dataset_digest": digest},
        )
        self.run_id = str(run.info.run_id)
        if self.owed:
            storage.write_json(
                self.owed,
                {"run_id": self.run_id, "uri": without_password(self.tracker.uri)},
            )
        mlflow.log_params(
            {k: v[:PARAMETER_LIMIT] for k, v in flat(stage_config).items()}
        )
        if digest and images:
            mlflow.log_input(image_set(images, digest), context=name)

    def _earlier(self) -> str | None:
        if not self.owed:
            return None
        found = storage.read_json(self.owed) if storage.exists(self.owed) else {}
        return (
            str(found["run_id"])
            if found.get("uri") == without_password(self.tracker.uri)
            else None
        )

    def finish(self, metrics: dict[str, Any], folder: str) -> bool:
        """Log all numbers of a step's metrics and its curve; whether that was done."""
        written = self.run_id is not None and self.tracker.attempt(
            lambda: _log_step(metrics, folder)
        )
        if written and self.owed:
            storage.remove(self.owed)
        return written

    def end(self, status: str) -> None:
        """Of a lost server's run at least this process's own record is closed, so that
        the next run can begin.
        """
        if self.run_id is None:
            return
        import mlflow

        if self.tracker.lost:
            with suppress(*unreachable()):
                mlflow.end_run(status)
        else:
            self.tracker.attempt(lambda: mlflow.end_run(status))


def unreachable() -> tuple[type[Exception], ...]:
    """What MLflow raises when its server, or the network, fails."""
    from mlflow.exceptions import MlflowException

    return (MlflowException, OSError)


def _first_line(error: Exception) -> str:
    return without_password(
        (str(error).strip().splitlines() or [type(error).__name__])[0]
    )[:300]


def without_password(text: str) -> str:
    """``text`` with what stands before the host left out of every address: a name and a
    password.
    """
    return re.sub(r"(?<=://)[^/\s]+@", "", text)


def _log_step(metrics: dict[str, Any], folder: str) -> None:
    import mlflow

    numbers = {
        k: float(v)
        for k, v in flatten(metrics).items()
        if isinstance(v, (int, float)) and v == v
    }
    if numbers:
        mlflow.log_metrics(numbers)
    mlflow.log_dict(json.loads(json.dumps(metrics, default=str)), "metrics.json")
    for curve in (
        storage.join(folder, name) for name in ("curve.json", "validation.json")
    ):
        if storage.exists(curve):
            log_curve(storage.read_json(curve))


def log_curve(curve: list[dict[str, float]]) -> None:
    """Every logged training step, in few calls."""
    import mlflow
    from mlflow.entities import Metric

    client, run = mlflow.MlflowClient(), mlflow.active_run()
    if run is None:
        return
    metrics = [
        Metric(k, v, 0, int(point["step"]))
        for point in curve
        for k, v in point.items()
        if k != "step"
    ]
    for start in range(0, len(metrics), 500):
        client.log_batch(run.info.run_id, metrics=metrics[start : start + 500])


def flat(config: Any) -> dict[str, str]:
    """A config's leaves as text, by dotted name."""
    plain = (
        dataclasses.asdict(config)
        if dataclasses.is_dataclass(config) and not isinstance(config, type)
        else config
    )
    return {k: str(v)[:PARAMETER_LIMIT] for k, v in flatten(plain).items()}


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        found: dict[str, Any] = {}
        for key, item in value.items():
            found |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
        return found
    return {prefix or "value": value}
