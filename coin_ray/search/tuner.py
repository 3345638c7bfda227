"""A search under Ray Tune. A trial is one process with the resources it is given, so a
stopped trial leaves nothing reserved.

(A trial that starts Ray Train workers of its own leaves their placement group to a
cleaner that needs the dashboard.)
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from math import isclose
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import BasicVariantGenerator, Searcher
from ray.tune.search.bohb import TuneBOHB
from ray.tune.search.optuna import OptunaSearch

from coin_ray import storage
from coin_ray.errors import ConfigError
from coin_ray.experiments.tuning import RETRIES, ensure_tune
from coin_ray.search.needs import random_starts
from coin_ray.search.outcome import Record
from coin_ray.search.plan import FULL, LOOKS, Search
from coin_ray.search.space import Choice, Real, Settings, start
from coin_ray.search.trial import Report, run_trial
from coin_ray.stages.common.cluster import cluster_cpus, largest_node_cpus

REDUCTION = 3
"""Of the trials that reach a look, one in three goes on."""
Work = Callable[[Search, Settings, Report], None]
Told = Callable[[Record], None]
"""Told of each trial that has ended."""
METRIC, TIME = "score", "ninths"
FIGURES = (METRIC, "validation", "agreement", "disagreement", "miscalibration")


def under_tune(
    search: Search, told: Told, *, resume: bool, work: Work = run_trial
) -> list[Record]:
    """All trials, in the order they were started. With ``resume`` those of a killed
    search that had ended are not run again.
    """
    # else Ctrl-C looks like an end
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "5")
    ensure_tune()
    at_once, cpus = shares(search)
    needs = {"CPU": cpus} | ({"GPU": 1} if search.config.distill.fit.gpu else {})
    trainable = tune.with_resources(
        tune.with_parameters(_trial, search=search, work=work), needs
    )
    first = start(search.config, search.space)
    if resume:
        tuner = tune.Tuner.restore(
            storage.join(search.folder, "tune"), trainable, resume_unfinished=True
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space={
                name: _domain(domain) for name, domain in search.space.items()
            },
            tune_config=tune.TuneConfig(
                metric=METRIC,
                mode="max",
                num_samples=search.trials,
                max_concurrent_trials=at_once,
                search_alg=_algorithm(search),
                scheduler=_scheduler(search),
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=search.folder,
                verbose=0,
                callbacks=[_Told(told, first)],
                failure_config=tune.FailureConfig(max_failures=RETRIES),
            ),
        )
    results = sorted(
        tuner.fit(), key=lambda result: not same(result.config or {}, first)
    )
    return [
        _record(n, r.config or {}, r.metrics or {}, r.error)
        for n, r in enumerate(results)
    ]


def same(settings: Settings, others: Settings) -> bool:
    """Whether both name the same values, but for rounding. A restored search lists its
    trials in another order: the preset's is known by them.
    """
    return bool(settings) and all(
        value == others[name]
        or (isinstance(value, float) and isclose(value, others[name]))
        for name, value in settings.items()
    )


def shares(search: Search) -> tuple[int, int]:
    """Trials at once, and CPUs of each. Raises ConfigError if the cluster has less than
    is asked for.
    """
    import ray

    gpu = search.config.distill.fit.gpu
    units = int(ray.cluster_resources().get("GPU", 0)) if gpu else cluster_cpus()
    at_once = min(search.trials, search.concurrent or units)
    if not 0 < at_once <= units:
        kind = "GPUs" if gpu else "CPUs"
        raise ConfigError(
            f"{max(at_once, 1)} trials at once need as many {kind}; there are {units}."
            " Give a lower --concurrent"
        )
    return at_once, max(1, min(cluster_cpus() // at_once, largest_node_cpus()))


def _trial(settings: dict[str, Any], search: Search, work: Work) -> None:
    # the stages of a trial run in this process, also on a cluster
    os.environ.pop("RAY_ADDRESS", None)
    work(search, settings, tune.report)


def _domain(domain: Real | Choice) -> Any:
    if isinstance(domain, Choice):
        return tune.choice(list(domain.values))
    return (
        tune.loguniform(domain.low, domain.high)
        if domain.log
        else tune.uniform(domain.low, domain.high)
    )


def _scheduler(search: Search) -> TrialScheduler:
    if search.scheduler == "none":
        return FIFOScheduler()
    return ASHAScheduler(
        time_attr=TIME, max_t=FULL, grace_period=LOOKS[0], reduction_factor=REDUCTION
    )


def _algorithm(search: Search) -> Searcher | BasicVariantGenerator:
    """Each begins with the preset's own values."""
    first, seed = [start(search.config, search.space)], search.config.seed
    if search.algorithm == "random":
        return BasicVariantGenerator(points_to_evaluate=first, random_state=seed)
    if search.algorithm == "bohb":
        return _Bohb(
            points_to_evaluate=first,
            seed=seed,
            bohb_config={"min_points_in_model": len(search.space) + 1},
        )
    from optuna.samplers import TPESampler

    return OptunaSearch(
        points_to_evaluate=first,
        sampler=TPESampler(seed=seed, n_startup_trials=random_starts(search.trials)),
    )


class _Bohb(TuneBOHB):  # type: ignore[misc]
    """BOHB's model with ASHA's asynchronous halving in place of HyperBand: the budget
    of a result is the part of the training made.
    """

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        super().on_trial_result(
            trial_id, result | {"hyperband_info": {"budget": result[TIME]}}
        )

    def suggest(self, trial_id: str) -> dict[str, Any] | None:
        found: dict[str, Any] | None = super().suggest(trial_id)
        return found and {
            name: str(v) if isinstance(v, str) else float(v)
            for name, v in found.items()
        }


class _Told(tune.Callback):  # type: ignore[misc]
    def __init__(self, told: Told, first: Settings) -> None:
        self.told, self.first = told, first

    def on_trial_complete(
        self, iteration: int, trials: list[Any], trial: Any, **info: Any
    ) -> None:
        self.told(
            _record(self._number(trials, trial), trial.config, trial.last_result, None)
        )

    def on_trial_error(
        self, iteration: int, trials: list[Any], trial: Any, **info: Any
    ) -> None:
        self.told(
            _record(
                self._number(trials, trial),
                trial.config,
                trial.last_result,
                RuntimeError("its worker failed"),
            )
        )

    def _number(self, trials: list[Any], trial: Any) -> int:
        return sorted(trials, key=lambda t: not same(t.config, self.first)).index(trial)


def _record(
    number: int,
    settings: Mapping[str, Any],
    result: Mapping[str, Any],
    error: Exception | None,
) -> Record:
    failure = (
        result.get("failure", "")
        if error is None
        else (str(error).strip().splitlines() or [type(error).__name__])[-1]
    )
    figures = {
        name: float(v)
        for name in FIGURES
        if isinstance(v := result.get(name), (int, float))
    }
    return Record(
        number,
        dict(settings),
        figures,
        int(result.get(TIME, 0)),
        round(float(result.get("time_total_s", 0.0)), 1),
        str(failure),
    )
