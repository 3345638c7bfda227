from __future__ import annotations

import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from coin_ray import config as settings
from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.config.presets import demo
from coin_ray.errors import StepError
from coin_ray.runs import steps
from coin_ray.runs.steps import Context, Metrics, Step, finished_manifests, run_step

CONFIG = demo()
Install = Callable[[Callable[[Context[PipelineConfig]], Metrics]], None]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that makes another one the stage named "fake"."""

    def install(run: Callable[[Context[PipelineConfig]], Metrics]) -> None:
        module = types.ModuleType("coin_ray.stages.fake")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return install


FIRST = Step("first", "fake", identity={"a": 1})
SECOND = Step(
    "second", "fake", identity=(), inputs=(FIRST,), options={"labels": "clip"}
)


def test_manifest_is_the_last_write(stage: Install, tmp_path: Path) -> None:
    manifests_during_run = []

    def run(context: Context[PipelineConfig]) -> Metrics:
        manifests_during_run.append(storage.list_files(str(tmp_path), "manifest.json"))
        storage.write_bytes(storage.join(context.folder, "result"), b"1")
        return {"count": 3}

    stage(run)
    manifest = run_step(FIRST, CONFIG, str(tmp_path))
    assert manifests_during_run == [[]]
    assert manifest.metrics == {"count": 3}
    assert FIRST.read_manifest(str(tmp_path)) == manifest
    assert set(finished_manifests([FIRST, SECOND], str(tmp_path))) == {"first"}


def test_a_failed_step_is_not_finished(stage: Install, tmp_path: Path) -> None:
    def run(context: Context[PipelineConfig]) -> Metrics:
        raise RuntimeError("killed")

    stage(run)
    with pytest.raises(RuntimeError, match="killed"):
        run_step(FIRST, CONFIG, str(tmp_path))
    assert not FIRST.is_finished(str(tmp_path))


def test_missing_inputs_are_named_and_nothing_runs(
    stage: Install, tmp_path: Path
) -> None:
    stage(lambda context: pytest.fail("ran"))
    with pytest.raises(
        StepError, match=r"second needs finished first .*coin-ray adapt .*--until first"
    ):
        run_step(SECOND, CONFIG, str(tmp_path))


def test_a_stage_gets_its_folders_and_options(stage: Install, tmp_path: Path) -> None:
    contexts = []
    stage(lambda context: contexts.append(context) or {})
    root = str(tmp_path)
    run_step(FIRST, CONFIG, root)
    run_step(SECOND, CONFIG, root)
    context = contexts[1]
    assert (context.name, context.options, context.root) == (
        "second",
        {"labels": "clip"},
        root,
    )
    assert context.inputs == {"first": FIRST.folder(root)}
    assert (
        context.folder
        == SECOND.folder(root)
        == f"{root}/steps/second-{SECOND.fingerprint}"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"version": 2},
        {"identity": {"a": 2}},
        {"options": {"x": 1}},
        {"inputs": (Step("zero", "fake", ()),)},
    ],
)
def test_fingerprints_follow_everything_upstream(change: dict[str, Any]) -> None:
    other = replace(FIRST, **change)
    assert other.fingerprint != FIRST.fingerprint
    assert replace(SECOND, inputs=(other,)).fingerprint != SECOND.fingerprint


def test_the_stage_module_is_no_identity() -> None:
    assert replace(FIRST, stage="renamed").fingerprint == FIRST.fingerprint


def test_a_step_keeps_its_identity_with_another_installation_of_the_package(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = Step(
        "collect", "collect", identity=(CONFIG.clip, CONFIG.classes), inputs=(FIRST,)
    )
    assert f"'{settings.PACKAGE}" in str(here.identity)
    with monkeypatch.context() as elsewhere:
        there = "/tmp/ray/_ray_pkg_1/coin_ray"
        elsewhere.setattr(steps, "PACKAGE", there)
        sent = pickle.dumps(
            replace(
                here,
                identity=settings.relocate_paths(
                    here.identity, settings.PACKAGE, there
                ),
            )
        )
    assert pickle.loads(sent) == here
    assert pickle.loads(sent).fingerprint == here.fingerprint
