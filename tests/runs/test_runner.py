"""The runner: which steps it runs, with which config, and what it prints."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from coin_ray.config import PipelineConfig, Tracking
from coin_ray.config.presets import demo
from coin_ray.runs.runner import open_tracker, run_missing_steps, select_steps
from coin_ray.runs.steps import Context, Metrics, Step

FIRST = Step("first", "recorded", identity=1)
SECOND = Step("second", "recorded", identity=2, inputs=(FIRST,))
ASIDE = Step("aside", "recorded", identity=3)
STEPS = {step.name: step for step in (FIRST, ASIDE, SECOND)}
CONFIG = replace(demo(), tracking=Tracking(enabled=False))


@pytest.fixture
def contexts(monkeypatch: pytest.MonkeyPatch) -> list[Context[PipelineConfig]]:
    """Contexts of the steps that were run, by a stage that records them."""
    recorded: list[Context[PipelineConfig]] = []

    def run(context: Context[PipelineConfig]) -> Metrics:
        recorded.append(context)
        return {"order": len(recorded)}

    module = types.ModuleType("coin_ray.stages.recorded")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return recorded


def test_steps_run_once_and_in_order(
    contexts: list[Context[PipelineConfig]], tmp_path: Path
) -> None:
    root = str(tmp_path)
    assert list(run_missing_steps([FIRST], CONFIG, root)) == ["first"]
    manifests = run_missing_steps(STEPS.values(), CONFIG, root)
    assert [context.name for context in contexts] == ["first", "aside", "second"]
    assert {name: m.metrics["order"] for name, m in manifests.items()} == {
        "first": 1,
        "aside": 2,
        "second": 3,
    }
    assert run_missing_steps(STEPS.values(), CONFIG, root) == manifests
    assert len(contexts) == 3


def test_progress_is_printed_unless_nothing_is_missing_or_it_is_off(
    contexts: list[Context[PipelineConfig]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_missing_steps([FIRST], CONFIG, str(tmp_path), progress=False)
    assert capsys.readouterr().out == ""
    run_missing_steps([FIRST, SECOND], CONFIG, str(tmp_path))
    assert capsys.readouterr().out.splitlines() == [
        "first: finished before",
        "second: started",
        "second: finished in 0 s",
    ]
    run_missing_steps([FIRST, SECOND], CONFIG, str(tmp_path))
    assert capsys.readouterr().out == ""


def test_a_step_may_have_other_work_and_another_config(
    contexts: list[Context[PipelineConfig]], tmp_path: Path
) -> None:
    other_config = replace(CONFIG, seed=5)
    manifests = run_missing_steps(
        [FIRST, SECOND],
        CONFIG,
        str(tmp_path),
        work={"second": lambda context: {"seed": context.config.seed}},
        step_configs={"second": other_config},
    )
    assert [context.config for context in contexts] == [CONFIG]
    assert manifests["second"].metrics == {"seed": 5}


def test_a_step_is_selected_with_all_that_it_depends_on() -> None:
    assert list(select_steps(STEPS, "second")) == ["first", "second"]
    assert select_steps(STEPS, None) == STEPS


def test_tracking_is_opened_only_if_there_is_something_to_write(
    contexts: list[Context[PipelineConfig]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened: list[str] = []

    class RecordedTracker:
        enabled = False

        def __init__(self, config: PipelineConfig, root: str) -> None:
            opened.append(root)

    monkeypatch.setattr("coin_ray.runs.runner.Tracker", RecordedTracker)
    root = str(tmp_path)
    tracked = replace(CONFIG, tracking=Tracking())
    assert open_tracker([FIRST], CONFIG, root) is None
    assert open_tracker([FIRST], tracked, root) is not None
    run_missing_steps([FIRST], CONFIG, root)
    assert open_tracker([FIRST], tracked, root) is None
    pending = tmp_path / "mlflow" / "owed" / f"first-{FIRST.fingerprint}.json"
    pending.parent.mkdir(parents=True)
    pending.write_text("{}")
    assert open_tracker([FIRST], tracked, root) is not None
    pending.unlink()
    registers_model = replace(tracked, tracking=Tracking(model="harbour"))
    assert open_tracker([FIRST], registers_model, root) is not None
    assert len(opened) == 3
