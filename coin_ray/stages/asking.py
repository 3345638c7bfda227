"""The first half of collection: actors that ask the cloud about each image. Imports no torch, so they start fast and stay small."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pyarrow as pa
import ray

from coin_ray import errors, storage
from coin_ray.cloud.client import Answer, CloudClient, limits
from coin_ray.cloud.journal import Journal
from coin_ray.cloud.limiter import Governor, GovernorStats, Grant, Outcome
from coin_ray.config import Cloud, PipelineConfig
from coin_ray.data.canonical import canonical_image
from coin_ray.errors import CloudError, InputError

STOPPED = "stopped"
RAW = pa.schema(
    [
        ("image_id", pa.string()),
        ("bytes", pa.binary()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        ("class_scores", pa.list_(pa.list_(pa.float32()))),
        ("status", pa.string()),
        ("attempts", pa.int32()),
        ("latency_ms", pa.float32()),
        ("cost_usd", pa.float64()),
        ("calls", pa.int32()),
        ("error", pa.string()),
    ]
)
ERROR_CHECK_FROM = 50


@ray.remote
class GovernorActor:
    """The one governor of a run, for all cloud actors."""

    def __init__(self, cloud: Cloud, spent: tuple[int, float]) -> None:
        self.governor = Governor(limits(cloud), spent)

    async def reserve(self, usd: float) -> Grant:
        return self.governor.reserve(usd)

    async def settle(self, lease: int, outcome: Outcome, billed: bool) -> None:
        self.governor.settle(lease, outcome, billed)

    async def pause(self, seconds: float) -> None:
        self.governor.pause(seconds)

    async def stats(self) -> GovernorStats:
        return self.governor.stats()


class RemoteGovernor:
    """``AsyncGovernor`` in front of the actor."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    async def reserve(self, usd: float) -> Grant:
        return await self.actor.reserve.remote(usd)  # type: ignore[no-any-return]

    async def settle(self, lease: int, outcome: Outcome, billed: bool) -> None:
        await self.actor.settle.remote(lease, outcome, billed)

    async def pause(self, seconds: float) -> None:
        await self.actor.pause.remote(seconds)

    async def stats(self) -> GovernorStats:
        return await self.actor.stats.remote()  # type: ignore[no-any-return]


class CloudActor:
    """Asks the cloud about each image of a block, all at once as far as the governor allows. Needs no CPU of its own."""

    def __init__(self, config: PipelineConfig, url: str, journal: str, governor: Any) -> None:
        self.config = config
        self.client = CloudClient(config.cloud, config.classes, url, Journal.open(journal), RemoteGovernor(governor))
        self.places = asyncio.Semaphore(config.cloud.in_flight)  # more callers would only keep the governor busy
        self.stopped: str | None = None
        self.seen, self.failed = 0, 0

    async def __call__(self, batch: pa.Table) -> pa.Table:
        rows = await asyncio.gather(*(self._row(row["image_id"], row["uri"]) for row in batch.to_pylist()))
        return pa.Table.from_pylist(list(rows), schema=RAW)

    async def _row(self, image_id: str, uri: str) -> dict[str, Any]:
        if self.stopped is not None:
            return _raw_row(image_id, b"", Answer("error", None, error=self.stopped), status=STOPPED)
        data = b""
        try:
            data = await asyncio.to_thread(storage.read_bytes, uri)
            image = await asyncio.to_thread(canonical_image, data, self.config.cloud.max_side)
            async with self.places:
                answer = await self.client.answer(image)
        except (InputError, FileNotFoundError) as error:
            answer = Answer("error", None, error=f"{type(error).__name__}: {error}")
        except CloudError as error:
            return self._stop(image_id, error)
        self.seen, self.failed = self.seen + 1, self.failed + (answer.status == "error")
        if self.seen >= ERROR_CHECK_FROM and self.failed > self.config.cloud.max_error_share * self.seen:
            share = f"{self.failed} of {self.seen} images failed, more than cloud.max_error_share; the last: {answer.error}"
            return self._stop(image_id, errors.CloudError(share))
        return _raw_row(image_id, data, answer)

    def _stop(self, image_id: str, error: CloudError) -> dict[str, Any]:
        self.stopped = self.stopped or json.dumps({"type": type(error).__name__, "message": str(error)})
        return _raw_row(image_id, b"", Answer("error", None, error=self.stopped), status=STOPPED)


def _raw_row(image_id: str, data: bytes, answer: Answer, status: str | None = None) -> dict[str, Any]:
    raw = answer.raw
    return {
        "image_id": image_id,
        "bytes": data,
        "boxes": [] if raw is None else raw.boxes.tolist(),
        "class_scores": [] if raw is None else raw.class_scores.tolist(),
        "status": status or answer.status,
        "attempts": answer.attempts,
        "latency_ms": answer.latency_ms,
        "cost_usd": answer.cost_usd,
        "calls": answer.calls,
        "error": answer.error,
    }
