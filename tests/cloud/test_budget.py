"""No order of failures, kills and restarts makes the service bill more than the budget."""

from __future__ import annotations

import asyncio
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coin_ray.cloud.client import CloudClient, governor_limits
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.journal import SegmentJournal
from coin_ray.config import Cloud
from coin_ray.errors import BudgetExhausted, CloudError

from . import storm
from .conftest import CLASSES, URL, FakeTime, ok_response, solid_image
from .counting_server import BILLED

PRICE = 0.0015
CALLS, KILLS = 220, 8
BUDGETS: dict[str, dict[str, Any]] = {
    "calls": {"max_calls": CALLS},
    "usd": {"max_usd": CALLS * PRICE, "usd_per_call": PRICE},
    "both": {"max_calls": CALLS + 30, "max_usd": CALLS * PRICE, "usd_per_call": PRICE},
}


@pytest.mark.parametrize("budget", BUDGETS)
def test_kills_do_not_stretch_the_budget(tmp_path: Path, budget: str) -> None:
    """Real processes, killed with SIGKILL; the service counts."""
    seed = list(BUDGETS).index(budget)
    with storm.server(faults=0.25, seed=seed) as url:
        report = storm.run(
            url=url,
            folder=str(tmp_path),
            images=CALLS,
            kills=KILLS,
            seed=seed,
            records=30,
            settings=BUDGETS[budget] | {"attempts": 9},
        )
        calls = storm.fetched(f"{url}/stats")["calls"]
    assert report["kills"] == KILLS
    for state in report["states"]:
        assert (
            sum(kind in BILLED for _, kind in calls[: state["received"]])
            <= state["spent"][0]
            <= CALLS
        )
        assert state["spent"][1] <= CALLS * PRICE + 1e-9
    statuses = [row[0] for row in report["table"].values()]
    assert report["states"][-1]["spent"][0] == CALLS, (
        "what was left must have been used"
    )
    assert len(calls) == report["states"][-1]["received"]
    assert statuses.count("skipped_budget") > 0
    assert (
        statuses.count("ok") + statuses.count("cached")
        == len(report["states"][-1]["recorded"])
        > 0
    )


class Killed(BaseException):
    """The process ends here: nothing that handles ``Exception`` sees it."""


@dataclass
class Biller:
    """A service whose calls fail at random; it, not the client, says what it billed."""

    draw: random.Random
    kill_after: int | None
    """Requests after which the process dies, in the middle of the next one."""
    billed: int = 0
    received: int = 0
    under_way: int = 0
    most: int = 0

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        self.received += 1
        self.under_way += 1
        self.most = max(self.most, self.under_way)
        try:
            return await self.reply()
        finally:
            self.under_way -= 1

    async def reply(self) -> httpx.Response:
        for _ in range(self.draw.randint(1, 5)):
            await asyncio.sleep(0)
        billed = self.draw.random() < 0.5
        if self.kill_after is not None and self.received > self.kill_after:
            self.billed += billed
            raise Killed
        outcome = self.draw.choice(
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
        return (
            ok_response()
            if outcome == "ok"
            else httpx.Response(
                int(outcome), headers={"retry-after": "0"} if outcome == "429" else {}
            )
        )


def live(
    folder: str, config: Cloud, draw: random.Random, kill_after: int | None, skip: bool
) -> Biller:
    """One life of a process: 16 callers ask until all is answered, the budget is spent
    or the process dies."""
    fake = FakeTime()
    service = Biller(draw, kill_after)

    async def run() -> None:
        journal = SegmentJournal(folder)
        client = CloudClient(
            config,
            CLASSES,
            URL,
            journal,
            LocalGovernor(Governor(governor_limits(config), journal.spent(), fake)),
            transport=httpx.MockTransport(service),
            skip_over_budget=skip,
            sleep=fake.sleep,
            clock=fake,
        )
        try:
            await asyncio.gather(
                *(client.answer(solid_image(seed)) for seed in range(config.in_flight))
            )
        finally:
            journal.close()

    try:
        asyncio.run(run())
    except (Killed, BudgetExhausted):
        pass
    except CloudError as error:
        if not error.stops_run:
            raise
    return service


@given(
    seed=st.integers(0, 2**32),
    budget=st.integers(1, 40),
    in_money=st.booleans(),
    skip=st.booleans(),
    lives=st.lists(st.one_of(st.none(), st.integers(0, 30)), min_size=1, max_size=6),
)
def test_no_history_overspends(
    seed: int, budget: int, in_money: bool, skip: bool, lives: list[int | None]
) -> None:
    draw = random.Random(seed)
    cap: dict[str, Any] = (
        {"max_usd": budget * PRICE} if in_money else {"max_calls": budget}
    )
    config = Cloud(
        url=URL, rate=1e4, in_flight=16, attempts=4, usd_per_call=PRICE, **cap
    )
    billed = 0
    with tempfile.TemporaryDirectory() as folder:
        for kill_after in lives:
            before = SegmentJournal(folder).spent()
            service = live(folder, config, draw, kill_after, skip)
            billed += service.billed
            calls, usd = SegmentJournal(folder).spent()
            assert service.most <= config.in_flight
            assert billed <= calls <= budget
            assert usd == pytest.approx(calls * PRICE)
            if before[0] == budget:
                assert service.received == 0
