"""Imports inside ``coin_ray`` point only to layers above, and never in a circle."""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import coin_ray

PACKAGE = Path(coin_ray.__file__).parent
LAYERS = """
errors class_names
storage
config structures boxes parallel
tables
losses evaluation data clip fusion
cloud models
training
demo predictors report
serving
runs export
stages
experiments
search
commands
"""
"""Each part (a folder or module of ``coin_ray``) may import the lines above its own."""
MAX_TOP_LEVEL_MODULES = 8
RAY_USERS = (
    "coin_ray/stages/",
    "coin_ray/serving/",
    "coin_ray/experiments/tuning.py",
    "coin_ray/search/tuner.py",
)
LAYER_OF_PART = {
    part: layer
    for layer, line in enumerate(LAYERS.split("\n"))
    for part in line.split()
}
FILES = [
    file.relative_to(PACKAGE.parent).as_posix()
    for file in sorted(PACKAGE.rglob("*.py"))
]
FILE_OF_MODULE = {
    file.removesuffix(".py").removesuffix("/__init__").replace("/", "."): file
    for file in FILES
}


@cache
def _imported_names(file: str) -> tuple[str, ...]:
    """Return the dotted names of all imports, also of those inside functions."""
    tree = ast.parse((PACKAGE.parent / file).read_text())
    return tuple(_iterate_imports(tree))


def _iterate_imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports must be absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _imported_modules(module: str) -> set[str]:
    """Return the modules of ``coin_ray`` that a module imports."""
    modules = set()
    for name in _imported_names(FILE_OF_MODULE[module]):
        if name.startswith("coin_ray."):
            while name not in FILE_OF_MODULE:
                name = name.rpartition(".")[0]
            modules.add(name)
    return modules - {module, "coin_ray"}


def _package(module: str) -> str:
    is_package = FILE_OF_MODULE[module].endswith("/__init__.py")
    return module if is_package else module.rpartition(".")[0]


def _assert_no_cycle(graph: Mapping[str, set[str]]) -> None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imports form a cycle: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("file", [f for f in FILES if f != "coin_ray/__init__.py"])
def test_imports_point_to_layers_above(file: str) -> None:
    part = Path(file).parts[1].removesuffix(".py")
    assert part in LAYER_OF_PART, f"{part} has no layer: add it to LAYERS"
    imported_parts = {
        name.split(".")[1]
        for name in _imported_names(file)
        if name.startswith("coin_ray.")
    }
    wrong_parts = [
        other
        for other in sorted(imported_parts - {part})
        if LAYER_OF_PART.get(other, 99) >= LAYER_OF_PART[part]
    ]
    assert not wrong_parts, f"{file} may only import layers above {part}"


def test_modules_import_each_other_in_no_cycle() -> None:
    _assert_no_cycle({module: _imported_modules(module) for module in FILE_OF_MODULE})


def test_packages_import_each_other_in_no_cycle() -> None:
    """A package and the packages inside it may import each other's modules."""
    graph: defaultdict[str, set[str]] = defaultdict(set)
    for module in FILE_OF_MODULE:
        package = _package(module)
        for imported_module in _imported_modules(module):
            other = _package(imported_module)
            is_nested = f"{package}.".startswith(f"{other}.") or f"{other}.".startswith(
                f"{package}."
            )
            if not is_nested:
                graph[package].add(other)
    assert len(graph) > 20
    _assert_no_cycle(graph)


def test_few_modules_lie_beside_the_folders() -> None:
    modules = sorted(file.name for file in PACKAGE.glob("*.py"))
    assert len(modules) <= MAX_TOP_LEVEL_MODULES, (
        f"move one of {', '.join(modules)} into a folder"
    )


def test_only_stages_serving_and_two_hosts_import_ray() -> None:
    files = {
        file
        for file in FILES
        if any(name.split(".")[0] == "ray" for name in _imported_names(file))
    }
    assert files
    assert not sorted(file for file in files if not file.startswith(RAY_USERS))
