"""Members of a population without Ray: what they do between looks, and that a schedule
replayed is the student they came to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from builders import distillation, examples, tiny_config, tiny_fit

from coin_ray import storage
from coin_ray.config import Change, Distill
from coin_ray.errors import ConfigError, TrainingError
from coin_ray.runs.steps import Context
from coin_ray.search import member
from coin_ray.search.lineage import Look, place, read_look, read_looks
from coin_ray.search.member import Member, run_member
from coin_ray.search.plan import FULL, Search
from coin_ray.search.population import records_of
from coin_ray.search.trial import FAILED
from coin_ray.stages.common.training_job import Fit, load_weights, train
from coin_ray.stages.distill import finish
from coin_ray.training.loop import Curve

FIT = tiny_fit(steps=9, checkpoint_every=100)
Settings = dict[str, float]
Asked = Callable[..., Search]
PLAIN: Settings = {
    "distill.alignment": 1.0,
    "distill.inconsistent": 1.0,
    "distill.private": 2.0,
}
OTHER: Settings = {
    "distill.alignment": 5.0,
    "distill.inconsistent": 0.2,
    "distill.private": 0.5,
}


@pytest.fixture
def wanted(asked: Asked, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Search:
    """A population whose distillation is a toy of 9 steps; its score is a sum of the
    student's weights."""
    (tmp_path / "images").mkdir()
    made = examples(tmp_path / "images")

    def run(context: Context, fit: Callable[[Fit], Curve]) -> dict[str, Any]:
        return {"last": fit(toy(context.config.distill, context.folder, made))[-1]}

    def measured(search: Search, weights: dict[str, str]) -> dict[str, float | None]:
        return {
            "score": float(
                sum(w.double().sum() for w in load_weights(weights["student"]).values())
            ),
            "validation": None,
        }

    monkeypatch.setattr(member.distill, "run", run)
    monkeypatch.setattr("coin_ray.search.trial.measured", measured)
    search = asked(algorithm="population", scheduler="none")
    config = replace(
        search.config,
        distill=replace(
            search.config.distill, fit=replace(search.config.distill.fit, steps=9)
        ),
    )
    search = replace(search, config=config)
    for step in search.shared.values():
        storage.write_json(f"{step.folder(search.root)}/manifest.json", {})
    return search


def toy(weights: Distill, folder: str, made: list[Any]) -> Fit:
    values = {
        name: getattr(weights, name)
        for name in ("alignment", "inconsistent", "private", "schedule")
    }
    return Fit(
        "toy",
        lambda: distillation(FIT, **values),
        finish,
        made,
        FIT,
        tiny_config(),
        2,
        folder,
    )


class Paused(BaseException):
    """As Tune ends a worker where it reports."""


def until(ninths: int, told: list[Look] | None = None) -> Callable[[Look], None]:
    def report(look: Look) -> None:
        if told is not None:
            told.append(look)
        if look.ninths == ninths:
            raise Paused

    return report


def go(
    search: Search,
    number: int,
    settings: Settings,
    begun: Look | None,
    ninths: int = FULL,
) -> Look:
    """One member up to a look."""
    with pytest.raises(Paused):
        run_member(search, number, settings, begun, until(ninths))
    look = read_look(search.folder, number, ninths)
    assert look is not None
    return look


def test_the_schedule_replayed_in_one_training_is_the_students_that_copies_led_to(
    wanted: Search, tmp_path: Path
) -> None:
    """Member 0 makes three ninths, 1 copies it and makes two more under other weights,
    2 copies that and ends under the first ones."""
    for number in (1, 2, 3):
        go(wanted, number, PLAIN, None, 1)
        for ninths in (2, 3, 4):
            go(
                wanted,
                number,
                PLAIN,
                read_look(wanted.folder, number, ninths - 1),
                ninths,
            )
    third = go(wanted, 0, PLAIN, None, 3)
    fifth = go(wanted, 1, OTHER, go(wanted, 1, OTHER, third, 4), 5)
    go(wanted, 2, PLAIN, fifth)
    go(wanted, 2, PLAIN, fifth)
    looks = read_looks(wanted.folder, 3, FULL)
    line = (
        [looks[0, n] for n in (1, 2, 3)]
        + [looks[1, n] for n in (4, 5)]
        + [looks[2, n] for n in (6, 7, 8, 9)]
    )
    assert [look.copied for look in line] == [0, 0, 0, 0, 1, 1, 2, 2, 2]
    [record] = [
        r
        for r in records_of(looks | {(n, 9): looks[2, 9] for n in (0, 1)}, 3)
        if r.number == 2
    ]
    assert record.line == tuple(line)
    config = wanted.trial_config(record.settings, record.line)
    assert config.distill.schedule == (
        Change(3, 5.0, 0.2, 0.5),
        Change(5, 1.0, 1.0, 2.0),
    )
    assert config == wanted.full_config(record.settings, record.line)
    kept = wanted.steps(record.settings, record.line)["distill"]
    assert kept.manifest(wanted.root) is not None
    replayed = toy(
        config.distill, str(tmp_path / "replayed"), examples(tmp_path / "images")
    )
    train(replayed, lambda *_: None)
    for name in ("detector.pt", "teacher.pt", "ckg.pt"):
        theirs, ours = (
            load_weights(f"{folder}/{name}")
            for folder in (kept.folder(wanted.root), replayed.folder)
        )
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0)
    assert storage.read_json(
        f"{kept.folder(wanted.root)}/curve.json"
    ) == storage.read_json(f"{replayed.folder}/curve.json")
    unchanged = toy(
        replace(config.distill, schedule=()),
        str(tmp_path / "unchanged"),
        examples(tmp_path / "images"),
    )
    train(unchanged, lambda *_: None)
    assert any(
        not torch.equal(weight, load_weights(f"{unchanged.folder}/detector.pt")[name])
        for name, weight in load_weights(f"{replayed.folder}/detector.pt").items()
    )


def test_a_member_that_nobody_replaced_is_the_pipelines_own_distillation(
    wanted: Search,
) -> None:
    told: list[Look] = []
    with pytest.raises(Paused):
        run_member(wanted, 0, PLAIN, None, until(FULL, told))
    assert [(look.ninths, look.copied) for look in told] == [
        (n, 0) for n in range(1, 10)
    ]
    line = tuple(told)
    assert (
        wanted.steps(PLAIN, line)["distill"].fingerprint
        == wanted.steps(PLAIN)["distill"].fingerprint
    )
    assert wanted.steps(PLAIN)["distill"].manifest(wanted.root) is not None
    left = [
        Path(uri).name for uri in storage.list_files(f"{wanted.folder}/population/0")
    ]
    assert sorted(left) == sorted(
        [*(f"{n}.json" for n in range(1, 10)), "7.pt", "8.pt"]
    )


def test_after_a_kill_what_is_known_is_told_and_not_trained_again(
    wanted: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    second = go(wanted, 0, PLAIN, None, 2)
    go(wanted, 0, PLAIN, second, 4)
    trained: list[int] = []
    monkeypatch.setattr(Member, "train", lambda self: trained.append(self.ninths))
    told: list[Look] = []
    with pytest.raises(Paused):
        run_member(wanted, 0, PLAIN, second, until(4, told))
    assert ([look.ninths for look in told], trained) == ([3, 4], [])
    with pytest.raises(Paused):
        run_member(wanted, 0, OTHER, second, until(3))
    assert trained == [2], "under other settings it is another training"


def test_a_member_that_diverges_has_failed_until_it_is_replaced(
    wanted: Search, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverging(context: Context, fit: object) -> dict[str, Any]:
        raise TrainingError("loss private_regions is not finite at step 7")

    second = go(wanted, 0, PLAIN, None, 2)
    with monkeypatch.context() as patch:
        patch.setattr(member.distill, "run", diverging)
        third = go(wanted, 0, OTHER, second, 3)
    assert (third.figures, third.failure) == (
        {"score": FAILED},
        "TrainingError: loss private_regions is not finite at step 7",
    )
    assert not storage.exists(place(wanted.folder, 0, 3, ".pt"))
    fourth = go(wanted, 0, OTHER, third, 4)
    assert fourth.failure == third.failure
    go(wanted, 1, PLAIN, None, 4)
    assert go(wanted, 0, PLAIN, read_look(wanted.folder, 1, 4), 5).failure == ""
    go(wanted, 2, OTHER, fourth)
    assert read_looks(wanted.folder, 3, FULL)[2, FULL].failure == third.failure


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"scheduler": "asha"}, "leave out --scheduler asha"),
        ({"trials": 3}, "needs --trials 4 or more"),
        (
            {"space_name": "augment"},
            (
                r"distill\.fit\.augmentation, distill\.fit\.weight_decay can"
                r" not.*--space loss-weights"
            ),
        ),
        ({"space_name": "full"}, r"separate\.iou_min"),
        ({"steps_share": 0.02}, "after each ninth of"),
    ],
)
def test_what_a_population_cannot_change_is_said_before_it_starts(
    asked: Asked, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        asked(**({"algorithm": "population", "scheduler": "none"} | changes))


def test_a_search_of_weights_that_a_schedule_changes_is_an_error(asked: Asked) -> None:
    search = asked()
    config = replace(
        search.config,
        distill=replace(search.config.distill, schedule=(Change(5, 1.0, 1.0, 1.0),)),
    )
    with pytest.raises(
        ConfigError, match=r"distill\.schedule changes on the way: leave the latter out"
    ):
        asked(config=config)
