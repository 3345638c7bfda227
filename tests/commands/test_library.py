from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import CLASSES, tiny_detector
from PIL import Image

import coin_ray
from coin_ray import storage
from coin_ray.commands import library
from coin_ray.commands.library import build_config, replace_settings
from coin_ray.config import Folder, PipelineConfig
from coin_ray.config.presets import PRESETS
from coin_ray.errors import ConfigError, StepError
from coin_ray.predictors.student import write_exported_student
from coin_ray.report.run_summary import RunSummary
from coin_ray.runs.graph import build_steps
from coin_ray.runs.steps import Step

REPOSITORY = Path(__file__).parents[2]
DOCS = (REPOSITORY / "docs/quickstart.md", REPOSITORY / "docs/quickstart.zh.md")
MINIMAL: dict[str, Any] = {
    "images": "photos",
    "classes": ["person", "dog"],
    "cloud": "https://detector.example.com",
}


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, coin_ray; coin_ray.__all__; print(sorted({'torch', 'ray', 'numpy',"
        " 'tyro', 'pyarrow'} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=REPOSITORY,
        ).stdout
        == "[]\n"
    )


def test_names_are_there_and_others_are_not() -> None:
    assert coin_ray.adapt is library.adapt
    with pytest.raises(AttributeError, match="no attribute 'adopt'"):
        coin_ray.adopt  # noqa: B018


def _settled(
    settings: Mapping[str, Any] | None = None, **arguments: Any
) -> PipelineConfig:
    defaults = {
        "images": None,
        "classes": (),
        "cloud": "",
        "test": None,
        "preset": "folder",
    } | arguments
    return build_config(**defaults, settings=settings or {})


def test_the_same_config_as_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coin_ray.commands.arguments import parse_run_arguments

    monkeypatch.chdir(tmp_path)
    words = [
        "folder",
        "--images",
        str(tmp_path / "photos"),
        "--test",
        str(tmp_path / "labelled"),
        "--classes",
        "person,dog",
    ]
    words += [
        "--cloud",
        "dino-x",
        "--cloud.usd-per-call",
        "0.01",
        "--cloud.max-usd",
        "5",
        "--distill.fit.steps",
        "70",
        "--distill.fit.milestones",
        "10",
        "20",
        "30",
    ]
    settings = {
        "cloud.usd_per_call": 0.01,
        "cloud.max_usd": 5,
        "distill.fit.steps": 70,
        "distill.fit.milestones": (10, 20, 30),
    }
    assert (
        _settled(settings, **MINIMAL | {"cloud": "dino-x", "test": "labelled"})
        == parse_run_arguments(words)[0]
    )


def test_a_preset_needs_nothing_more() -> None:
    assert _settled(preset="demo") == PRESETS["demo"]()
    assert _settled(preset="demo", images="photos").data == Folder(
        str(Path("photos").absolute())
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"preset": "dmeo"}, "the presets are demo, folder"),
        (
            {**MINIMAL, "classes": "person, dog"},
            r"classes must be a list of names, as \['person', 'dog'\]",
        ),
        ({**MINIMAL, "cloud": "dino-y"}, "the services are http, dino-x"),
        ({**MINIMAL, "images": None}, "which images"),
        ({**MINIMAL, "classes": ()}, "which classes"),
        ({**MINIMAL, "cloud": ""}, "which cloud"),
        (
            {**MINIMAL, "settings": {"cloud.max_dollars": 5}},
            r"no setting 'cloud.max_dollars'; close to it: cloud\.max",
        ),
        ({**MINIMAL, "settings": {"distill": 5}}, "settings: distill"),
        ({**MINIMAL, "settings": {"cloud.url.port": 5}}, "no setting 'cloud.url.port'"),
        (
            {**MINIMAL, "settings": {"distill.fit.steps": "many"}},
            "settings: distill.fit.steps",
        ),
        (
            {**MINIMAL, "settings": {"labels.score_min": 2}},
            "labels.score_min must lie in 0..1",
        ),
    ],
)
def test_what_can_not_be_is_said_with_what_can(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _settled(**arguments)


@pytest.mark.parametrize("name", ["cloud.max_usd", "cloud.max-usd"])
def test_settings_have_the_names_of_the_command_line(name: str) -> None:
    assert replace_settings(PRESETS["demo"](), {name: 3}).cloud.max_usd == 3


@pytest.fixture
def runner_calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Record the runner's arguments, and write a tiny student and a page as finished steps
    would."""
    calls: list[Any] = []

    def run(
        config: PipelineConfig,
        steps: Mapping[str, Step],
        root: str,
        until: str | None = None,
    ) -> RunSummary:
        calls.append((config, root, until))
        for name in ("export", "report") if until is None else ():
            storage.write_json(
                storage.join(steps[name].folder(root), "manifest.json"), {}
            )
        write_exported_student(
            tiny_detector().eval(), CLASSES, steps["export"].folder(root)
        )
        return RunSummary(map50={"student": 0.5})

    monkeypatch.setattr("coin_ray.runs.runner.run_pipeline", run)
    monkeypatch.setattr(
        "coin_ray.runs.runner.print_plan",
        lambda config, steps, root: calls.append((config, root, "plan")),
    )
    return calls


def test_a_result_holds_student_report_and_export(
    runner_calls: list[Any], tmp_path: Path
) -> None:
    run = coin_ray.adapt(**MINIMAL, root=tmp_path / "run")
    config = runner_calls[0][0]
    assert runner_calls == [(config, str(tmp_path / "run"), None)]
    assert run.summary["map50"] == {"student": 0.5}
    image = Image.effect_noise((80, 60), 90).convert("RGB")
    detections = run.student(image)
    assert run.student.classes == CLASSES
    assert (
        run.report() == f"{build_steps(config)['report'].folder(run.root)}/report.html"
    )
    assert run.export() == build_steps(config)["export"].folder(run.root)
    copied = coin_ray.commands.library.Adaptation(config, run.root, {}).export(
        tmp_path / "model"
    )
    from coin_ray.predictors.student import load_exported_student

    assert torch.equal(load_exported_student(copied)(image).boxes, detections.boxes)


def test_what_was_not_made_is_said(runner_calls: list[Any], tmp_path: Path) -> None:
    run = coin_ray.adapt(**MINIMAL, root=tmp_path, until="collect")
    for ask in (lambda: run.student, run.report, run.export):
        with pytest.raises(
            StepError, match=r"is not finished below .*: call adapt again"
        ):
            ask()
    with pytest.raises(ConfigError, match="until must be one of images, collect"):
        coin_ray.adapt(**MINIMAL, root=tmp_path, until="oracle")


@pytest.mark.parametrize("page", DOCS, ids=lambda p: p.name)
def test_the_documented_snippet_runs(
    page: Path, runner_calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    Image.effect_noise((80, 60), 90).convert("RGB").save("image.jpg")
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S)
    assert len(blocks) >= 2
    for block in blocks:
        exec(block, {})
    assert [until for _, _, until in runner_calls] == [None, "plan", None]
    assert (tmp_path / "model" / "model.json").exists()
    assert runner_calls[1][0] == runner_calls[2][0]
    assert (runner_calls[2][0].cloud.token_env, runner_calls[2][0].cloud.max_usd) == (
        "DETECTOR_TOKEN",
        50,
    )


@pytest.mark.parametrize("page", ["README.md", "README.zh.md"])
def test_the_snippet_of_the_readme_runs(
    page: str, runner_calls: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re

    monkeypatch.chdir(tmp_path)
    text = (REPOSITORY / page).read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    names: dict[str, Any] = {}
    exec(block, names)
    assert [until for _, _, until in runner_calls] == ["plan", None]
    assert names["detect"].classes == CLASSES
    assert (tmp_path / "model" / "model.json").exists()


def test_the_plan_of_the_demo_asks_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coin_ray.plan(preset="demo", root=tmp_path)
    message = capsys.readouterr().out
    assert "collect" in message
    assert not list(tmp_path.rglob("*.parquet"))
