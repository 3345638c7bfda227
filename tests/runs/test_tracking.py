from __future__ import annotations

import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import mlflow
import pytest
from mlflow.exceptions import MlflowException, RestException

from coin_ray.config import Tracking
from coin_ray.config.presets import demo
from coin_ray.errors import ConfigError
from coin_ray.runs.tracking import Tracker, without_password


def _tracking_uri(root: Path, **settings: str) -> str:
    tracking = Tracking(**settings)  # type: ignore[arg-type]
    return Tracker(replace(demo(), tracking=tracking), str(root)).uri


def test_each_root_has_its_own_database_also_within_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow leaves the address it was told in the environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        root.mkdir()
    assert [_tracking_uri(root) for root in roots] == [
        f"sqlite:///{root}/mlflow.db" for root in roots
    ]


@pytest.mark.slow
def test_the_setting_has_precedence_over_the_environment_and_that_over_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from_environment = f"sqlite:///{tmp_path}/environment.db"
    from_setting = f"sqlite:///{tmp_path}/setting.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", from_environment)
    assert _tracking_uri(tmp_path) == from_environment
    assert _tracking_uri(tmp_path, uri=from_setting) == from_setting
    monkeypatch.setenv("MLFLOW_TRACKING_URI", from_environment)
    assert _tracking_uri(tmp_path) == from_environment


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:s3cret@host/path", "https://host/path"),
        (
            "API request to http://me:s3cret@host:5000/api failed at me@work",
            "API request to http://host:5000/api failed at me@work",
        ),
        ("sqlite:////tmp/a@b/mlflow.db", "sqlite:////tmp/a@b/mlflow.db"),
        ("postgresql+psycopg2://u:p@db/x", "postgresql+psycopg2://db/x"),
        (
            "postgresql://u:p@ss@db/x and http://host/a@b",
            "postgresql://db/x and http://host/a@b",
        ),
    ],
)
def test_passwords_of_a_tracking_server_are_not_printed(
    text: str, expected: str
) -> None:
    assert without_password(text) == expected


def test_odd_names_are_written_and_a_refused_one_does_not_end_the_tracking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker(demo(), str(tmp_path))
    with tracker.child_run("collect", {"R&D": {"50%": 1}}) as run:
        by_class = {"driver's seat": 0.25, "http inverted+reduced": 4}
        assert run.log({"by_class": by_class}, str(tmp_path))
    figures = mlflow.get_run(run.run_id).data.metrics
    assert figures == {
        "by_class.driver_U27_s seat": 0.25,
        "by_class.http inverted_U2B_reduced": 4,
    }
    assert mlflow.get_run(run.run_id).data.params == {"R_U26_D.50_U25_": "1"}

    assert not tracker.attempt(lambda: mlflow.get_run("no such run"))
    assert "MLflow refused what was written" in capsys.readouterr().out
    assert tracker.attempt(lambda: None)

    def lose_server() -> None:
        raise MlflowException("API request to http://a/b failed with timeout")

    assert not tracker.attempt(lose_server)
    assert tracker.lost


def test_a_broken_database_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ConfigError, match=r"tracking failed at sqlite:.*no-enabled"):
        Tracker(demo(), str(tmp_path))


class _RefusingHandler(BaseHTTPRequestHandler):
    """Answers 401 to everything, as an MLflow server with passwords does."""

    def do_GET(self) -> None:
        self.send_error(401)

    def do_POST(self) -> None:
        self.send_error(401)

    def log_message(self, *_: object) -> None:
        pass


def test_a_server_that_refuses_the_password_names_the_variables(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "a-secret-word")
    monkeypatch.delenv("MLFLOW_TRACKING_TOKEN", raising=False)
    server = HTTPServer(("127.0.0.1", 0), _RefusingHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ConfigError) as refusal:
            _tracking_uri(tmp_path, uri=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    message = str(refusal.value)
    assert "failed with error code 401" in message
    assert (
        "MLFLOW_TRACKING_USERNAME (set), MLFLOW_TRACKING_PASSWORD (set),"
        " MLFLOW_TRACKING_TOKEN (not set)" in message
    )
    assert "--tracking.no-enabled" in message
    assert "a-secret-word" not in message

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "root").mkdir()
    tracker = Tracker(demo(), str(tmp_path / "root"))

    def refuse() -> None:
        raise RestException({"error_code": "PERMISSION_DENIED", "message": "no rights"})

    assert not tracker.attempt(refuse)
    assert "MLFLOW_TRACKING_PASSWORD (set)" in capsys.readouterr().out
