"""A whole search: the steps that trials share, the trials, and the files at the end."""

from __future__ import annotations

from collections.abc import Callable

from coin_ray import storage
from coin_ray.config.yaml_files import to_yaml
from coin_ray.errors import ConfigError, TrainingError
from coin_ray.experiments.tracked import TrialRuns
from coin_ray.runs.environment import check_environment
from coin_ray.runs.lease import hold_root
from coin_ray.runs.runner import print_plan
from coin_ray.search.outcome import (
    TrialRecord,
    best_trial,
    format_trial,
    print_trials,
    setting_importance,
    to_json_rows,
    truth_correlation,
)
from coin_ray.search.plan import Search
from coin_ray.search.plots import importance_bars, parallel_coordinates
from coin_ray.stages.common.training_job import CHECKPOINT_FILE

RunTrials = Callable[..., list[TrialRecord]]
"""``run_trials_with_tune``, or its replacement in a test."""
OBJECTIVE_DESCRIPTIONS = {
    "map50": "mAP50 on the labelled validation images; test images are not used",
    "label-free": (
        "no label is used: held-out boxes that both teachers together are sure of,"
        " docs/search.md says what that is worth"
    ),
}


def run_search(
    search: Search, run_trials: RunTrials, *, resume: bool = False
) -> TrialRecord:
    """Run the search, print it and write ``search.json``, ``best.yaml`` and two figures
    into its folder. Return the best trial.

    Raise ConfigError if ``resume`` does not fit the search in the folder, TrainingError
    if no trial finished, RootInUse if another run works below the root.
    """
    check_environment(search.root)
    with hold_root(search.root):
        return _run_trials(search, run_trials, resume)


def _run_trials(search: Search, run_trials: RunTrials, resume: bool) -> TrialRecord:
    _check_earlier_search(search, resume)
    print(
        f"search: {len(search.space)} settings ({search.space_name}), {search.trials}"
        f" trials, judged by {OBJECTIVE_DESCRIPTIONS[search.objective]}"
    )
    search.run_shared_steps()
    storage.write_json(_identity_uri(search), search.identity)
    name = f"search {search.space_name} {search.objective}"
    runs = TrialRuns(name, search.config, search.root)

    def on_trial_end(record: TrialRecord) -> None:
        print(format_trial(record), flush=True)
        _track_trial(search, record, runs)

    records = run_trials(search, on_trial_end, resume=resume)
    for record in records:
        _track_trial(search, record, runs)
    return _write_results(search, records, runs)


def print_search_plan(search: Search) -> None:
    """Print what a search would do, and what its shared steps would ask and pay,
    without doing it.
    """
    print_plan(search.config, search.shared_steps, search.root)
    steps = search.trial_config({}).distill.fit.steps
    early_stops = ", fewer where ASHA stops them" if search.scheduler == "asha" else ""
    print(
        f"{search.trials} distillations of {steps} steps each{early_stops}; judged by"
        f" {OBJECTIVE_DESCRIPTIONS[search.objective]}"
    )
    for name, domain in search.space.items():
        print(f"  {name}: {domain}")


def _identity_uri(search: Search) -> str:
    return storage.join(search.folder, "asked.json")


def _check_earlier_search(search: Search, resume: bool) -> None:
    uri = _identity_uri(search)
    exists = storage.exists(uri)
    if not resume:
        if exists:
            raise ConfigError(
                f"there is a search in {search.folder}: add --resume to continue it, or"
                " remove that folder to start again"
            )
        return
    if not exists:
        raise ConfigError(
            "--resume: there is no search of this space and objective in"
            f" {search.folder}; leave --resume out to start one"
        )
    earlier = storage.read_json(uri)
    differences = []
    for name, option in search.identity.items():
        if earlier.get(name) == option:
            continue
        was = "" if name == "configuration" else f" (was {earlier.get(name)})"
        differences.append(f"{name}{was}")
    if differences:
        raise ConfigError(
            f"--resume continues the search in {search.folder} with the options it was"
            f" started with; different now: {', '.join(differences)}"
        )


def _track_trial(search: Search, record: TrialRecord, runs: TrialRuns) -> None:
    """Write an MLflow child run; of a trial that did not finish, remove the training's
    checkpoint.
    """
    step = search.steps(record.settings)["distill"]
    folder = step.folder(search.root)
    if record.state != "finished":
        storage.remove(storage.join(folder, CHECKPOINT_FILE))
    figures = record.figures | {
        "ninths": record.ninths,
        "seconds": record.seconds,
        "failed": float(bool(record.failure)),
    }
    title = f"trial {record.number} {step.fingerprint}"
    runs.add(title, figures, search.trial_config(record.settings), folder)


def _write_results(
    search: Search, records: list[TrialRecord], runs: TrialRuns
) -> TrialRecord:
    title = f"Search: {search.config.preset}, {search.space_name}, {search.objective}"
    print_trials(title, records)
    importance = setting_importance(records, search.space)
    outcome = {
        "search": search.identity,
        "trials": to_json_rows(records),
        "importance": importance,
        "truth_correlation": truth_correlation(records),
    }
    storage.write_json(storage.join(search.folder, "search.json"), outcome)
    winner = best_trial(records)
    if winner is None:
        failures = {record.failure for record in records if record.failure}
        reasons = "; ".join(sorted(failures))[:500]
        raise TrainingError(f"none of the {len(records)} trials finished. {reasons}")
    files = {
        "best.yaml": to_yaml(search.full_config(winner.settings)),
        "parallel.svg": parallel_coordinates(title, records, search.space),
        "importance.svg": importance_bars(title, importance),
    }
    for name, text in files.items():
        storage.write_bytes(storage.join(search.folder, name), text.encode())
    runs.tracker.log_texts(files)
    runs.tracker.log_summary({"best_score": winner.figures["score"]}, None)
    _print_winner(search, winner, records)
    return winner


def _print_winner(
    search: Search, winner: TrialRecord, records: list[TrialRecord]
) -> None:
    preset_trials = [r for r in records if r.is_preset and r.state == "finished"]
    if winner in preset_trials:
        print("no setting that was tried is better than the preset's own")
    elif preset_trials:
        preset_score = preset_trials[0].figures["score"]
        gain = 100 * (winner.figures["score"] - preset_score)
        print(
            f"trial {winner.number} is best: {gain:+.1f} points over the preset. The"
            " best of many is partly luck: check it with other seeds"
        )
    correlation = truth_correlation(records)
    if search.objective == "label-free" and correlation is not None:
        coefficient, trials = correlation
        print(
            "rank correlation of the label-free score with true mAP50 (validation):"
            f" {coefficient:+.2f} over {trials} finished trials"
        )
    print(f"figures: {search.folder}/parallel.svg, importance.svg")
    print(
        f"use it: coin-ray adapt --config {search.folder}/best.yaml --root"
        f" {search.root}"
    )
