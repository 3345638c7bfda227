"""Every command in the docs that starts a program of ours, up to where it would begin
to work."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
from pages import (
    PAGES,
    REPOSITORY,
    fenced,
    mentioned_subcommands,
    read_commands,
    served,
)

from coin_ray.commands.arguments import parse_run_arguments
from coin_ray.commands.main import SUBCOMMANDS, main

COMMANDS = sorted(
    {(words, page) for page, text in PAGES.items() for words in read_commands(text)}
)
PROGRAMS = [(words, page) for words, page in COMMANDS if words[0] != "-m"]
MODULES = [(words, page) for words, page in COMMANDS if words[0] == "-m"]
LABEL_MAP = (
    "classes: [car, truck, person]\nmap: {Car: car, Truck: truck, Person: person}\n"
)
WORK = (
    "coin_ray.runs.runner.run_pipeline",
    "coin_ray.runs.runner.print_plan",
    "coin_ray.experiments.rendering_comparison.compare_renderings",
    "coin_ray.experiments.teacher_comparison.compare_teachers",
    "coin_ray.experiments.studies.run_fusion_study",
    "coin_ray.experiments.studies.run_ablation",
    "coin_ray.experiments.components.run_component_study",
    "coin_ray.search.run.run_search",
    "coin_ray.search.run.print_search_plan",
    "coin_ray.search.page.write_page",
    "coin_ray.commands.detector.train_detector",
    "coin_ray.commands.export.export_student",
    "coin_ray.commands.report.write_comparison",
    "coin_ray.commands.review.export_reviews",
    "coin_ray.commands.review.import_reviews",
    "coin_ray.commands.labels.check_label_map",
    "coin_ray.commands.labels.propose_map",
    "coin_ray.commands.labels.export_run_labels",
    "coin_ray.commands.journal.open_run_journal",
    "coin_ray.commands.journal.show_journal",
    "coin_ray.commands.journal.verify_journal",
    "coin_ray.commands.journal.compact_journal",
    "coin_ray.commands.journal.drop_answer",
    "coin_ray.data.check.check_datasets",
    "coin_ray.serving.local_cloud.asyncio.run",
    "coin_ray.serving.local_cloud.load_served_detector",
    "coin_ray.serving.local_cloud.create_app",
    "coin_ray.serving.champion.register",
)
"""What the commands do after their options are read."""


def _test_id(parameter: object) -> str | None:
    return " ".join(parameter)[:90] if isinstance(parameter, tuple) else None


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Commands read their options and stop; the files that they name are there."""
    for work in WORK:
        monkeypatch.setattr(work, lambda *_, **__: 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.yaml").write_text(LABEL_MAP)
    (tmp_path / "classes.yaml").write_text("car: {ask: [automobile]}\n")
    return tmp_path


def _start(monkeypatch: pytest.MonkeyPatch, program: str, *arguments: str) -> object:
    """The exit code of ``coin-ray``, a script or a module, run in this process."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    if program == "coin-ray":
        run = partial(main, arguments)
    elif program.endswith(".py"):
        script = str(REPOSITORY / program)
        run = partial(runpy.run_path, script, run_name="__main__")
    else:
        run = partial(runpy.run_module, program, alter_sys=True, run_name="__main__")
    try:
        return run()
    except SystemExit as end:
        return end.code


@pytest.mark.parametrize(("words", "page"), PROGRAMS, ids=_test_id)
def test_a_documented_command_is_understood(
    words: tuple[str, ...], page: str, stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--config" in words or len(words) == 1:
        # ROOT/config.yaml is of a run that is not here; one word only names a script.
        assert set(words[1:2]) & set(SUBCOMMANDS) or (REPOSITORY / words[0]).exists()
        return
    assert _start(monkeypatch, *words) in (None, 0), (page, words)


@pytest.mark.parametrize("page", PAGES)
def test_a_mentioned_subcommand_exists(page: str) -> None:
    assert mentioned_subcommands(PAGES[page]) <= set(SUBCOMMANDS)


def test_every_subcommand_is_documented() -> None:
    mentioned = set().union(*map(mentioned_subcommands, PAGES.values()))
    started = {words[1] for words, _ in COMMANDS if words[0] == "coin-ray"}
    table = set(re.findall(r"`(?:coin-ray )?([\w-]+)[^`\n]*`", PAGES["README.md"]))
    assert set(SUBCOMMANDS) <= mentioned | started | table


@pytest.mark.parametrize(("words", "page"), MODULES, ids=_test_id)
def test_a_documented_module_has_the_options(
    words: tuple[str, ...],
    page: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, *arguments = words[1:]
    if module.startswith("coin_ray.demo.build"):
        # its own needs are an extra
        source = (REPOSITORY / f"{module.replace('.', '/')}.py").read_text()
        assert all(option in source for option in arguments if option.startswith("--"))
        return
    assert _start(monkeypatch, module, "--help") in (None, 0)
    options = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {a.partition("=")[0] for a in arguments if a.startswith("--")} <= options | {
        "--help"
    }, page


@pytest.mark.parametrize("page", [p for p, text in PAGES.items() if served(text)])
def test_a_documented_application_is_served_with_settings_it_has(
    page: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("grpc_reflection", reason="needs the extra serve")
    import_attr = importlib.import_module("ray._common.utils").import_attr
    for variables, target, words in served(PAGES[page]):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        application = import_attr(target)
        assert (
            application(words) if target.endswith("build") else application
        )._bound_deployment.name == "coin-detector"


def test_applications_are_found_at_all() -> None:
    assert served(
        "    A=1 B=c serve run coin_ray.serving:app\nserve run coin_ray.serving:build"
        " x=1 y=a,b\n"
    ) == [
        ({"A": "1", "B": "c"}, "coin_ray.serving:app", {}),
        ({}, "coin_ray.serving:build", {"x": "1", "y": "a,b"}),
    ]
    assert len(served(PAGES["docs/serving.md"])) == 3


def test_an_unknown_option_and_a_removed_pipeline_would_be_noticed(
    stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unknown = ("demo", "--no-such-thing", "1")
    assert _start(monkeypatch, "coin-ray", "adapt", *unknown) == 2
    assert _start(monkeypatch, "coin-ray", "adopt") == 2
    assert _start(monkeypatch, "pipelines/full.py", *unknown) == 2
    assert _start(monkeypatch, "pipelines/compare.py", *unknown) == 2
    assert _start(monkeypatch, "pipelines/collect.py", "journal", "burn") == 2
    with pytest.raises(FileNotFoundError):
        _start(monkeypatch, "pipelines/absent.py")


def test_commands_are_found_at_all() -> None:
    text = (
        "```bash\nexport A=1\nray job submit -- \\\n  python pipelines/full.py demo"
        " --root r  # why\n```\n\n    A=1 coin-ray capacity --json\n"
    )
    assert read_commands(text) == [
        ("pipelines/full.py", "demo", "--root", "r"),
        ("coin-ray", "capacity", "--json"),
    ]
    assert {page for _, page in COMMANDS} >= {
        "README.md",
        "README.zh.md",
        "docs/quickstart.zh.md",
        "docs/own-data.md",
        "docs/cluster.md",
    }


def test_make_has_what_the_docs_tell_it_to_make() -> None:
    targets = set(
        re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
    )
    documented_targets = {
        t
        for text in PAGES.values()
        for block in fenced(text, "bash")
        for t in re.findall(r"^make ([\w-]+)", block, re.M)
    }
    assert documented_targets
    assert documented_targets <= targets


@pytest.mark.parametrize(
    "page", [p for p, text in PAGES.items() if fenced(text, "python")]
)
def test_python_in_the_docs_imports_what_exists(page: str) -> None:
    for block in fenced(PAGES[page], "python"):
        compile(block, page, "exec")
        for line in re.findall(r"^(?:from|import) coin_ray.*$", block, re.M):
            exec(line, {})


def test_help_names_every_option_of_the_parser(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        parse_run_arguments(["--help"])
    help_text = capsys.readouterr().out
    assert all(
        option in help_text
        for option in (
            "--root",
            "--until",
            "--dry-run",
            "--baselines",
            "--config",
            "--settings",
        )
    )
    assert argparse.SUPPRESS not in help_text
