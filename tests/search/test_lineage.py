"""What a population leaves: the schedule of its winner as a setting, who copied whom,
and a page that says so. A host makes the looks up."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coin_ray import storage
from coin_ray.commands.arguments import parse
from coin_ray.commands.search import request
from coin_ray.config import Change, Tracking
from coin_ray.config.presets import demo
from coin_ray.errors import ConfigError
from coin_ray.runs.graph import graph
from coin_ray.runs.steps import Context
from coin_ray.search import run
from coin_ray.search.lineage import (
    Look,
    copies,
    line_of,
    place,
    said,
    scheduled,
    seen_of_all,
)
from coin_ray.search.outcome import Record, best
from coin_ray.search.page import write_page
from coin_ray.search.plan import FULL, Search
from coin_ray.search.plots import lines
from coin_ray.search.population import drawn, records_of, starts
from coin_ray.search.run import search
from coin_ray.search.space import Choice, Real
from coin_ray.stages.report import sweeps

Asked = Callable[..., Search]
COPIED = {(3, 4): 1, (0, 6): 3}
"""Member 3 copied 1 before its fourth ninth, and 0 copied 3 before its sixth."""


def settings(alignment: float) -> dict[str, float]:
    return {
        "distill.alignment": alignment,
        "distill.inconsistent": 1.0,
        "distill.private": 2.0,
    }


def population() -> dict[tuple[int, int], Look]:
    """Four members; a copy's alignment is one more than its source's. 0 is best in the
    end, 2 fails on its way."""
    looks: dict[tuple[int, int], Look] = {}
    for ninths in range(1, FULL + 1):
        for member in range(4):
            copied = COPIED.get((member, ninths), member)
            before = (
                looks[copied, ninths - 1].settings["distill.alignment"]
                if ninths > 1
                else 1.0 + member
            )
            failed = member == 2 and ninths > 6
            score = (
                -1.0
                if failed
                else 0.02 * ninths
                + (0.1 if member == 0 and ninths > 5 else 0.001 * member)
            )
            own = settings(before + (copied != member))
            looks[member, ninths] = Look(
                member,
                ninths,
                copied,
                own,
                {"score": score},
                2.0,
                "TrainingError: <b>" * failed,
            )
    return looks


def host(
    wanted: Search, told: Callable[[Record], None], *, resume: bool
) -> list[Record]:
    looks = population()
    for look in looks.values():
        storage.write_json(
            place(wanted.folder, look.member, look.ninths, ".json"),
            dataclasses.asdict(look),
        )
    records = records_of(looks, 4)
    for record in records:
        told(record)
    winner = records[0]
    storage.write_json(
        f"{wanted.steps(winner.settings, winner.line)['distill'].folder(wanted.root)}/manifest.json",
        {},
    )
    return records


@pytest.fixture
def wanted(asked: Asked, monkeypatch: pytest.MonkeyPatch) -> Search:
    monkeypatch.setattr(Search, "prepare", lambda self: None)
    return asked(algorithm="population", scheduler="none")


def test_a_line_follows_copies_back_to_the_start() -> None:
    looks = population()
    line = line_of(looks, 0, FULL)
    assert [look.member for look in line] == [1, 1, 1, 3, 3, 0, 0, 0, 0]
    assert said(line) == "1, 3 from ninth 4, 0 from ninth 6"
    assert said(line_of(looks, 2, 5)) == "2"
    assert [(c.ninths, c.member, c.copied) for c in copies(looks)] == [
        (4, 3, 1),
        (6, 0, 3),
    ]


def test_a_killed_population_goes_on_from_the_last_look_that_all_have() -> None:
    looks = population()
    assert seen_of_all(looks, 4) == 9
    assert (
        seen_of_all(
            {key: look for key, look in looks.items() if key not in ((2, 9), (2, 8))}, 4
        )
        == 7
    )
    assert seen_of_all({key: look for key, look in looks.items() if key[0]}, 4) == 0


@given(
    st.lists(st.sampled_from([0.5, 1.0, 2.0]), min_size=FULL, max_size=FULL),
    st.integers(FULL, 400),
)
def test_at_every_step_a_schedule_has_the_weights_of_the_ninth_that_it_lies_in(
    weights: list[float], steps: int
) -> None:
    config = demo()
    config = replace(
        config,
        distill=replace(config.distill, fit=replace(config.distill.fit, steps=steps)),
    )
    line = [
        Look(0, n, 0, settings(weight), {"score": 0.0}, 1.0)
        for n, weight in enumerate(weights, start=1)
    ]
    made = scheduled(config, line, FULL).distill
    every = steps // FULL
    assert [made.at(step).alignment for step in range(steps)] == [
        weights[min(step // every, FULL - 1)] for step in range(steps)
    ]
    assert len(made.schedule) == sum(a != b for a, b in pairwise(weights))


@given(st.floats(0, 1, exclude_max=True))
def test_what_is_drawn_lies_in_its_range(share: float) -> None:
    for domain in (Real(0.1, 8.0, log=True), Real(-1.0, 1.0)):
        assert domain.low <= drawn(domain, share) <= domain.high
    assert drawn(Choice(("a", "b")), share) == ("a" if share < 0.5 else "b")


def test_members_start_with_the_preset_and_what_the_seed_draws(wanted: Search) -> None:
    first = starts(wanted, 0)
    assert first[0] == settings(1.0)
    assert len({json.dumps(s) for s in first}) == 4
    assert starts(wanted, 0) == first
    assert (
        starts(replace(wanted, config=replace(wanted.config, seed=5)), 0)[1:]
        != first[1:]
    )


def test_the_winner_is_a_config_with_a_schedule_whose_student_the_pipeline_finds(
    wanted: Search, capsys: pytest.CaptureFixture[str]
) -> None:
    winner = search(wanted, host)
    assert winner.number == 0
    config, _ = parse(["--config", f"{wanted.folder}/best.yaml", "--root", wanted.root])
    every = demo().distill.fit.steps // FULL
    assert config.distill.alignment == 2.0
    assert config.distill.schedule == (
        Change(3 * every, 3.0, 1.0, 2.0),
        Change(5 * every, 4.0, 1.0, 2.0),
    )
    distill = graph(config)["distill"]
    assert distill.fingerprint != graph(demo())["distill"].fingerprint
    assert distill.manifest(wanted.root) is not None
    told = storage.read_json(f"{wanted.folder}/schedule.json")
    assert [(s["from_step"], s["member"]) for s in told["schedule"]] == [
        (n * every, m) for n, m in enumerate((1, 1, 1, 3, 3, 0, 0, 0, 0))
    ]
    assert (told["winner"], len(told["looks"])) == (0, 36)
    said = capsys.readouterr().out
    assert "trial 0 came through 1, 3 from ninth 4, 0 from ninth 6" in said
    assert "alignment 2 → 4" in said
    assert "over the preset" not in said, "the preset's own member has been replaced"
    assert {path.name for path in Path(wanted.folder).glob("*.svg")} == {
        "population.svg"
    }


def test_a_shorter_population_leaves_a_schedule_of_full_length(wanted: Search) -> None:
    short = replace(wanted, steps_share=0.5)
    search(short, host)
    config, _ = parse(["--config", f"{short.folder}/best.yaml"])
    every = demo().distill.fit.steps // FULL
    assert [change.start for change in config.distill.schedule] == [
        3 * every,
        5 * every,
    ]
    [winner] = [r for r in records_of(population(), 4) if r.number == 0]
    shorter = short.trial_config(winner.settings, winner.line).distill
    assert [change.start for change in shorter.schedule] == [
        3 * (shorter.fit.steps // FULL),
        5 * (shorter.fit.steps // FULL),
    ]


def test_the_page_says_who_copied_whom_and_when(wanted: Search) -> None:
    search(wanted, host)
    page = Path(write_page(wanted.folder)).read_text()
    rows = re.findall(
        r"<tr>(.*?)</tr>",
        page.partition('id="copies"')[2].partition("</table>")[0],
        re.S,
    )[1:]
    assert [re.findall(r">([^<]+)</t[hd]>", row)[:4] for row in rows] == [
        ["3/9", "3", "1", "3"],
        ["5/9", "0", "3", "4"],
    ]
    assert "The student of 0 came through 1, 3 from ninth 4, 0 from ninth 6" in page
    assert "(preset)" not in page
    assert page.count("manifest.json") == 1
    assert "<b>" not in page
    config, _ = parse(["--config", f"{wanted.folder}/best.yaml"])
    folder = graph(config)["report"].folder(wanted.root)
    [found] = sweeps(Context(config, wanted.root, folder, {}, {}, "report"))
    assert found["trial"] == 0
    plain = replace(config, distill=replace(config.distill, schedule=()))
    assert [
        f["trial"]
        for f in sweeps(Context(plain, wanted.root, folder, {}, {}, "report"))
    ] == [1], "who began so, and never changed"


def test_the_figure_is_svg_without_what_failed() -> None:
    drawn = lines("Search & find", population())
    ET.fromstring(drawn)
    assert set(re.findall(r'id="member-(\d-\d)"', drawn)) == {
        f"{m}-{n}" for m, n in population() if m != 2 or n <= 6
    }


def test_the_best_member_is_one_that_has_not_failed() -> None:
    records = records_of(population(), 4)
    winner = best(records)
    assert winner is not None
    assert winner.number == 0
    assert [r.state for r in records] == ["finished", "finished", "failed", "finished"]
    assert not records[0].is_preset
    assert [r.seconds for r in records] == [18.0] * 4


def test_child_runs_name_the_line(wanted: Search) -> None:
    mlflow = pytest.importorskip("mlflow")
    tracked = replace(wanted, config=replace(wanted.config, tracking=Tracking()))
    search(tracked, host)
    runs = run.Runs("search loss-weights map50", tracked.config, tracked.root)
    found = mlflow.search_runs([runs.tracker.experiment], output_format="list")
    children = {
        r.info.run_name: r
        for r in found
        if r.data.tags.get("mlflow.parentRunId") == runs.tracker.parent_run
    }
    [winner] = [
        r
        for name, r in children.items()
        if name.startswith("trial 0 (1, 3 from ninth 4, 0 from ninth 6)")
    ]
    assert len(children) == 4
    assert "'alignment': 4.0" in winner.data.params["distill.schedule"]
    assert {
        f.path for f in mlflow.MlflowClient().list_artifacts(runs.tracker.parent_run)
    } >= {"schedule.json", "best.yaml"}


def test_one_switch_asks_for_a_population(asked: Asked) -> None:
    found = request(
        ["demo", "--algorithm", "population", "--trials", "8"], "search.py", ""
    ).search
    assert (found.scheduler, found.trials, found.folder.rpartition("/")[2]) == (
        "none",
        8,
        "loss-weights-map50-population",
    )
    with pytest.raises(ConfigError, match="leave out --scheduler asha"):
        request(
            ["demo", "--algorithm", "population", "--scheduler", "asha"],
            "search.py",
            "",
        )
    assert request(["demo"], "search.py", "").search.scheduler == "asha"
