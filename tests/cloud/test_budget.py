"""No sequence of failures, kills and restarts makes the service bill more than the
budget."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coin_ray.cloud import shared_governor
from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.segments import SegmentJournal
from coin_ray.cloud.shared_governor import RemoteGovernor, SharedGovernor
from coin_ray.config import Cloud
from coin_ray.errors import BudgetExhausted, CloudError

from . import storm
from .conftest import CLASSES, URL, FakeTime, ProcessKilled, ok_response, solid_image
from .counting_server import BILLED, REPLIED

PRICE = 0.0015
CALLS, KILLS = 220, 8
BUDGETS: dict[str, dict[str, Any]] = {
    "calls": {"max_calls": CALLS},
    "usd": {"max_usd": CALLS * PRICE, "usd_per_call": PRICE},
    "both": {"max_calls": CALLS + 30, "max_usd": CALLS * PRICE, "usd_per_call": PRICE},
}


@pytest.fixture(scope="module", autouse=True)
def _quick_groups() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_governor, "GROUP_SECONDS", 0.0)
        yield


@pytest.mark.parametrize(
    "budget",
    [*(pytest.param(b, marks=pytest.mark.slow) for b in ("calls", "usd")), "both"],
)
def test_kills_do_not_stretch_the_budget(tmp_path: Path, budget: str) -> None:
    """Kill real processes with SIGKILL; the service counts the calls."""
    seed = list(BUDGETS).index(budget)
    with storm.counting_server(faults=0.25, seed=seed) as url:
        report = storm.run_storm(
            url=url,
            folder=str(tmp_path),
            images=CALLS,
            kills=KILLS,
            seed=seed,
            records=30,
            settings=BUDGETS[budget] | {"attempts": 9},
        )
        calls = storm.fetch_json(f"{url}/stats")["calls"]
    assert report["kills"] == KILLS
    for state in report["states"]:
        spent_calls, spent_usd = state["spent"]
        billed = sum(kind in BILLED for _, kind in calls[: state["received"]])
        assert billed <= spent_calls <= CALLS
        replies = sum(kind in REPLIED for _, kind in calls[: state["received"]])
        assert state["answered"] <= replies, "an answer on record that nobody sent"
        assert replies - state["answered"] <= KILLS * 2 * storm.IN_FLIGHT
        assert spent_usd <= CALLS * PRICE + 1e-9
    last_state = report["states"][-1]
    assert last_state["spent"][0] == CALLS, "the rest of the budget must be used"
    assert len(calls) == last_state["received"]
    statuses = [row[0] for row in report["table"].values()]
    assert statuses.count("skipped_budget") > 0
    answered = statuses.count("ok") + statuses.count("cached")
    assert answered == len(last_state["recorded"]) > 0


@dataclass
class _BillingService:
    """A service whose calls fail at random, and which counts what it bills."""

    random_source: random.Random
    kill_after: int | None
    """Requests after which the process dies, in the middle of the next one."""
    billed: int = 0
    received: int = 0
    in_flight: int = 0
    in_flight_max: int = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.received += 1
        self.in_flight += 1
        self.in_flight_max = max(self.in_flight_max, self.in_flight)
        try:
            return await self.reply()
        finally:
            self.in_flight -= 1

    async def reply(self) -> httpx.Response:
        for _ in range(self.random_source.randint(1, 5)):
            await asyncio.sleep(0)
        billed = self.random_source.random() < 0.5
        if self.kill_after is not None and self.received > self.kill_after:
            self.billed += billed
            raise ProcessKilled
        outcome = self.random_source.choice(
            ["ok", "ok", "429", "500", "503", "drop", "refused", "broken", "late"]
        )
        if outcome in ("ok", "late", "broken"):
            self.billed += 1
        elif outcome in ("500", "503", "drop"):
            self.billed += billed
        if outcome == "late":
            raise httpx.ReadTimeout("late")
        if outcome == "drop":
            raise httpx.ReadError("gone")
        if outcome == "refused":
            raise httpx.ConnectError("nobody there")
        if outcome == "broken":
            return httpx.Response(200, content=b'{"image": ')
        if outcome == "ok":
            return ok_response()
        headers = {"retry-after": "0"} if outcome == "429" else {}
        return httpx.Response(int(outcome), headers=headers)


def _run_process(
    folder: str,
    config: Cloud,
    random_source: random.Random,
    kill_after: int | None,
    skip_over_budget: bool,
    actors: int,
) -> _BillingService:
    """Let 16 callers query until all images are answered, the budget is spent or the
    process dies. With several ``actors`` each has a journal and a client of its own, and
    asks about some of the images; two of them about the first.
    """
    clock = FakeTime()
    service = _BillingService(random_source, kill_after)

    async def run() -> None:
        journals = [SegmentJournal(folder) for _ in range(actors)]
        governor = Governor(governor_limits(config), journals[0].spent(), clock)
        shared = SharedGovernor(governor)
        clients = [
            CloudClient(
                config,
                CLASSES,
                URL,
                journal,
                LocalGovernor(governor)
                if actors == 1
                else RemoteGovernor(shared.exchange, f"actor {number}"),
                transport=httpx.MockTransport(service),
                skip_over_budget=skip_over_budget,
                sleep=clock.sleep,
                clock=clock,
            )
            for number, journal in enumerate(journals)
        ]
        seeds = [0, *range(config.in_flight)] if actors > 1 else range(config.in_flight)
        try:
            await asyncio.gather(
                *(
                    clients[number % actors].answer(solid_image(seed))
                    for number, seed in enumerate(seeds)
                )
            )
        finally:
            for journal in journals:
                journal.close()

    try:
        asyncio.run(run())
    except (ProcessKilled, BudgetExhausted):
        pass
    except CloudError as error:
        if not error.stops_run:
            raise
    return service


@given(
    seed=st.integers(0, 2**32),
    budget=st.integers(1, 40),
    in_money=st.booleans(),
    skip_over_budget=st.booleans(),
    actors=st.sampled_from([1, 3]),
    kills=st.lists(st.one_of(st.none(), st.integers(0, 30)), min_size=1, max_size=6),
)
def test_no_history_overspends(
    seed: int,
    budget: int,
    in_money: bool,
    skip_over_budget: bool,
    actors: int,
    kills: list[int | None],
) -> None:
    """Run one process per element of ``kills``, killed after so many requests."""
    random_source = random.Random(seed)
    limit: dict[str, Any] = {"max_calls": budget}
    if in_money:
        limit = {"max_usd": budget * PRICE}
    config = Cloud(
        url=URL, rate=1e4, in_flight=16, attempts=4, usd_per_call=PRICE, **limit
    )
    billed = 0
    with tempfile.TemporaryDirectory() as folder:
        for kill_after in kills:
            calls_before, _ = SegmentJournal(folder).spent()
            service = _run_process(
                folder, config, random_source, kill_after, skip_over_budget, actors
            )
            billed += service.billed
            calls, usd = SegmentJournal(folder).spent()
            assert service.in_flight_max <= config.in_flight
            assert billed <= calls <= budget
            assert usd == pytest.approx(calls * PRICE)
            if calls_before == budget:
                assert service.received == 0
