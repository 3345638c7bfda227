"""Which part may import which: only from a line above its own."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import coin_ray

PACKAGE = Path(coin_ray.__file__).parent
LAYERS = """
errors storage class_names
config structures boxes parallel
tables
losses evaluation data clip fusion
cloud models
training demo predictors report
serving
runs export
stages
experiments
search
commands
"""
RANK = {
    part: rank for rank, line in enumerate(LAYERS.split("\n")) for part in line.split()
}
MODULES = {
    file.relative_to(PACKAGE.parent).as_posix(): ast.parse(file.read_text())
    for file in sorted(PACKAGE.rglob("*.py"))
}


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", [f for f in MODULES if f != "coin_ray/__init__.py"])
def test_imports_point_upwards(file: str) -> None:
    own = Path(file).parts[1].removesuffix(".py")
    assert own in RANK, f"say in LAYERS where {own} belongs"
    others = {
        name.split(".")[1]
        for name in imported(MODULES[file])
        if name.startswith("coin_ray.")
    } - {own}
    assert not sorted(o for o in others if RANK.get(o, 99) >= RANK[own])


def test_ray_stays_in_stages_serving_and_the_hosts_of_grids_and_searches() -> None:
    users = {
        f
        for f, tree in MODULES.items()
        if any(n.split(".")[0] == "ray" for n in imported(tree))
    }
    assert users
    allowed = (
        "coin_ray/stages/",
        "coin_ray/serving/",
        "coin_ray/experiments/tuning.py",
        "coin_ray/search/tuner.py",
    )
    assert not sorted(u for u in users if not u.startswith(allowed))
