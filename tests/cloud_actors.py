"""Several cloud actors in this process, under one governor as in a collection, but without
a cluster."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine, Sequence
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pyarrow as pa
import ray

from coin_ray.config import PipelineConfig
from coin_ray.stages.collecting import cloud_actor
from coin_ray.stages.collecting.cloud_actor import CloudActor
from coin_ray.stages.collecting.governor_actor import GovernorActor

ACTORS = 3
_actor_ids = itertools.count()


class _GovernorHandle:
    """The handle of a ``GovernorActor`` that lives in this process."""

    def __init__(self, governor: GovernorActor) -> None:
        self.governor = governor

    def __getattr__(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(remote=getattr(self.governor, name))


def _wait_for(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine that never waits returns."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the coroutine waits for something")


def _runtime_context() -> SimpleNamespace:
    return SimpleNamespace(get_actor_id=lambda: f"actor {next(_actor_ids)}")


def start_cloud_actors(
    count: int,
    config: PipelineConfig,
    urls: Sequence[str],
    journal: str,
    second: bool = False,
    run: str = "",
) -> list[CloudActor]:
    """Return ``count`` actors. One alone has governors of its own, as in a collection.
    Call it inside the event loop of the actors.
    """
    if count == 1:
        return [CloudActor(config, urls, journal, second, run)]
    handle: Any = _GovernorHandle(GovernorActor(config, urls, journal))
    stand_in = SimpleNamespace(
        get=_wait_for,
        get_runtime_context=_runtime_context,
        exceptions=ray.exceptions,
    )
    with patch.object(cloud_actor, "ray", stand_in):
        return [
            CloudActor(config, urls, journal, second, run, handle) for _ in range(count)
        ]


def ask_cloud_actors(
    count: int,
    rows: Sequence[dict[str, str]],
    config: PipelineConfig,
    urls: Sequence[str],
    journal: str,
    second: bool = False,
    run: str = "",
) -> pa.Table:
    """Let the actors ask about all images at once, each about its share; return their
    answers in the order of ``rows``.
    """

    async def ask() -> list[pa.Table]:
        actors = start_cloud_actors(count, config, urls, journal, second, run)
        shares = [rows[number::count] for number in range(count)]
        return await asyncio.gather(
            *(
                actor(pa.Table.from_pylist(list(share)))
                for actor, share in zip(actors, shares, strict=True)
                if share
            )
        )

    answers = pa.concat_tables(asyncio.run(ask()))
    order = [answers["image_id"].to_pylist().index(row["image_id"]) for row in rows]
    return answers.take(order)
