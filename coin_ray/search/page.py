"""The search's page: its trials, best first, each with a link to what it made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from coin_ray import storage
from coin_ray.commands.arguments import reported
from coin_ray.config.files import from_yaml
from coin_ray.errors import InputError
from coin_ray.report.page import template
from coin_ray.runs.graph import graph
from coin_ray.search.lineage import Looks, copies, line_of, read_looks, said
from coin_ray.search.outcome import Record, ordered, setting, shown
from coin_ray.search.plan import FULL, Search

PAGE = "search.html"
FIGURES = ("parallel.svg", "importance.svg", "population.svg")
JUDGES = {
    "map50": "mAP50 on the validation images",
    "label-free": "a score without labels",
}


@dataclass(frozen=True, slots=True)
class Trial:
    """A row of the page; ``links``: (text, where it leads from the page)."""

    number: int
    preset: bool
    score: str
    state: str
    settings: tuple[str, ...]
    links: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Copied:
    """``member`` went on after ``ninths`` as a copy of ``source``, under ``settings``."""

    ninths: int
    member: int
    source: int
    settings: tuple[str, ...]


def main(folder: str) -> int:
    """Write the page anew, with the reports made since; returns the exit code."""
    return reported(lambda: print(write_page(storage.absolute(folder))))


def write_page(folder: str) -> str:
    """The page of the search in ``folder``, a search's own; returns where it is. Raises
    InputError if none is there that found a best trial.
    """
    if not all(
        storage.exists(storage.join(folder, name))
        for name in ("search.json", "best.yaml")
    ):
        raise InputError(
            f"{folder} holds no search with a finished trial: expected its search.json"
            " and best.yaml"
        )
    outcome = storage.read_json(storage.join(folder, "search.json"))
    wanted = _asked(folder, outcome["search"])
    looks = read_looks(folder, wanted.trials, FULL) if wanted.population else {}
    records = ordered([_record(row, looks) for row in outcome["trials"]])
    names = list(records[0].settings)
    html = template("search.html").render(
        name=folder.rpartition("/")[2],
        judge=JUDGES[wanted.objective],
        settings=[name.rpartition(".")[2] for name in names],
        trials=[_trial(record, wanted, folder) for record in records],
        copies=[
            Copied(
                c.ninths - 1,
                c.member,
                c.copied,
                tuple(shown(v) for v in c.settings.values()),
            )
            for c in copies(looks)
        ],
        lines=[(record.number, said(record.line)) for record in records if record.line],
        parts=FULL,
        figures=[
            name for name in FIGURES if storage.exists(storage.join(folder, name))
        ],
    )
    page = storage.join(folder, PAGE)
    storage.write_bytes(page, html.encode())
    return page


def _asked(folder: str, asked: Mapping[str, Any]) -> Search:
    """The search as it was asked for, but for the settings that it varies."""
    best = from_yaml(storage.join(folder, "best.yaml"))
    config = replace(best, distill=replace(best.distill, schedule=()))
    root = folder.rpartition("/search/")[0]
    names = {
        name.lstrip("-").replace("-", "_"): value
        for name, value in asked.items()
        if name.startswith("--") and name != "--space"
    }
    return Search(config, root, asked["--space"], **names)


def _record(row: Mapping[str, Any], looks: Looks) -> Record:
    values = {
        name: value for name, value in row.items() if name not in ("state", "schedule")
    }
    return Record(**values, line=line_of(looks, row["number"], FULL) if looks else ())


def _trial(record: Record, wanted: Search, folder: str) -> Trial:
    score = (
        ""
        if record.failure or "score" not in record.figures
        else f"{100 * record.figures['score']:.1f}"
    )
    settings = tuple(setting(record, name) for name in record.settings)
    return Trial(
        record.number,
        record.is_preset,
        score,
        record.state,
        settings,
        tuple(_links(record, wanted, folder)),
    )


def _links(record: Record, wanted: Search, folder: str) -> list[tuple[str, str]]:
    """The trial's distillation, and the report of a whole run with its settings; what
    is not there is left out.
    """
    config = wanted.full_config(record.settings, record.line)
    distilled = wanted.steps(record.settings, record.line)["distill"]
    places = [
        ("distillation", storage.join(distilled.folder(wanted.root), "manifest.json"))
    ]
    for baselines in (False, True):
        report = graph(config, baselines=baselines)["report"]
        places.append(
            (
                f"report{' with baselines' * baselines}",
                storage.join(report.folder(wanted.root), "report.html"),
            )
        )
    remote = "://" in folder
    return [
        (text, place if remote else os.path.relpath(place, folder))
        for text, place in places
        if storage.exists(place)
    ]
