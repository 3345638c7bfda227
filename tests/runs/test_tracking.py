from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from coin_ray.config import Tracking
from coin_ray.config.presets import demo
from coin_ray.runs.tracking import Tracker, without_password


def uri(root: Path, **tracking: str) -> str:
    return Tracker(replace(demo(), tracking=Tracking(**tracking)), str(root)).uri  # type: ignore[arg-type]


def test_each_root_has_its_own_database_also_within_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow leaves the address it was told in the environment."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        root.mkdir()
    assert [uri(root) for root in roots] == [
        f"sqlite:///{root}/mlflow.db" for root in roots
    ]


def test_the_setting_counts_before_the_environment_and_that_before_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, ours = (f"sqlite:///{tmp_path}/{name}.db" for name in ("theirs", "ours"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", theirs)
    assert uri(tmp_path) == theirs
    assert uri(tmp_path, uri=ours) == ours
    monkeypatch.setenv("MLFLOW_TRACKING_URI", theirs)
    assert uri(tmp_path) == theirs


@pytest.mark.parametrize(
    ("text", "shown"),
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
def test_no_password_of_a_tracking_server_is_told(text: str, shown: str) -> None:
    assert without_password(text) == shown
