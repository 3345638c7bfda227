"""The first half of collection: actors that ask the cloud about each image. Imports no
torch, so they start fast and stay small.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from coin_ray import errors, storage
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.client import account_name, governor_limits
from coin_ray.cloud.ensemble import EnsembleClient, create_client, render_for_clouds
from coin_ray.cloud.governor import DAY, Governor, LocalGovernor
from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.services import adapter_for
from coin_ray.config import Cloud, PipelineConfig, with_plain_rendering
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import CloudError, InputError

STOPPED = "stopped"
ANSWER_SCHEMA = pa.schema(
    [
        ("image_id", pa.string()),
        ("bytes", pa.binary()),
        ("boxes", pa.list_(pa.list_(pa.float32(), 4))),
        ("class_scores", pa.list_(pa.list_(pa.float32()))),
        ("score_kind", pa.string()),  # null without an answer
        ("status", pa.string()),
        ("attempts", pa.int32()),
        ("latency_ms", pa.float32()),
        ("cost_usd", pa.float64()),
        ("calls", pa.int32()),
        ("error", pa.string()),
        # the clouds that answered; empty where there is one
        ("teachers", pa.list_(pa.string())),
    ]
)
ERROR_CHECK_FROM = 50
THREADS = 32
PLACES = 2
"""Images at hand for every call under way: some are made ready, others wait for the
disk that keeps their answer, and no place waits for one."""


def journal_uri(root: str) -> str:
    """Answers are kept beside the steps: no changed setting and no deleted step loses a
    paid one.
    """
    return storage.join(root, "journal")


class CloudActor:
    """Asks the cloud (or the clouds) about each image of a block, all at once as far as
    the governors allow. Needs no CPU of its own.

    A run has one, so its governors are everybody's, and asking them costs nothing.
    ``second``: of a cascade, the second opinion.
    """

    def __init__(
        self,
        config: PipelineConfig,
        urls: Sequence[str],
        journal: str,
        second: bool = False,
    ) -> None:
        self.config = config
        answers = open_journal(journal)
        self.client = create_client(
            config, urls, answers, governors_for(config, urls, answers)
        )
        self.ask = (
            self.client.second_opinion
            if second and isinstance(self.client, EnsembleClient)
            else self.client.answer
        )
        self.places = asyncio.Semaphore(
            max(PLACES * cloud.in_flight + 1 for cloud in config.clouds)
        )
        self.threads: ThreadPoolExecutor | None = None
        self.stopped: str | None = None
        self.seen, self.failed = 0, 0

    async def __call__(self, batch: pa.Table) -> pa.Table:
        # Python's own are too few where files and journal are on an object store
        if self.threads is None:
            self.threads = ThreadPoolExecutor(THREADS)
            asyncio.get_running_loop().set_default_executor(self.threads)
        rows = await asyncio.gather(
            *(self._row(row["image_id"], row["uri"]) for row in batch.to_pylist())
        )
        return pa.Table.from_pylist(list(rows), schema=ANSWER_SCHEMA)

    async def _row(self, image_id: str, uri: str) -> dict[str, Any]:
        data = b""
        try:
            async with self.places:
                if self.stopped is not None:
                    return _raw_row(
                        image_id,
                        b"",
                        Answer("error", None, error=self.stopped),
                        status=STOPPED,
                    )
                data, images = await asyncio.to_thread(self._read, uri)
                answer = await self.ask(*images)
        except (InputError, FileNotFoundError) as error:
            answer = Answer("error", None, error=f"{type(error).__name__}: {error}")
        except CloudError as error:
            return self._stop(image_id, error)
        self.seen, self.failed = self.seen + 1, self.failed + (answer.status == "error")
        if (
            self.seen >= ERROR_CHECK_FROM
            and self.failed > self.config.cloud.max_error_share * self.seen
        ):
            share = (
                f"{self.failed} of {self.seen} images failed, more than"
                f" cloud.max_error_share; the last: {answer.error}"
            )
            return self._stop(image_id, errors.CloudError(share))
        return _raw_row(image_id, data, answer)

    def _read(self, uri: str) -> tuple[bytes, list[CanonicalImage]]:
        """The file, if CLIP will look at it, and the image as each cloud gets it."""
        data = storage.read_bytes(uri)
        return b"" if self.config.collect.labeler == "none" else data, render_for_clouds(
            self.client, data
        )

    def _stop(self, image_id: str, error: CloudError) -> dict[str, Any]:
        self.stopped = self.stopped or json.dumps(
            {"type": type(error).__name__, "message": str(error)}
        )
        return _raw_row(
            image_id, b"", Answer("error", None, error=self.stopped), status=STOPPED
        )


def governors_for(
    config: PipelineConfig, urls: Sequence[str], journal: Journal
) -> list[LocalGovernor]:
    """One for each cloud, that knows what it has cost and how often it was asked today;
    the views of one cloud share it.

    A single cloud's budget is the journal's.
    """
    now, governors = time.time(), dict[Cloud, LocalGovernor]()
    servers = [with_plain_rendering(cloud) for cloud in config.clouds]
    for cloud, url in dict(zip(servers, urls, strict=True)).items():
        account = account_name(cloud, url, adapter_for(cloud))
        spent = journal.spent(account if config.more_clouds else None)
        ages = (
            []
            if cloud.per_day is None
            else [now - start for start in journal.call_starts(account, now - DAY)]
        )
        governors[cloud] = LocalGovernor(Governor(governor_limits(cloud), spent, ages=ages))
    return [governors[cloud] for cloud in servers]


def _raw_row(
    image_id: str, data: bytes, answer: Answer, status: str | None = None
) -> dict[str, Any]:
    raw = answer.raw
    return {
        "image_id": image_id,
        "bytes": data,
        "boxes": [] if raw is None else raw.boxes.tolist(),
        "class_scores": [] if raw is None else raw.class_scores.tolist(),
        "score_kind": None if raw is None else raw.score_kind,
        "status": status or answer.status,
        "attempts": answer.attempts,
        "latency_ms": answer.latency_ms,
        "cost_usd": answer.cost_usd,
        "calls": answer.calls,
        "error": answer.error,
        "teachers": list(answer.teachers),
    }
