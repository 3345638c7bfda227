"""Images that failed are asked again by the same command, and what was made without
them is made again."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from coin_ray import storage, tables
from coin_ray.config import PipelineConfig, Tracking
from coin_ray.config.presets import demo
from coin_ray.errors import AuthError
from coin_ray.experiments import grid
from coin_ray.runs import runner
from coin_ray.runs.failed_images import is_final
from coin_ray.runs.steps import Context, Metrics, Step, remove_readers, run_step
from coin_ray.stages.collect import _remove_outdated_readers

CONFIG = replace(demo(), tracking=Tracking(enabled=False))
IMAGES = Step("images", "fake_images", 0)
COLLECT = Step("collect", "fake_collect", 1, (IMAGES,))
TRAIN = Step("distill", "fake_later", 2, (IMAGES, COLLECT))
EVALUATE = Step("evaluate", "fake_later", 3, (TRAIN,))
ORACLE = Step("oracle", "fake_later", 4, (IMAGES,))
STEPS = {step.name: step for step in (IMAGES, COLLECT, TRAIN, EVALUATE, ORACLE)}
OUTAGE, REFUSAL = "DeadlineExceeded: no answer", "Refused: not this one"


class Service:
    """What the fake collection gets: an error by image id, for those that fail."""

    def __init__(self) -> None:
        self.errors: dict[str, str] = {}
        self.stop: Exception | None = None
        self.made: list[str] = []
        """Names of the steps that were run."""


def _row(image_id: str, error: str | None) -> dict[str, object]:
    row: dict[str, object] = dict.fromkeys(tables.DETECTIONS.names)
    status = "error" if error else "ok"
    return row | {"image_id": image_id, "status": status, "error": error}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    service = Service()

    def collect(context: Context[PipelineConfig]) -> Metrics:
        service.made.append(context.name)
        if service.stop is not None:
            raise service.stop
        rows = [_row(image_id, service.errors.get(image_id)) for image_id in "abc"]
        uri = storage.join(context.folder, "cloud.parquet")
        storage.write_table(uri, tables.detections_table(rows))
        metrics = {"calls": {"failed": len(service.errors), "made": len(service.made)}}
        _remove_outdated_readers(context, metrics)
        return metrics

    def other(context: Context[PipelineConfig]) -> Metrics:
        service.made.append(context.name)
        weights = storage.join(context.folder, "curve.json")
        assert not storage.exists(weights), "the training was finished before"
        storage.write_json(weights, [])
        return {}

    stages = {"fake_images": other, "fake_collect": collect, "fake_later": other}
    for name, run in stages.items():
        module = types.ModuleType(f"coin_ray.stages.{name}")
        module.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return service


Run = Callable[..., list[str]]


@pytest.fixture
def run(service: Service, tmp_path: Path) -> Run:
    """Run the pipeline and return the names of the steps that were run."""

    def run(config: PipelineConfig = CONFIG, **options: bool) -> list[str]:
        service.made = []
        runner.run_pipeline(config, STEPS, str(tmp_path), **options)
        return service.made

    return run


ALL = ["images", "collect", "distill", "evaluate", "oracle"]


def test_a_finished_run_without_failures_does_nothing(
    run: Run, service: Service, tmp_path: Path
) -> None:
    assert run() == ALL
    assert run() == []
    assert not list((tmp_path / "lease").glob("*.json"))


def test_after_an_outage_failed_images_are_asked_and_readers_made_again(
    run: Run, service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    service.errors = {"a": OUTAGE, "b": OUTAGE}
    assert run() == ALL
    assert run() == ["collect"], "nothing changed, so nothing else is made again"
    service.errors = {"b": OUTAGE}
    capsys.readouterr()
    assert run() == ["collect", "distill", "evaluate"]
    output = capsys.readouterr().out
    assert "2 images failed before and are asked again" in output
    assert "1 images that failed have an answer now; made again: distill, evaluate" in (
        output
    )
    service.errors = {}
    assert run() == ["collect", "distill", "evaluate"]
    assert run() == []


@pytest.mark.parametrize("retry", [False, True])
def test_refused_images_are_asked_again_only_on_request(
    retry: bool, run: Run, service: Service
) -> None:
    service.errors = {"a": REFUSAL}
    run()
    collect = replace(CONFIG.collect, retry_refused=retry)
    assert run(replace(CONFIG, collect=collect)) == (["collect"] if retry else [])


def test_a_service_that_has_gone_leaves_the_finished_run_as_it_was(
    run: Run, service: Service, tmp_path: Path
) -> None:
    service.errors = {"a": OUTAGE}
    run()
    manifest = COLLECT.read_manifest(str(tmp_path))
    service.stop = AuthError("no such key")
    with pytest.raises(AuthError):
        run()
    assert COLLECT.read_manifest(str(tmp_path)) == manifest
    assert run(ask_failed=False) == []
    assert not list(tmp_path.glob("steps/*/reopened.json"))


@dataclass(frozen=True)
class _Trial:
    """A trial of a study or a search."""

    config: PipelineConfig = CONFIG
    steps: Mapping[str, Step] = field(default_factory=lambda: STEPS)


def test_a_study_asks_failed_images_again_each_collection_once(
    run: Run, service: Service, tmp_path: Path
) -> None:
    root = str(tmp_path)
    grid._ask_failed_images([_Trial()], root)  # type: ignore[list-item]
    assert service.made == [], "nothing is collected yet"
    service.errors = {"a": OUTAGE, "b": REFUSAL}
    run()
    service.made, service.errors = [], {"b": REFUSAL}
    grid._ask_failed_images([_Trial(), _Trial()], root)  # type: ignore[list-item]
    assert service.made == ["collect"]
    assert not EVALUATE.is_finished(root), "it was made without the new answer"
    assert ORACLE.is_finished(root)
    grid._ask_failed_images([_Trial()], root)  # type: ignore[list-item]
    assert service.made == ["collect"]


def test_a_killed_run_that_asks_again_still_finds_out_what_is_outdated(
    run: Run, service: Service, tmp_path: Path
) -> None:
    service.errors = {"a": OUTAGE}
    run()
    folder = tmp_path / "steps" / f"collect-{COLLECT.fingerprint}"
    (folder / "manifest.json").rename(folder / "reopened.json")  # as a kill leaves it
    service.errors = {}
    assert run() == ["collect", "distill", "evaluate"]
    assert not (folder / "reopened.json").exists()


def test_readers_of_other_runs_and_unfinished_ones_are_outdated_too(
    service: Service, tmp_path: Path
) -> None:
    root = str(tmp_path)
    other_seed = replace(TRAIN, identity="another seed")
    unfinished = replace(TRAIN, identity="killed while it trained")
    for step in (IMAGES, COLLECT, ORACLE, other_seed, unfinished):
        run_step(step, CONFIG, root)
    Path(unfinished.folder(root), "manifest.json").unlink()
    assert remove_readers(root, COLLECT.folder(root)) == ["distill"]
    assert not list(Path(other_seed.folder(root)).iterdir())
    assert not list(Path(unfinished.folder(root)).iterdir())
    assert COLLECT.is_finished(root)
    assert ORACLE.is_finished(root)


def test_the_plan_names_the_failed_images(
    run: Run,
    service: Service,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("coin_ray.runs.estimate.estimate_cost", lambda *_: [None])
    monkeypatch.setattr("coin_ray.runs.estimate.print_estimate", lambda *_: None)
    service.errors = {"a": OUTAGE, "b": REFUSAL}
    run()
    runner.print_plan(CONFIG, STEPS, str(tmp_path))
    assert "1 images failed and are asked again" in capsys.readouterr().out
    runner.print_plan(CONFIG, STEPS, str(tmp_path), ask_failed=False)
    assert "asked again" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "final"),
    [
        ("Refused: the service answered 451", True),
        ("ImageRejected: too large; at most 5 MB", True),
        ("UnusableBoxes: percent", True),
        ("gemini: Refused: no; http: ImageRejected: too small", True),
        ("gemini: Refused: no; http: DeadlineExceeded: no answer", False),
        ("http 2: Transient: the service answered 500", False),
        ("FileNotFoundError: /photos/a.jpg", False),
        ("InputError: the file is damaged", False),
        ("ProtocolError: Refused: is not a key", False),
        ("the process that labelled it has died 2 times with it", True),
        ("", False),
    ],
)
def test_errors_that_another_call_would_not_change(error: str, final: bool) -> None:
    assert is_final(error) == final


def test_packages_of_later_steps_are_checked_before_anything_is_asked(
    service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[set[str]] = []
    monkeypatch.setattr(
        runner, "check_installed", lambda config, steps: checked.append(set(steps))
    )
    runner.run_pipeline(CONFIG, STEPS, str(tmp_path), "images")
    runner.run_pipeline(CONFIG, STEPS, str(tmp_path), "collect")
    runner.run_pipeline(CONFIG, STEPS, str(tmp_path), "distill")
    assert checked == [{"images"}, set(STEPS) - {"images"}, {"distill"}]
