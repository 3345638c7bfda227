from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coin_ray.config import Tracking
from coin_ray.config.presets import demo
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
