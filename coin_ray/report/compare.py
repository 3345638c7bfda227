"""Several finished runs on one page: what each reached, what it cost, and which
settings tell them apart.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import yaml

from coin_ray import storage
from coin_ray.errors import CoinError, InputError
from coin_ray.report.answers import bounds, interval_text
from coin_ray.report.methods import DASH, difference, duration, money, number, points
from coin_ray.report.page import template
from coin_ray.runs.tracking import flatten

PAGE = "comparison.html"


@dataclass(frozen=True, slots=True)
class Run:
    """``name``: as given, shortened to what tells it apart; ``settings``: leaves of the
    config by dotted name; ``link``: its report, if any.
    """

    name: str
    summary: Mapping[str, Any]
    settings: Mapping[str, str]
    link: str = ""


def runs_of(arguments: Sequence[str]) -> list[str]:
    """The folders in ``A B ... [--out FILE]``; empty if the arguments are those of a
    single run (``demo --seed 1``).
    """
    first = next(
        (i for i, a in enumerate(arguments) if a.startswith("--")), len(arguments)
    )
    return list(arguments[:first]) if first > 1 else []


def main(arguments: Sequence[str]) -> int:
    """Compare the runs in ``A B ... [--out FILE]``; returns the exit code. User errors
    are one message, no traceback.
    """
    try:
        print(compare(runs_of(arguments), _out(arguments)))
    except CoinError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def compare(roots: Sequence[str], out: str) -> str:
    """Write the page of the runs below ``roots`` to ``out``; returns where it is.
    Raises InputError for a folder without a finished run.
    """
    out = storage.absolute(out)
    runs = [
        _read(storage.absolute(root), name, out)
        for root, name in zip(roots, _names(roots), strict=True)
    ]
    storage.write_bytes(out, comparison(runs).encode())
    return out


def comparison(runs: Sequence[Run]) -> str:
    """The page as HTML."""
    return template("compare.html").render(
        runs=runs,
        rows=[_row(run) for run in runs],
        spread=_spread(runs),
        classes=_by_class(runs),
        settings=_different(runs),
    )


@dataclass(frozen=True, slots=True)
class _Row:
    """``width``, ``low``, ``high``: the student's mAP50 and its interval in percent of
    the track.
    """

    run: Run
    student: str
    interval: str
    change: str
    change_interval: str
    cells: tuple[str, ...]
    width: float
    low: float | None
    high: float | None


def _row(run: Run) -> _Row:
    s = run.summary
    scores = s.get("map50") or {}
    own, against = (
        bounds((s.get(name) or {}).get("student"))
        for name in ("map50_interval", "vs_cloud_interval")
    )
    closed = number(s.get("gap_closed"))
    cells = (
        points(scores.get("cloud")),
        points(scores.get("pseudo_label")),
        points(scores.get("oracle")),
        DASH if closed is None else f"{100 * closed:.0f} %",
        money((s.get("calls") or {}).get("cost_usd")),
        duration((s.get("seconds") or {}).get("total")),
    )
    low, high = (None, None) if own is None else (100 * own[0], 100 * own[1])
    student = scores.get("student")
    return _Row(
        run,
        points(student),
        interval_text(own, signed=False),
        difference(student, scores.get("cloud")),
        interval_text(against),
        cells,
        100 * (number(student) or 0.0),
        low,
        high,
    )


def _spread(runs: Sequence[Run]) -> str:
    """Mean and deviation of the student over runs of one configuration with different
    seeds; else empty.
    """
    known = [
        v
        for run in runs
        if (v := number((run.summary.get("map50") or {}).get("student"))) is not None
    ]
    if (
        len(known) < 2
        or {name for name, _ in _different(runs)} - {"seed"}
        or len({r.summary.get("seed") for r in runs}) < len(runs)
    ):
        return ""
    return f"{points(fmean(known))} ± {points(stdev(known))}"


def _by_class(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, bool]]]]:
    """The student's AP50 of each class in every run, and whether it is the best of
    them; of runs with the same classes.
    """
    classes = runs[0].summary.get("classes") or ()
    found = [(run.summary.get("per_class") or {}).get("student") for run in runs]
    if any(run.summary.get("classes") != classes for run in runs) or not all(found):
        return []
    rows = []
    for i, name in enumerate(classes):
        values = [number(values[i]) for values in found if values]
        best = max((v for v in values if v is not None), default=None)
        rows.append((name, [(points(v), v is not None and v == best) for v in values]))
    return rows


def _different(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, with their values."""
    names = sorted({name for run in runs for name in run.settings})
    rows = [(name, [run.settings.get(name, DASH) for run in runs]) for name in names]
    return [(name, values) for name, values in rows if len(set(values)) > 1]


def _read(root: str, name: str, out: str) -> Run:
    path = storage.join(root, "summary.json")
    if not storage.exists(path):
        raise InputError(
            f"comparing needs finished runs: {root} has no summary.json; run"
            f" pipelines/full.py --root {root} first"
        )
    summary = storage.read_json(path)
    config = storage.join(root, "config.yaml")
    settings = (
        yaml.safe_load(storage.read_bytes(config)) if storage.exists(config) else {}
    )
    return Run(
        name,
        summary,
        {k: str(v) for k, v in flatten(settings).items() if k != "value"},
        _link(root, summary, out),
    )


def _link(root: str, summary: Mapping[str, Any], out: str) -> str:
    """From ``out`` to the run's page, which lies where it was made relative to the
    root; empty if it isn't there.
    """
    if not summary.get("page"):
        return ""
    page = storage.join(root, *str(summary["page"]).split("/")[-3:])
    if not storage.exists(page):
        return ""
    return page if "://" in page + out else os.path.relpath(page, os.path.dirname(out))


def _names(roots: Sequence[str]) -> list[str]:
    """Last folder of each root, or the whole where these are not all different."""
    last = [root.rstrip("/").rsplit("/", 1)[-1] for root in roots]
    return last if len(set(last)) == len(last) else list(roots)


def _out(arguments: Sequence[str]) -> str:
    rest = list(arguments[len(runs_of(arguments)) :])
    if not rest:
        return PAGE
    if len(rest) == 1 and rest[0].startswith("--out="):
        return rest[0].removeprefix("--out=")
    if len(rest) == 2 and rest[0] == "--out":
        return rest[1]
    raise InputError(
        f"comparing takes folders of runs and --out FILE; got {' '.join(rest)}"
    )
