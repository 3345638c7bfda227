"""A search's page leads to what its trials made, and a trial's report to its search."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from coin_ray import storage
from coin_ray.commands.arguments import parse_run_arguments
from coin_ray.commands.main import main
from coin_ray.errors import InputError
from coin_ray.runs.graph import build_steps
from coin_ray.runs.steps import Context
from coin_ray.search.outcome import TrialRecord
from coin_ray.search.page import write_page
from coin_ray.search.plan import Search
from coin_ray.search.run import run_search
from coin_ray.stages.report import list_searches

MakeSearch = Callable[..., Search]


def _run_made_up_trials(
    search: Search, on_trial_end: Callable[[TrialRecord], None], *, resume: bool
) -> list[TrialRecord]:
    """Trial n has n times lambda; the third is the best, the second was stopped, the
    last one fails. All but that left a student."""
    records = [
        TrialRecord(
            n,
            {
                "distill.alignment": 1.0 + n,
                "distill.inconsistent": 1.0,
                "distill.private": 2.0,
            },
            {"score": score},
            ninths,
            1.0,
            failure,
        )
        for n, (score, ninths, failure) in enumerate(
            [(0.4, 9, ""), (0.42, 3, ""), (0.5, 9, ""), (-1.0, 9, "TrainingError: <b>")]
        )
    ]
    for record in records[:1] + records[2:3]:
        storage.write_json(
            storage.join(
                search.steps(record.settings)["distill"].folder(search.root),
                "manifest.json",
            ),
            {},
        )
    return records


@pytest.fixture
def finished_search(
    make_search: MakeSearch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Search:
    monkeypatch.setattr(Search, "run_shared_steps", lambda self: None)
    search = make_search()
    run_search(search, _run_made_up_trials)
    return search


def _read_rows(page: str) -> list[tuple[str, list[str]]]:
    """(trial, links) of each row."""
    body = page.partition("<tbody>")[2].partition("</tbody>")[0]
    return [
        (
            re.findall(r'<th scope="row">(.*?)</th>', row)[0],
            re.findall(r'href="(.*?)"', row),
        )
        for row in body.split("</tr>")[:-1]
    ]


def test_the_page_of_a_search_links_its_trials(
    finished_search: Search, capsys: pytest.CaptureFixture[str]
) -> None:
    page = Path(write_page(finished_search.folder))
    rows = _read_rows(page.read_text())
    assert [trial for trial, _ in rows] == ["2", "0 (preset)", "1", "3"]
    assert [len(links) for _, links in rows] == [1, 1, 0, 0]
    assert all((page.parent / link).is_file() for _, links in rows for link in links)
    assert "TrainingError" not in page.read_text(), "the state says that it failed"
    config, _ = parse_run_arguments(["--config", f"{finished_search.folder}/best.yaml"])
    report = build_steps(config)["report"].folder(finished_search.root)
    storage.write_bytes(f"{report}/report.html", b"")
    assert main(["report", finished_search.folder]) == 0
    assert capsys.readouterr().out.strip().endswith("/search.html")
    assert [len(links) for _, links in _read_rows(page.read_text())] == [2, 1, 0, 0]


def test_a_trials_report_links_its_search(finished_search: Search) -> None:
    config, _ = parse_run_arguments(["--config", f"{finished_search.folder}/best.yaml"])
    folder = build_steps(config)["report"].folder(finished_search.root)
    context = Context(config, finished_search.root, folder, {}, {}, "report")
    assert list_searches(context) == [], "a search without a page"
    page = write_page(finished_search.folder)
    [search_link] = list_searches(context)
    assert (search_link.name, search_link.trial, search_link.trials) == (
        "loss-weights-map50",
        2,
        4,
    )
    assert (Path(folder) / search_link.link).resolve() == Path(page)
    other, _ = parse_run_arguments(["--config", f"{finished_search.folder}/best.yaml"])
    object.__setattr__(other.distill, "alignment", 17.0)
    assert (
        list_searches(Context(other, finished_search.root, folder, {}, {}, "report"))
        == []
    )


def test_a_search_without_a_finished_trial_has_no_page(finished_search: Search) -> None:
    storage.remove(f"{finished_search.folder}/best.yaml")
    with pytest.raises(InputError, match=r"holds no search with a finished trial"):
        write_page(finished_search.folder)
    assert main(["report", finished_search.root]) == 2
