"""MLflow tracking: one parent run per config and root, one child run per step.

Only the driver writes; it makes the database and the experiment before any worker
starts. A run does not stop when the server is lost: metrics that it did not get are
written when it is back. Names are written as ``config.mlflow_names`` says.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO, Protocol, TypeVar

from coin_ray import storage
from coin_ray.config import Tracking
from coin_ray.config.dotted_names import flatten, flatten_config
from coin_ray.config.fingerprints import fingerprint
from coin_ray.config.mlflow_names import mlflow_name
from coin_ray.config.yaml_files import to_yaml
from coin_ray.errors import ConfigError, describe_variables
from coin_ray.runs.model_registry import image_dataset, register_model_version

REQUEST_LIMITS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
}
"""About a minute for a request that the server does not answer; MLflow's own default is
many minutes."""
REFUSALS = frozenset(
    {
        "INVALID_PARAMETER_VALUE",
        "BAD_REQUEST",
        "MALFORMED_REQUEST",
        "RESOURCE_ALREADY_EXISTS",
        "RESOURCE_DOES_NOT_EXIST",
        "RESOURCE_CONFLICT",
        "INVALID_STATE",
    }
)
"""MLflow's codes for a request that it does not accept, from a server that is there."""
DENIALS = frozenset({"UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED"})
"""MLflow's codes for credentials that are missing or may not do this."""
CREDENTIAL_VARIABLES = (
    "MLFLOW_TRACKING_USERNAME",
    "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_TRACKING_TOKEN",
)
SQLITE = "sqlite:///"
"""How the address of a SQLite file begins."""
MAX_BATCH = 500
"""Curve points that are sent in one request."""
_default_uris: set[str] = set()
"""Addresses that trackers of this process set. MLflow leaves them in the environment,
where the next run must not take them for the user's choice."""


T = TypeVar("T")


class RunConfig(Protocol):
    """A whole config: a frozen dataclass with these fields."""

    @property
    def preset(self) -> str: ...

    @property
    def seed(self) -> int: ...

    @property
    def tracking(self) -> Tracking: ...


class Tracker:
    """Writes to MLflow, or nowhere if tracking is off.

    ``parent_run`` is the id of the pipeline's MLflow run. ``lost``: the server could not
    be reached after the start, and is not tried again. Raises ConfigError if it can not
    be reached at the start.
    """

    def __init__(self, config: RunConfig, root: str) -> None:
        self.enabled = config.tracking.enabled
        self.lost = False
        self.root = root
        self.config = config
        self.uri = ""
        self.parent_run = ""
        self.experiment = ""
        if not self.enabled:
            return
        try:
            self._connect()
        except (*mlflow_errors(), *_database_errors()) as error:
            advice = "Start the server, give another one by --tracking.uri,"
            if _is_refusal(error):
                advice = "The server is there and refuses this: change the setting,"
            elif _is_denied(error):
                advice = f"{_credentials_advice()},"
            raise ConfigError(
                f"tracking failed at {without_password(self.uri)}: {_first_line(error)}."
                f" {advice} or turn tracking off by --tracking.no-enabled"
            ) from error

    def _connect(self) -> None:
        import mlflow

        for name in ("mlflow", "mlflow.system_metrics", "alembic"):
            logging.getLogger(name).setLevel(logging.WARNING)
        for name, limit in REQUEST_LIMITS.items():
            os.environ.setdefault(name, limit)
        default_uri = _default_uri(self.root)
        self.uri = self._tracking_uri(default_uri)
        mlflow.set_tracking_uri(self.uri)
        with _locked_database(self.uri):
            self._open_experiment(default_uri)
        self.parent_run = self._open_parent_run()

    def _open_experiment(self, default_uri: str) -> None:
        """Find or create the experiment, and before that the tables of the database."""
        import mlflow

        name = self.config.tracking.experiment
        experiment = mlflow.get_experiment_by_name(name)
        if experiment is not None:
            self.experiment = experiment.experiment_id
        else:
            local_artifacts = storage.join(self.root, "mlflow")
            self.experiment = mlflow.create_experiment(
                name,
                artifact_location=local_artifacts if self.uri == default_uri else None,
            )

    def _tracking_uri(self, default_uri: str) -> str:
        """Return the address from the config, else the environment, else the default."""
        environment_uri = os.environ.get("MLFLOW_TRACKING_URI")
        if environment_uri in _default_uris:
            environment_uri = None
        uri = self.config.tracking.uri or environment_uri or default_uri
        if uri != environment_uri:
            _default_uris.add(uri)
        return uri

    def _open_parent_run(self) -> str:
        """Return the id of the run of this config and root; a resumed one continues."""
        import mlflow

        record_file = storage.join(
            self.root, "mlflow", f"run-{fingerprint(self.config)}.json"
        )
        if storage.exists(record_file):
            return str(storage.read_json(record_file)["run_id"])
        run_name = f"{self.config.preset}-{self.config.seed}"
        with mlflow.start_run(experiment_id=self.experiment, run_name=run_name) as run:
            mlflow.log_params(_legal_names(flatten_config(self.config)))
            mlflow.log_text(to_yaml(self.config), "config.yaml")
        run_id = str(run.info.run_id)
        storage.write_json(record_file, {"run_id": run_id})
        return run_id

    def attempt(self, write: Callable[[], object]) -> bool:
        """Call ``write``; return whether the server took it.

        A failure is printed. After one that is no refusal of this very request nothing
        is tried any more.
        """
        if not self.enabled or self.lost:
            return False
        try:
            write()
        except mlflow_errors() as error:
            if _is_refusal(error):
                print(
                    f"MLflow refused what was written: {_first_line(error)}\n"
                    "the run and its tracking continue without it",
                    flush=True,
                )
                return False
            self.lost = True
            advice = f". {_credentials_advice()}" if _is_denied(error) else ""
            print(
                f"tracking failed at {without_password(self.uri)}: {_first_line(error)}"
                f"{advice}\n"
                "the run continues; the same command writes what is missing",
                flush=True,
            )
        return not self.lost

    @contextmanager
    def child_run(
        self,
        name: str,
        parameters: object,
        images_digest: str = "",
        images_table: str = "",
        pending_file: str = "",
    ) -> Iterator[ChildRun]:
        """Open a child run; it is marked as failed if the block raises.

        ``parameters``: a config dataclass or nested dicts. ``images_table``: URI of the
        table of images, whose contents ``images_digest`` identifies. ``pending_file``
        exists until the run is complete; an incomplete run of an earlier process is
        continued.
        """
        child_run = ChildRun(self, pending_file)
        if child_run.pending_file and not storage.exists(pending_file):
            storage.write_json(pending_file, {})
        self.attempt(
            lambda: child_run.begin(name, parameters, images_digest, images_table)
        )
        try:
            yield child_run
        except BaseException:
            child_run.end("FAILED")
            raise
        child_run.end("FINISHED")

    def log_summary(self, figures: Mapping[str, float], page: str | None) -> None:
        """Log the final figures, and the report's page (a path), on the parent run."""

        def write() -> None:
            import mlflow

            with mlflow.start_run(run_id=self.parent_run):
                mlflow.log_metrics(_legal_names(figures))
                if page and "://" not in page:
                    mlflow.log_artifact(page)

        self.attempt(write)

    def log_texts(self, texts: Mapping[str, str]) -> None:
        """Log texts, as SVG or YAML, by file name on the parent run."""

        def write() -> None:
            import mlflow

            with mlflow.start_run(run_id=self.parent_run):
                for file_name, text in texts.items():
                    mlflow.log_text(text, file_name)

        self.attempt(write)

    def register_model(self, export: str, figures: Mapping[str, float]) -> None:
        """Register the exported student (a URI) as a version of ``tracking.model``.

        The alias ``tracking.alias`` moves to it. An export is registered once.
        """
        key = fingerprint([self.config.tracking.model, self.uri, export])
        record_file = storage.join(self.root, "mlflow", f"model-{key}.json")
        if storage.exists(record_file):
            return
        versions: list[str] = []

        def register() -> None:
            version = register_model_version(
                self.config.tracking, self.parent_run, export, figures
            )
            versions.append(version)

        if self.attempt(register):
            storage.write_json(record_file, {"version": versions[0]})


class ChildRun:
    """A run below the parent run.

    Nothing is written without a tracker, with tracking off or while its server is lost.
    """

    def __init__(self, tracker: Tracker | None = None, pending_file: str = "") -> None:
        self.tracker = tracker
        enabled = tracker is not None and tracker.enabled
        self.pending_file = pending_file if enabled else ""
        self.run_id: str | None = None

    def begin(
        self, name: str, parameters: object, images_digest: str, images_table: str
    ) -> None:
        """Start the MLflow run and log what identifies it."""
        import mlflow

        assert self.tracker is not None
        run = mlflow.start_run(
            run_id=self._incomplete_run(),
            experiment_id=self.tracker.experiment,
            run_name=name,
            parent_run_id=self.tracker.parent_run,
            log_system_metrics=True,
            tags={"stage": name, "dataset_digest": images_digest},
        )
        self.run_id = str(run.info.run_id)
        if self.pending_file:
            uri = without_password(self.tracker.uri)
            storage.write_json(self.pending_file, {"run_id": self.run_id, "uri": uri})
        mlflow.log_params(_legal_names(flatten_config(parameters)))
        if images_digest and images_table:
            dataset = image_dataset(images_table, images_digest)
            mlflow.log_input(dataset, context=name)

    def _incomplete_run(self) -> str | None:
        """Return the id of the run that an earlier process did not complete, if any."""
        assert self.tracker is not None
        if not self.pending_file or not storage.exists(self.pending_file):
            return None
        record = storage.read_json(self.pending_file)
        same_server = record.get("uri") == without_password(self.tracker.uri)
        return str(record["run_id"]) if same_server else None

    def log(self, metrics: Mapping[str, Any], folder: str) -> bool:
        """Log all numbers of ``metrics`` and the training curves in ``folder``.

        Returns whether they were written.
        """
        if self.tracker is None or self.run_id is None:
            return False
        is_written = self.tracker.attempt(lambda: _log_metrics(metrics, folder))
        if is_written and self.pending_file:
            storage.remove(self.pending_file)
        return is_written

    def end(self, status: str) -> None:
        """End the MLflow run.

        If the server is lost, at least this process's own record of an active run is
        closed, so that the next run can begin.
        """
        if self.tracker is None or self.run_id is None:
            return
        import mlflow

        if self.tracker.lost:
            with suppress(*mlflow_errors()):
                mlflow.end_run(status)
        else:
            self.tracker.attempt(lambda: mlflow.end_run(status))


def mlflow_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that MLflow raises when its server or the network fails."""
    from mlflow.exceptions import MlflowException

    return (MlflowException, OSError)


def _is_refusal(error: Exception) -> bool:
    """Tell whether a server that can be reached did not accept the request."""
    return getattr(error, "error_code", None) in REFUSALS


def _is_denied(error: Exception) -> bool:
    """Tell whether the server refuses the credentials, or got none."""
    return getattr(error, "error_code", None) in DENIALS


def _credentials_advice() -> str:
    variables = describe_variables(*CREDENTIAL_VARIABLES)
    return (
        f"The server asks for other credentials: MLflow sends those of {variables}, of"
        " ~/.mlflow/credentials, or user and password in the address; check them and"
        " what they may do"
    )


def _legal_names(leaves: Mapping[str, T]) -> dict[str, T]:
    """Return the leaves by the names that MLflow takes."""
    return {mlflow_name(name): leaf for name, leaf in leaves.items()}


def _database_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions of a database whose tables can't be made or brought up to
    date; MLflow lets them through.
    """
    from alembic.util import CommandError
    from sqlalchemy.exc import SQLAlchemyError

    return (CommandError, SQLAlchemyError)


@contextmanager
def _locked_database(uri: str) -> Iterator[None]:
    """Let one process at a time make the tables of a SQLite database: MLflow fails if
    two do. Other databases, and disks without locks, are not locked.
    """
    path = uri.removeprefix(SQLITE)
    lock_file: BinaryIO | None = None
    if path != uri:
        with suppress(OSError):
            lock_file = open(f"{path}.lock", "ab")  # noqa: SIM115
            fcntl.flock(lock_file, fcntl.LOCK_EX)
    try:
        yield
    finally:
        if lock_file is not None:
            lock_file.close()


def without_password(text: str) -> str:
    """Remove the user name and password from every address in ``text``."""
    return re.sub(r"(?<=://)[^/\s]+@", "", text)


def log_curve(curve: Sequence[Mapping[str, float]]) -> None:
    """Log every point of a training curve on the active run, in few requests."""
    import mlflow
    from mlflow.entities import Metric

    active_run = mlflow.active_run()
    if active_run is None:
        return
    metrics = [
        Metric(mlflow_name(name), number, 0, int(point["step"]))
        for point in curve
        for name, number in point.items()
        if name != "step"
    ]
    client = mlflow.MlflowClient()
    for start in range(0, len(metrics), MAX_BATCH):
        batch = metrics[start : start + MAX_BATCH]
        client.log_batch(active_run.info.run_id, metrics=batch)


def _log_metrics(metrics: Mapping[str, Any], folder: str) -> None:
    """Log a step's metrics and its training and validation curves on the active run."""
    import mlflow

    numbers = {
        name: float(leaf)
        for name, leaf in flatten(metrics).items()
        if isinstance(leaf, (int, float)) and leaf == leaf  # NaN is not logged
    }
    if numbers:
        mlflow.log_metrics(_legal_names(numbers))
    plain = json.loads(json.dumps(metrics, default=str))
    mlflow.log_dict(plain, "metrics.json")
    for file_name in ("curve.json", "validation.json"):
        curve_file = storage.join(folder, file_name)
        if storage.exists(curve_file):
            log_curve(storage.read_json(curve_file))


def _default_uri(root: str) -> str:
    """Return an SQLite database below a local root, or in the working directory."""
    is_local = "://" not in root
    return f"sqlite:///{root if is_local else os.path.abspath('.')}/mlflow.db"


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return without_password(lines[0] if lines else type(error).__name__)[:300]
