"""The search's page: its trials, best first, each with a link to what it made."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coin_ray import storage
from coin_ray.config.yaml_files import read_config
from coin_ray.errors import InputError
from coin_ray.report.page import get_template
from coin_ray.runs.graph import build_steps
from coin_ray.search.outcome import (
    TrialRecord,
    format_score,
    format_setting,
    sort_trials,
)
from coin_ray.search.plan import Search
from coin_ray.search.requirements import ALGORITHM_PACKAGES

PAGE = "search.html"
FIGURES = ("parallel.svg", "importance.svg")
OBJECTIVE_TITLES = {
    "map50": "mAP50 on the validation images",
    "label-free": "a score without labels",
}


@dataclass(frozen=True, slots=True)
class TrialRow:
    """A row of the page; ``links``: (text, address relative to the page)."""

    number: int
    preset: bool
    score: str
    state: str
    settings: tuple[str, ...]
    links: tuple[tuple[str, str], ...]


def write_page(folder: str) -> str:
    """Write the page of the search in ``folder``, with the reports made since, and
    return its URI. Raise InputError if no search with a best trial is there.
    """
    required_files = ("search.json", "best.yaml")
    if not all(storage.exists(storage.join(folder, name)) for name in required_files):
        raise InputError(
            f"{folder} holds no search with a finished trial: expected its search.json"
            " and best.yaml"
        )
    outcome = storage.read_json(storage.join(folder, "search.json"))
    search = _read_search(folder, outcome["search"])
    records = sort_trials([_read_record(row) for row in outcome["trials"]])
    figures = [name for name in FIGURES if storage.exists(storage.join(folder, name))]
    html = get_template("search.html").render(
        name=folder.rpartition("/")[2],
        judge=OBJECTIVE_TITLES[search.objective],
        settings=[name.rpartition(".")[2] for name in records[0].settings],
        trials=[_build_row(record, search, folder) for record in records],
        figures=figures,
    )
    page = storage.join(folder, PAGE)
    storage.write_bytes(page, html.encode())
    return page


def _read_search(folder: str, identity: Mapping[str, Any]) -> Search:
    """Return the search as it was started, but for the settings that it varies."""
    if identity["--algorithm"] not in ALGORITHM_PACKAGES:
        raise InputError(
            f"{folder} was made by --algorithm {identity['--algorithm']}, which this"
            f" version does not have; it has {', '.join(ALGORITHM_PACKAGES)}"
        )
    config = read_config(storage.join(folder, "best.yaml"))
    root = folder.rpartition("/search/")[0]
    options = {
        name.lstrip("-").replace("-", "_"): option
        for name, option in identity.items()
        if name.startswith("--") and name != "--space"
    }
    return Search(config, root, identity["--space"], **options)


def _read_record(row: Mapping[str, Any]) -> TrialRecord:
    return TrialRecord(**{key: row[key] for key in row if key != "state"})


def _build_row(record: TrialRecord, search: Search, folder: str) -> TrialRow:
    settings = tuple(format_setting(setting) for setting in record.settings.values())
    return TrialRow(
        record.number,
        record.is_preset,
        format_score(record),
        record.state,
        settings,
        tuple(_trial_links(record, search, folder)),
    )


def _trial_links(
    record: TrialRecord, search: Search, folder: str
) -> list[tuple[str, str]]:
    """Return links to the trial's distillation and to the report of a whole run with
    its settings, as far as they exist.
    """
    distillation = search.steps(record.settings)["distill"].folder(search.root)
    targets = [("distillation", storage.join(distillation, "manifest.json"))]
    config = search.full_config(record.settings)
    for text, baselines in (("report", False), ("report with baselines", True)):
        report = build_steps(config, baselines=baselines)["report"].folder(search.root)
        targets.append((text, storage.join(report, "report.html")))
    is_remote = "://" in folder
    return [
        (text, uri if is_remote else os.path.relpath(uri, folder))
        for text, uri in targets
        if storage.exists(uri)
    ]
