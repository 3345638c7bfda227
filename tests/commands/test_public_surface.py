"""What users rely on: the options of every subcommand and the Python API. A change is
made on purpose, by ``python tests/commands/test_public_surface.py``, which writes the two
files in ``tests/golden`` anew."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import re
from pathlib import Path

import pytest

import coin_ray
from coin_ray.commands.main import SUBCOMMANDS, main

GOLDEN = Path(__file__).parents[1] / "golden"
CLI_FILE, API_FILE = GOLDEN / "cli_options.txt", GOLDEN / "python_api.txt"
TOOLS = {
    "collect": ["collect", "collect views"],
    "teachers": ["teachers compare"],
    "ablate": ["ablate", "ablate co-detr"],
    "review": ["review out", "review back"],
    "labels": ["labels check", "labels propose", "labels export"],
    "journal": ["journal show", "journal verify", "journal compact", "journal drop"],
    "serve": ["serve", "serve register"],
}
"""Subcommands that have several sets of options."""
SETTINGS = ["adapt folder --settings", "detector --data demo --settings"]
"""Commands that list all settings."""


def _options_of(command: str) -> list[str]:
    """Return the options that the help of a command lists, sorted."""
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
        main(command.split())
    # on a terminal of 80 columns the panels stand below one another
    cells = [cell.strip() for cell in re.split(r"[│\n]", help_text.getvalue())]
    options: set[str] = set()
    for cell in cells:
        if cell.startswith("-"):
            names = re.split(r"\s{2,}", cell)[0]
            options |= set(re.findall(r"--[a-z0-9][\w.-]*", names))
    return sorted(options)


def _describe_cli() -> str:
    """Return one line for each option of each command."""
    commands = [
        f"{command} --help"
        for name in SUBCOMMANDS
        for command in TOOLS.get(name, [name])
    ]
    lines = []
    for command in [*commands, *SETTINGS]:
        title = command.removesuffix(" --help")
        lines += [f"{title} {option}" for option in _options_of(command)]
    return "\n".join(lines) + "\n"


def _describe_api() -> str:
    """Return the signature of every public name of the package and its methods."""
    lines = []
    for name in sorted(coin_ray.__all__):
        member = getattr(coin_ray, name)
        lines.append(f"{name}{inspect.signature(member)}")
        if inspect.isclass(member):
            for attribute, method in sorted(vars(member).items()):
                if attribute.startswith("_"):
                    continue
                is_method = inspect.isfunction(method)
                signature = str(inspect.signature(method)) if is_method else ""
                lines.append(f"{name}.{attribute}{signature}")
    return "\n".join(lines) + "\n"


def test_every_option_of_the_command_line_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert _describe_cli().splitlines() == CLI_FILE.read_text().splitlines()


def test_the_python_api_stays() -> None:
    assert _describe_api().splitlines() == API_FILE.read_text().splitlines()


if __name__ == "__main__":
    os.environ["COLUMNS"] = "80"
    CLI_FILE.write_text(_describe_cli())
    API_FILE.write_text(_describe_api())
