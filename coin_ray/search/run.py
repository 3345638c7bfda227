"""A whole search: what trials share, the trials, and what is left at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from coin_ray import storage
from coin_ray.config.files import to_yaml
from coin_ray.errors import ConfigError, TrainingError
from coin_ray.experiments.tracked import Runs
from coin_ray.runs import runner
from coin_ray.search.lineage import SCHEDULE, as_schedule, read_looks, said
from coin_ray.search.outcome import (
    Record,
    as_plain,
    best,
    importance,
    line,
    print_trials,
    truth_correlation,
)
from coin_ray.search.plan import FULL, Search
from coin_ray.search.plots import importance_bars, lines, parallel_coordinates
from coin_ray.stages.common.training_job import STATE

Host = Callable[..., list[Record]]
"""``under_tune``, or what stands for it in a test."""
JUDGES = {
    "map50": "mAP50 on the labelled validation images; test images are not looked at",
    "label-free": (
        "no label is used: held-out boxes that both teachers together are sure of,"
        " docs/search.md says what that is worth"
    ),
}


def search(wanted: Search, host: Host, *, resume: bool = False) -> Record:
    """Run, print and leave ``search.json``, ``best.yaml`` and two figures in the
    search's folder. Returns the best trial.

    Raises ConfigError if ``resume`` does not fit what lies there, TrainingError if no
    trial finished.
    """
    _check_earlier(wanted, resume)
    print(
        f"search: {len(wanted.space)} settings ({wanted.space_name}), {wanted.trials}"
        f" trials, judged by {JUDGES[wanted.objective]}"
    )
    wanted.prepare()
    storage.write_json(_asked(wanted), wanted.asked)
    runs = Runs(
        f"search {wanted.space_name} {wanted.objective}", wanted.config, wanted.root
    )

    def tell(record: Record) -> None:
        print(line(record), flush=True)
        _track(wanted, record, runs)

    records = host(wanted, tell, resume=resume)
    for record in records:
        _track(wanted, record, runs)
    return _leave(wanted, records, runs)


def plan(wanted: Search) -> None:
    """Print what a search would do, and what its shared steps would ask and pay,
    without doing it.
    """
    runner.plan(wanted.config, wanted.shared, wanted.root)
    steps = wanted.trial_config({}).distill.fit.steps
    ends = ", fewer where ASHA stops them" if wanted.scheduler == "asha" else ""
    copying = (
        ", the worst quarter a copy of the best after each ninth"
        if wanted.population
        else ""
    )
    print(
        f"{wanted.trials} distillations of {steps} steps each{ends}{copying}; judged by"
        f" {JUDGES[wanted.objective]}"
    )
    for name, domain in wanted.space.items():
        print(f"  {name}: {domain}")


def _asked(wanted: Search) -> str:
    return storage.join(wanted.folder, "asked.json")


def _check_earlier(wanted: Search, resume: bool) -> None:
    found: dict[str, Any] | None = (
        storage.read_json(_asked(wanted)) if storage.exists(_asked(wanted)) else None
    )
    if not resume and found is not None:
        raise ConfigError(
            f"there is a search in {wanted.folder}: add --resume to go on with it, or"
            " remove that folder to start again"
        )
    if resume and found is None:
        raise ConfigError(
            "--resume: there is no search of this space and objective in"
            f" {wanted.folder}; leave --resume out to start one"
        )
    different = [
        name
        for name, value in wanted.asked.items()
        if found is not None and found.get(name) != value
    ]
    if different:
        raise ConfigError(
            f"--resume goes on with the search in {wanted.folder} as it was asked for;"
            " different now: "
            + ", ".join(
                (
                    name
                    if name == "configuration"
                    else f"{name} (was {(found or {}).get(name)})"
                )
                for name in different
            )
        )


def _track(wanted: Search, record: Record, runs: Runs) -> None:
    """An MLflow child run; of a trial that did not finish, the state of its training is
    removed.
    """
    step = wanted.steps(record.settings, record.line)["distill"]
    folder = step.folder(wanted.root)
    if record.state != "finished":
        storage.remove(storage.join(folder, STATE))
    figures = record.figures | {
        "ninths": record.ninths,
        "seconds": record.seconds,
        "failed": float(bool(record.failure)),
    }
    came = f" ({said(record.line)})" if record.line else ""
    runs.add(
        f"trial {record.number}{came} {step.fingerprint}",
        figures,
        wanted.trial_config(record.settings, record.line),
        folder,
    )


def _leave(wanted: Search, records: list[Record], runs: Runs) -> Record:
    title = f"Search: {wanted.config.preset}, {wanted.space_name}, {wanted.objective}"
    print_trials(title, records)
    worth = {} if wanted.population else importance(records, wanted.space)
    trials = [
        row | _schedule(wanted, record)
        for row, record in zip(as_plain(records), records, strict=True)
    ]
    outcome = {
        "search": wanted.asked,
        "trials": trials,
        "importance": worth,
        "truth_correlation": truth_correlation(records),
    }
    storage.write_json(storage.join(wanted.folder, "search.json"), outcome)
    winner = best(records)
    if winner is None:
        told = "; ".join(sorted({r.failure for r in records if r.failure}))[:500]
        raise TrainingError(f"none of the {len(records)} trials finished. {told}")
    files = {"best.yaml": to_yaml(wanted.full_config(winner.settings, winner.line))}
    if wanted.population:
        looks = read_looks(wanted.folder, wanted.trials, FULL)
        schedule = as_schedule(
            looks, winner.number, winner.line, wanted.trial_config({})
        )
        files |= {
            SCHEDULE: json.dumps(schedule, indent=2),
            "population.svg": lines(title, looks),
        }
    else:
        files |= {
            "parallel.svg": parallel_coordinates(title, records, wanted.space),
            "importance.svg": importance_bars(title, worth),
        }
    for name, text in files.items():
        storage.write_bytes(storage.join(wanted.folder, name), text.encode())
    runs.tracker.files(files)
    runs.tracker.summary({"best_score": winner.figures["score"]}, None)
    _say(wanted, winner, records, [name for name in files if name != "best.yaml"])
    return winner


def _schedule(wanted: Search, record: Record) -> dict[str, Any]:
    """By which a report knows that its run has this member's settings."""
    changes = wanted.full_config(record.settings, record.line).distill.schedule
    return {"schedule": [asdict(change) for change in changes]} if record.line else {}


def _say(
    wanted: Search, winner: Record, records: list[Record], files: list[str]
) -> None:
    own = next((r for r in records if r.is_preset and r.state == "finished"), None)
    if winner is own:
        print("no setting that was tried is better than the preset's own")
    elif own is not None:
        gained = 100 * (winner.figures["score"] - own.figures["score"])
        print(
            f"trial {winner.number} is best: {gained:+.1f} points over the preset. The"
            " best of many is partly luck: check it with other seeds"
        )
    if (
        wanted.objective == "label-free"
        and (found := truth_correlation(records)) is not None
    ):
        print(
            "rank correlation of the label-free score with true mAP50 (validation):"
            f" {found[0]:+.2f} over {found[1]} finished trials"
        )
    if winner.line:
        print(
            f"trial {winner.number} came through {said(winner.line)}; best.yaml holds"
            " its weights' changes by step (distill.schedule)"
        )
    print(f"figures: {wanted.folder}/{', '.join(files)}")
    print(
        f"use it: python pipelines/full.py --config {wanted.folder}/best.yaml --root"
        f" {wanted.root}"
    )
