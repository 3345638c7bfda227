"""Who copies whom, and what is drawn: the scheduler of a population, driven without Ray
in whatever order members get ready."""

from __future__ import annotations

import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.tune.experiment import Trial
from ray.tune.schedulers import TrialScheduler

from coin_ray.errors import ConfigError
from coin_ray.search.plan import FULL, Search
from coin_ray.search.population import FACTORS, _needs, _Population, starts
from coin_ray.search.space import Real

Asked = Callable[..., Search]
Seen = dict[tuple[int, int], tuple[int, dict[str, float], float]]
"""(source, settings, score) by member and ninths."""


class Member:
    """Of a Tune trial what its scheduler touches. A checkpoint is (member, ninths,
    score)."""

    def __init__(self, number: int, settings: dict[str, float]) -> None:
        self.number, self.trial_id, self.config, self.status = (
            number,
            f"abc_{number:05d}",
            {"settings": settings},
            Trial.PENDING,
        )
        self.experiment_tag, self.last_result, self.checkpoint = str(number), {}, None
        self.temporary_state = SimpleNamespace(saving_to=None)
        manager = SimpleNamespace(
            checkpoint_config=SimpleNamespace(num_to_keep=None),
            _latest_checkpoint_result=None,
        )
        self.run_metadata = SimpleNamespace(checkpoint_manager=manager)

    def is_finished(self) -> bool:
        return self.status == Trial.TERMINATED

    def set_config(self, config: dict[str, Any]) -> None:
        self.config = config

    def set_experiment_tag(self, tag: str) -> None:
        self.experiment_tag = tag


class Tuner:
    def __init__(self, members: list[Member]) -> None:
        self.members, self.search_alg = members, None

    def get_trials(self) -> list[Member]:
        return self.members

    get_live_trials = get_trials

    def pause_trial(self, trial: Member, should_checkpoint: bool) -> None:
        trial.status = Trial.PAUSED

    def _schedule_trial_save(self, trial: Member, result: dict[str, Any]) -> Any:
        return trial.checkpoint


def trained(
    search: Search, order: random.Random, seen: Seen | None = None, begin: int = 0
) -> Seen:
    """A whole population, whose score says how near alignment was to 3 on the way. From
    ``begin`` on as it was ``seen`` there."""
    population = _Population(search, begin)
    population.set_search_properties("score", "max")
    given = (
        [seen[m, begin][1] for m in range(search.trials)] if seen else starts(search, 0)
    )
    members = [Member(number, settings) for number, settings in enumerate(given)]
    tuner = Tuner(members)
    for member in members:
        population.on_trial_add(tuner, member)
    found: Seen = {key: look for key, look in (seen or {}).items() if key[1] <= begin}
    for ninths in range(max(begin, 1), FULL):
        for member in order.sample(members, len(members)):
            if ninths > begin:
                make(member, ninths, found)
            member.status, member.checkpoint = (
                Trial.RUNNING,
                (
                    member.number,
                    ninths,
                    found[member.number, ninths][2],
                ),
            )
            said = population.on_trial_result(
                tuner,
                member,
                {"ninths": ninths, "score": found[member.number, ninths][2]},
            )
            assert said in (TrialScheduler.PAUSE, TrialScheduler.NOOP)
            copied = member.run_metadata.checkpoint_manager._latest_checkpoint_result
            member.status = Trial.PAUSED
            if copied is None or copied.checkpoint[1] < ninths:
                member.run_metadata.checkpoint_manager._latest_checkpoint_result = (
                    SimpleNamespace(checkpoint=member.checkpoint)
                )
        assert population.choose_trial_to_run(tuner) in members, "nobody waits for ever"
    for member in members:
        make(member, FULL, found)
    return found


def make(member: Member, ninths: int, found: Seen) -> None:
    result = member.run_metadata.checkpoint_manager._latest_checkpoint_result
    source, _, score = result.checkpoint if result else (member.number, 0, 0.0)
    settings = member.config["settings"]
    found[member.number, ninths] = (
        source,
        settings,
        score + 1 / (1 + abs(settings["distill.alignment"] - 3)),
    )


@pytest.fixture
def wanted(asked: Asked) -> Search:
    return asked(algorithm="population", scheduler="none", trials=8)


def test_the_worst_quarter_copies_the_best_quarter_and_moves_within_the_ranges(
    wanted: Search,
) -> None:
    seen = trained(wanted, random.Random(1))
    steps = set()
    for ninths in range(2, FULL + 1):
        order = sorted(range(8), key=lambda m, n=ninths: seen[m, n - 1][2])  # type: ignore[misc]
        for member in range(8):
            source, settings, _ = seen[member, ninths]
            before = seen[source, ninths - 1][1]
            assert (source in order[-2:]) if member in order[:2] else source == member
            assert settings == before if source == member else settings != before
            for name, value in settings.items():
                domain = wanted.space[name]
                assert isinstance(domain, Real)
                assert domain.low <= value <= domain.high
                steps.add(round(value / before[name], 6))
    assert {round(factor, 6) for factor in FACTORS} <= steps
    assert len(steps) > 5, "now and then a setting is drawn anew"


def test_the_seed_decides_and_not_the_order_in_which_members_get_ready(
    wanted: Search,
) -> None:
    seen = trained(wanted, random.Random(1))
    random.seed(99)
    before = random.getstate()
    assert trained(wanted, random.Random(2)) == seen
    assert random.getstate() == before


@pytest.mark.parametrize("begin", [1, 2, 5, 8])
def test_a_population_that_goes_on_from_a_look_ends_as_if_it_had_not_stopped(
    wanted: Search, begin: int
) -> None:
    seen = trained(wanted, random.Random(1))
    assert trained(wanted, random.Random(3), seen, begin) == seen


@pytest.mark.parametrize("nodes", [(2,), (8,), (16,), (4, 4, 4, 4), (3, 8), (64, 2)])
@pytest.mark.parametrize("concurrent", [1, 2, 3, 5, 8, None])
def test_no_more_members_find_room_than_are_asked_for(
    asked: Asked,
    nodes: tuple[int, ...],
    concurrent: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(sum(nodes))})
    monkeypatch.setattr(
        ray,
        "nodes",
        lambda: [{"Alive": True, "Resources": {"CPU": float(n)}} for n in nodes],
    )
    search = asked(
        algorithm="population", scheduler="none", trials=8, concurrent=concurrent
    )
    most = max(nodes)
    if concurrent is not None and (
        concurrent > sum(nodes)
        or (concurrent < 8 and sum(nodes) // (concurrent + 1) >= most)
    ):
        with pytest.raises(
            ConfigError,
            match=(
                rf"there are {sum(nodes)}\.|the largest has {most}\. Give --concurrent"
                rf" {sum(nodes) // most} or more"
            ),
        ):
            _needs(search)
        return
    cpus = _needs(search)["CPU"]
    room = sum(n // cpus for n in nodes)
    assert room >= 1
    assert concurrent is None or min(room, 8) <= concurrent
