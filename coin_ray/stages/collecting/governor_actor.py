"""The actor that grants the calls of several cloud actors, and knows how far all of them
have got together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from coin_ray import storage
from coin_ray.cloud.governor import Grant
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.shared_governor import (
    Exchange,
    Group,
    RemoteGovernor,
    SharedGovernor,
)
from coin_ray.config import PipelineConfig
from coin_ray.errors import CloudUnreachable
from coin_ray.stages.collecting.governors import governors_for

CALLS_AT_ONCE = 1000
"""Groups that wait at the governor at once, at most."""


@dataclass(frozen=True, slots=True)
class Tally:
    """Images that were answered, and those of them that failed."""

    answers: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class RunState:
    """What the other cloud actors have done. ``stop_error``: as JSON, an error of any
    actor that ends the run.
    """

    others: Tally = Tally()
    stop_error: str | None = None


class GovernorActor:
    """Holds the governor of each cloud. They are filled once, from the journal, and live
    as long as the collection: their process is on the driver's node and not restarted.
    """

    def __init__(self, config: PipelineConfig, urls: Sequence[str], journal: str):
        storage.set_patience(config.storage.patience)
        answers = open_journal(journal)
        local_governors = governors_for(config, urls, answers)
        answers.close()
        governors = [local.governor for local in local_governors]
        shared = {id(governor): SharedGovernor(governor) for governor in governors}
        self.governors = [shared[id(governor)] for governor in governors]
        self.workers: dict[str, str] = {}
        """The worker that each cloud actor is now, by the actor's id."""
        self.tallies: dict[str, Tally] = {}
        self.stop_error: str | None = None

    async def register(self, actor_id: str, worker: str) -> None:
        """Note a cloud actor's new process; its earlier one has ended."""
        former = self.workers.get(actor_id)
        self.workers[actor_id] = worker
        if former is not None:
            for governor in self.governors:
                governor.end_worker(former)

    async def exchange(self, cloud: int, group: Group) -> list[Grant | None]:
        """Exchange reports and requests of a worker for grants of one cloud."""
        return await self.governors[cloud].exchange(group)

    async def update(
        self, worker: str, tally: Tally, stop_error: str | None
    ) -> RunState:
        """Note how far a worker has got; return how far the others have."""
        self.tallies[worker] = tally
        self.stop_error = self.stop_error or stop_error
        others = [t for name, t in self.tallies.items() if name != worker]
        total = Tally(
            sum(tally.answers for tally in others),
            sum(tally.failures for tally in others),
        )
        return RunState(total, self.stop_error)


def start_governor(
    config: PipelineConfig, urls: Sequence[str], journal: str
) -> ray.actor.ActorHandle:
    """Start the governor on this node; return once it has read the journal."""
    here = ray.get_runtime_context().get_node_id()
    governor = (
        ray.remote(GovernorActor)
        .options(
            num_cpus=0,
            max_concurrency=CALLS_AT_ONCE,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
        )
        .remote(config, urls, journal)
    )
    ray.get(governor.register.remote("", ""))
    return governor


def remote_governors(
    governor: ray.actor.ActorHandle, clouds: int, worker: str
) -> list[RemoteGovernor]:
    """Return a worker's side of the governor of each cloud."""
    return [RemoteGovernor(_exchange(governor, n), worker) for n in range(clouds)]


def _exchange(governor: ray.actor.ActorHandle, cloud: int) -> Exchange:
    async def exchange(group: Group) -> Sequence[Grant | None]:
        try:
            grants: list[Grant | None] = await governor.exchange.remote(cloud, group)
        except ray.exceptions.RayActorError:
            raise CloudUnreachable(
                "the process that grants the calls of all cloud actors has ended (the"
                " system may have killed it for its memory): run the same command"
                " again, answers so far are kept"
            ) from None
        return grants

    return exchange
