"""Population-based training under Ray Tune (Jaderberg et al. 2017): at each look the
worst quarter goes on from a copy of one of the best.

Tune's scheduler decides who copies whom; what a member was is kept below the search's
folder, so a killed population goes on from there: a restored Tune forgets the
scheduler's state.
"""

from __future__ import annotations

import os
import random
import tempfile
import warnings
from collections.abc import Callable
from math import exp, log
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import PopulationBasedTraining

from coin_ray import storage
from coin_ray.errors import ConfigError, StepError, TrainingError
from coin_ray.experiments.tuning import RETRIES, ensure_tune
from coin_ray.search.lineage import (
    Look,
    Looks,
    line_of,
    read_look,
    read_looks,
    seen_of_all,
)
from coin_ray.search.member import Report, run_member
from coin_ray.search.outcome import Record, look_line
from coin_ray.search.plan import FULL, Search
from coin_ray.search.space import Choice, Real, Settings, start
from coin_ray.search.tuner import METRIC, TIME, Told, shares
from coin_ray.stages.common.cluster import cluster_cpus, largest_node_cpus

QUARTER = 0.25
RESAMPLED = 0.25
"""Chance that a copied setting is drawn anew from its range."""
FACTORS = (1.5, 1 / 1.5)
"""By one of these a copied setting is multiplied else. There are eight looks, so steps
are larger than the published 1.2 and 0.8."""
POINTER = "look.json"
Work = Callable[[Search, int, Settings, Look | None, Report], None]


def under_population(
    search: Search, told: Told, *, resume: bool, work: Work = run_member
) -> list[Record]:
    """All members at their end. With ``resume`` from the last look at which all were
    seen. Raises TrainingError if a worker is lost for good.
    """
    # else Ctrl-C looks like an end
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # by workers that outlive a pause
    warnings.filterwarnings("ignore", message="Consider boosting PBT performance")
    ensure_tune()
    begin = (
        seen_of_all(read_looks(search.folder, search.trials, FULL), search.trials)
        if resume
        else 0
    )
    trainable = tune.with_resources(
        tune.with_parameters(_member, search=search, begin=begin, work=work),
        _needs(search),
    )
    tune.Tuner(
        trainable,
        param_space={"settings": tune.grid_search(starts(search, begin))},
        tune_config=tune.TuneConfig(
            metric=METRIC,
            mode="max",
            scheduler=_Population(search, begin),
            trial_dirname_creator=lambda trial: str(trial.trial_id),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=search.folder,
            verbose=0,
            stop={TIME: FULL},
            callbacks=[_Shown(search)],
            failure_config=tune.FailureConfig(max_failures=RETRIES),
        ),
    ).fit()
    records = records_of(read_looks(search.folder, search.trials, FULL), search.trials)
    for uri in storage.list_files(storage.join(search.folder, "population"), ".pt"):
        storage.remove(uri)
    for record in records:
        told(record)
    return records


def starts(search: Search, begin: int) -> list[dict[str, Any]]:
    """Each member's settings at the look ``begin``; at 0 the preset's own for the
    first, and random ones by the seed.
    """
    if begin:
        return [
            _look(search, member, begin).settings for member in range(search.trials)
        ]
    draw = random.Random(f"{search.config.seed} start")
    others = [
        {name: drawn(domain, draw.random()) for name, domain in search.space.items()}
        for _ in range(search.trials - 1)
    ]
    return [start(search.config, search.space), *others]


def drawn(domain: Real | Choice, share: float) -> Any:
    """The value that ``share``, in 0..1, of the domain lies below."""
    if isinstance(domain, Choice):
        return domain.values[
            min(int(share * len(domain.values)), len(domain.values) - 1)
        ]
    if domain.log:
        return min(
            max(
                exp(log(domain.low) + share * log(domain.high / domain.low)), domain.low
            ),
            domain.high,
        )
    return domain.low + share * (domain.high - domain.low)


def records_of(looks: Looks, members: int) -> list[Record]:
    """Members at their end; ``settings``: those that their line began with."""
    records = []
    for member in range(members):
        line = line_of(looks, member, FULL)
        seconds = sum(look.seconds for look in looks.values() if look.member == member)
        records.append(
            Record(
                member,
                line[0].settings,
                line[-1].figures,
                FULL,
                round(seconds, 1),
                line[-1].failure,
                line,
            )
        )
    return records


def _needs(search: Search) -> dict[str, float]:
    """Resources of a member. Paused members wait for nothing but room, so it is the
    CPUs that keep more than ``--concurrent`` from running.
    """
    at_once, cpus = shares(search)
    every, largest = cluster_cpus(), largest_node_cpus()
    if at_once < search.trials:
        cpus = every // (at_once + 1) + 1
    if cpus > largest:
        raise ConfigError(
            f"--concurrent {at_once}: each member of a population would need {cpus}"
            " CPUs on one machine, so that no more of them run at once; the largest"
            f" has {largest}. Give --concurrent {every // largest} or more"
        )
    return {"CPU": float(cpus)} | (
        {"GPU": 1.0} if search.config.distill.fit.gpu else {}
    )


def _member(config: dict[str, Any], search: Search, begin: int, work: Work) -> None:
    # the stages of a member run in this process, also on a cluster
    os.environ.pop("RAY_ADDRESS", None)
    number = _number(tune.get_context().get_trial_id())
    begun, pointer = None, tune.get_checkpoint()
    if pointer is not None:
        with pointer.as_directory() as folder:
            named = storage.read_json(storage.join(folder, POINTER))
        begun = _look(search, named["member"], named["ninths"])
    elif begin:
        begun = _look(search, number, begin)
        _report(begun)
    work(search, number, config["settings"], begun, _report)


def _report(look: Look) -> None:
    """Tune's checkpoint names the look, whose state all workers can read; a scheduler
    that copies it copies that.
    """
    with tempfile.TemporaryDirectory() as folder:
        storage.write_json(
            str(Path(folder) / POINTER), {"member": look.member, "ninths": look.ninths}
        )
        tune.report(
            {TIME: look.ninths, METRIC: look.figures[METRIC]},
            checkpoint=tune.Checkpoint.from_directory(folder),
        )


def _number(trial_id: str) -> int:
    """Of a member: Tune counts the settings that it is given."""
    return int(trial_id.rpartition("_")[2])


def _look(search: Search, member: int, ninths: int) -> Look:
    look = read_look(search.folder, member, ninths)
    if look is None:
        raise StepError(
            f"the look at member {member} after {ninths}/{FULL} is gone from"
            f" {search.folder}/population"
        )
    return look


class _Population(PopulationBasedTraining):  # type: ignore[misc]
    """All members wait at each look for the last; then the seed decides, whatever the
    order they came in.
    """

    def __init__(self, search: Search, begin: int) -> None:
        space = search.space
        self.seed = search.config.seed

        def within(config: dict[str, Any]) -> dict[str, Any]:
            return config | {
                "settings": {
                    name: _bounded(space[name], value)
                    for name, value in config["settings"].items()
                }
            }

        super().__init__(
            time_attr=TIME,
            perturbation_interval=1,
            burn_in_period=begin,
            hyperparam_mutations={
                "settings": {name: _drawing(domain) for name, domain in space.items()}
            },
            quantile_fraction=QUARTER,
            resample_probability=RESAMPLED,
            perturbation_factors=FACTORS,
            custom_explore_fn=within,
            log_config=False,
            synch=True,
        )

    def on_trial_result(
        self, tune_controller: Any, trial: Any, result: dict[str, Any]
    ) -> str:
        state = random.getstate()
        random.seed(f"{self.seed} {result[TIME]}")
        try:
            return str(super().on_trial_result(tune_controller, trial, result))
        finally:
            random.setstate(state)


def _drawing(domain: Real | Choice) -> Callable[[], Any]:
    return lambda: drawn(domain, random.random())


def _bounded(domain: Real | Choice, value: Any) -> Any:
    return (
        value
        if isinstance(domain, Choice)
        else min(max(value, domain.low), domain.high)
    )


class _Shown(tune.Callback):  # type: ignore[misc]
    def __init__(self, search: Search) -> None:
        self.search = search

    def on_trial_result(
        self,
        iteration: int,
        trials: list[Any],
        trial: Any,
        result: dict[str, Any],
        **info: Any,
    ) -> None:
        print(
            look_line(_look(self.search, _number(trial.trial_id), result[TIME])),
            flush=True,
        )

    def on_trial_error(
        self, iteration: int, trials: list[Any], trial: Any, **info: Any
    ) -> None:
        """Told when all retries are used up. The others would wait for it for ever."""
        raise TrainingError(
            f"member {_number(trial.trial_id)} of the population was lost {RETRIES + 1}"
            " times. The same command with --resume goes on"
        )
