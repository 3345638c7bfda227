"""Every command in the docs that starts a program of ours, up to where it would begin
to work."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from pages import PAGES, REPOSITORY, commands, fenced, served

from coin_ray.commands import arguments as cli
from coin_ray.commands import detector as detector_cli
from coin_ray.commands import export as exporting
from coin_ray.commands import grid as grids
from coin_ray.commands import labels as tools
from coin_ray.commands import renderings as pilot
from coin_ray.commands import review
from coin_ray.experiments import components
from coin_ray.search import page as search_pages
from coin_ray.search import run as searches

FOUND = sorted(
    {(words, page) for page, text in PAGES.items() for words in commands(text)}
)
SCRIPTS = [(words, page) for words, page in FOUND if words[0].endswith(".py")]
MODULES = [(words, page) for words, page in FOUND if words[0] == "-m"]
MAP = "classes: [car, truck, person]\nmap: {Car: car, Truck: truck, Person: person}\n"


def name(value: object) -> str | None:
    return " ".join(value)[:90] if isinstance(value, tuple) else None


@pytest.fixture
def stubs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Programs read their command lines and stop; the files that commands name are
    there."""

    def grid(
        script: str, description: str, work: Callable[[grids.Request], None]
    ) -> int:
        grids.request(sys.argv[1:], script, description)
        return 0

    def tool(arguments: list[str], script: str = "collect.py") -> int:
        tools._parser(script).parse_args(arguments)
        return 0

    monkeypatch.setattr(cli, "_run", lambda *_: 0)
    monkeypatch.setattr(exporting, "export", lambda *_: None)
    monkeypatch.setattr(review, "_out", lambda *_: "")
    monkeypatch.setattr(review, "_back", lambda *_: "")
    monkeypatch.setattr(detector_cli, "train", lambda *_: None)
    monkeypatch.setattr(searches, "search", lambda *_, **__: None)
    monkeypatch.setattr(searches, "plan", lambda *_: None)
    monkeypatch.setattr(search_pages, "main", lambda *_: 0)
    monkeypatch.setattr(search_pages, "write_page", lambda *_: "")
    monkeypatch.setattr(grids, "main", grid)
    monkeypatch.setattr(components, "study", lambda *_: None)
    monkeypatch.setattr(tools, "main", tool)
    monkeypatch.setattr(pilot, "compare", lambda *_: None)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "map.yaml").write_text(MAP)
    return tmp_path


def start(monkeypatch: pytest.MonkeyPatch, program: str, *arguments: str) -> object:
    """The exit code of a script, or of a module, run in this process."""
    monkeypatch.setattr(sys, "argv", [program, *arguments])
    run = (
        partial(runpy.run_path, str(REPOSITORY / program))
        if program.endswith(".py")
        else partial(runpy.run_module, program, alter_sys=True)
    )
    with pytest.raises(SystemExit) as ended:
        run(run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize(("words", "page"), SCRIPTS, ids=name)
def test_a_documented_pipeline_is_understood(
    words: tuple[str, ...], page: str, stubs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "--config" in words:  # ROOT/config.yaml of a run that is not here
        assert (REPOSITORY / words[0]).exists()
        return
    assert start(monkeypatch, *words) in (None, 0), (page, words)


@pytest.mark.parametrize(("words", "page"), MODULES, ids=name)
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
    assert start(monkeypatch, module, "--help") in (None, 0)
    known = set(re.findall(r"--[\w-]+", capsys.readouterr().out))
    assert {a.partition("=")[0] for a in arguments if a.startswith("--")} <= known | {
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
    assert start(monkeypatch, "pipelines/full.py", "demo", "--no-such-thing", "1") == 2
    assert (
        start(monkeypatch, "pipelines/compare.py", "demo", "--no-such-thing", "1") == 2
    )
    assert start(monkeypatch, "pipelines/collect.py", "journal", "burn") == 2
    with pytest.raises(FileNotFoundError):
        start(monkeypatch, "pipelines/absent.py")


def test_commands_are_found_at_all() -> None:
    text = (
        "```bash\nexport A=1\nray job submit -- \\\n  python pipelines/full.py demo"
        " --root r  # why\n```\n\n    python -m coin_ray.commands.capacity --json\n"
    )
    assert commands(text) == [
        ("pipelines/full.py", "demo", "--root", "r"),
        ("-m", "coin_ray.commands.capacity", "--json"),
    ]
    assert {page for _, page in FOUND} >= {
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
    told = {
        t
        for text in PAGES.values()
        for block in fenced(text, "bash")
        for t in re.findall(r"^make ([\w-]+)", block, re.M)
    }
    assert told
    assert told <= targets


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
        cli.parse(["--help"])
    said = capsys.readouterr().out
    assert all(
        option in said
        for option in (
            "--root",
            "--until",
            "--dry-run",
            "--baselines",
            "--config",
            "--settings",
        )
    )
    assert argparse.SUPPRESS not in said
