"""A search under Ray Tune. A trial is one process with the resources it is given, so a
stopped trial leaves nothing reserved.

(A trial that starts Ray Train workers of its own leaves their placement group to a
cleaner that needs the dashboard.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from math import isclose
from pathlib import PurePosixPath
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, Searcher
from ray.tune.search.optuna import OptunaSearch

from coin_ray import storage
from coin_ray.errors import ConfigError
from coin_ray.experiments.tuning import RETRIES, ensure_tune
from coin_ray.search.outcome import TrialRecord
from coin_ray.search.plan import PARTS, RUNGS, Search
from coin_ray.search.requirements import count_random_trials
from coin_ray.search.space import Choice, Domain, Settings, preset_settings
from coin_ray.search.trial import Report, run_trial
from coin_ray.stages.common.cluster import cluster_cpus, largest_node_cpus

REDUCTION_FACTOR = 3
"""Of the trials that reach a rung, one in three goes on."""
RunTrial = Callable[[Search, Settings, Report], None]
OnTrialEnd = Callable[[TrialRecord], None]
"""Is called with each trial that has ended."""
NumberTrials = Callable[[Sequence[Any]], Mapping[str, int]]
"""Gives Tune's trials numbers, and returns all numbers by the trial's id."""
METRIC, TIME = "score", "ninths"
FIGURES = (METRIC, "validation", "agreement", "disagreement", "miscalibration")


def run_trials_with_tune(
    search: Search,
    on_trial_end: OnTrialEnd,
    *,
    resume: bool,
    work: RunTrial = run_trial,
) -> list[TrialRecord]:
    """Run all trials and return them, the preset's first. With ``resume`` those of a
    killed search that had ended are not run again.
    """
    # Otherwise Tune takes Ctrl-C for the regular end of the search.
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")
    ensure_tune()
    preset = preset_settings(search.config, search.space)
    numbers: dict[str, int] = {}
    concurrent, cpus = trial_resources(search)
    resources = {"CPU": cpus}
    if search.config.distill.fit.gpu:
        resources["GPU"] = 1
    trainable = tune.with_resources(
        tune.with_parameters(_trial, search=search, work=work), resources
    )
    # Writes tuner.pkl anew, so that a restored search has this process's callback.
    tuner = tune.Tuner(
        trainable,
        param_space={
            name: _tune_domain(domain) for name, domain in search.space.items()
        },
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            num_samples=search.trials,
            max_concurrent_trials=concurrent,
            search_alg=_search_algorithm(search),
            scheduler=_trial_scheduler(search),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=search.folder,
            verbose=0,
            callbacks=[_TrialEndCallback(on_trial_end, _numbering(numbers, preset))],
            failure_config=tune.FailureConfig(max_failures=RETRIES),
        ),
    )
    if resume:
        experiment = storage.join(search.folder, "tune")
        tuner = tune.Tuner.restore(experiment, trainable, resume_unfinished=True)
    results = sorted(
        tuner.fit(),
        key=lambda result: (
            numbers.get(PurePosixPath(result.path).name, len(numbers)),
            not have_same_settings(result.config or {}, preset),
        ),
    )
    return [
        _trial_record(number, result.config or {}, result.metrics or {}, result.error)
        for number, result in enumerate(results)
    ]


def have_same_settings(settings: Settings, others: Settings) -> bool:
    """Return whether both name the same values, but for rounding. A restored search
    lists its trials in another order: the preset's is recognised by its settings.
    """
    return bool(settings) and all(
        setting == others[name]
        or (isinstance(setting, float) and isclose(setting, others[name]))
        for name, setting in settings.items()
    )


def trial_resources(search: Search) -> tuple[int, int]:
    """Return how many trials run at once, and the CPUs of each. Raise ConfigError if
    the cluster has less than ``--concurrent`` needs.
    """
    import ray

    gpu = search.config.distill.fit.gpu
    units = int(ray.cluster_resources().get("GPU", 0)) if gpu else cluster_cpus()
    concurrent = min(search.trials, search.concurrent or units)
    if not 0 < concurrent <= units:
        kind = "GPUs" if gpu else "CPUs"
        raise ConfigError(
            f"{max(concurrent, 1)} trials at once need as many {kind}; there are"
            f" {units}. Give a lower --concurrent"
        )
    cpus = min(cluster_cpus() // concurrent, largest_node_cpus())
    return concurrent, max(1, cpus)


def _trial(settings: dict[str, Any], search: Search, work: RunTrial) -> None:
    # Tune stores this function's name; searches begun earlier look for it.
    # The stages of a trial run in this process, also on a cluster.
    os.environ.pop("RAY_ADDRESS", None)
    work(search, settings, tune.report)


def _tune_domain(domain: Domain) -> Any:
    if isinstance(domain, Choice):
        return tune.choice(list(domain.values))
    if domain.log:
        return tune.loguniform(domain.low, domain.high)
    return tune.uniform(domain.low, domain.high)


def _trial_scheduler(search: Search) -> TrialScheduler:
    if search.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr=TIME,
        max_t=PARTS,
        grace_period=RUNGS[0],
        reduction_factor=REDUCTION_FACTOR,
    )


def _search_algorithm(search: Search) -> Searcher | BasicVariantGenerator:
    """Return the algorithm; each begins with the preset's own values."""
    presets, seed = [preset_settings(search.config, search.space)], search.config.seed
    if search.algorithm == "random":
        return BasicVariantGenerator(points_to_evaluate=presets, random_state=seed)
    from optuna.samplers import TPESampler

    random_trials = count_random_trials(search.trials)
    return OptunaSearch(
        points_to_evaluate=presets,
        sampler=TPESampler(seed=seed, n_startup_trials=random_trials),
    )


def _numbering(numbers: dict[str, int], preset: Settings) -> NumberTrials:
    """Return a function that adds the numbers of new trials to ``numbers``, by id.

    Trials keep the order in which they were first listed: Tune moves a trial whose
    worker was lost to the end of its list. (Tune copies callbacks, but no functions.)
    """

    def number_trials(trials: Sequence[Any]) -> Mapping[str, int]:
        new_trials = [trial for trial in trials if trial.trial_id not in numbers]
        for trial in sorted(
            new_trials, key=lambda t: not have_same_settings(t.config, preset)
        ):
            numbers[trial.trial_id] = len(numbers)
        return numbers

    return number_trials


class _TrialEndCallback(tune.Callback):  # type: ignore[misc]
    def __init__(self, on_trial_end: OnTrialEnd, number_trials: NumberTrials) -> None:
        self.on_trial_end, self.number_trials = on_trial_end, number_trials

    def on_trial_start(
        self, iteration: int, trials: list[Any], trial: Any, **info: Any
    ) -> None:
        self.number_trials(trials)

    def on_trial_complete(
        self, iteration: int, trials: list[Any], trial: Any, **info: Any
    ) -> None:
        self._report(trials, trial, None)

    def on_trial_error(
        self, iteration: int, trials: list[Any], trial: Any, **info: Any
    ) -> None:
        self._report(trials, trial, RuntimeError("its worker failed"))

    def _report(self, trials: list[Any], trial: Any, error: Exception | None) -> None:
        number = self.number_trials(trials)[trial.trial_id]
        record = _trial_record(number, trial.config, trial.last_result, error)
        self.on_trial_end(record)


def _trial_record(
    number: int,
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any],
    error: Exception | None,
) -> TrialRecord:
    if error is None:
        failure = str(metrics.get("failure", ""))
    else:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        failure = lines[-1]
    figures = {
        name: float(metrics[name])
        for name in FIGURES
        if isinstance(metrics.get(name), (int, float))
    }
    seconds = round(float(metrics.get("time_total_s", 0.0)), 1)
    ninths = int(metrics.get(TIME, 0))
    return TrialRecord(number, dict(settings), figures, ninths, seconds, failure)
