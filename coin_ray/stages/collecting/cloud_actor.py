"""The first half of collection: the actor that asks the clouds about each image and
converts their answers to columns of detections.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import pyarrow as pa
import ray
from ray.actor import ActorHandle

from coin_ray import errors, storage
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.detections import AnswerConverter, detection_columns
from coin_ray.cloud.ensemble import EnsembleClient, create_client, render_for_clouds
from coin_ray.cloud.governor import AsyncGovernor
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.protocol import RawDetections
from coin_ray.cloud.shared_governor import error_as_json
from coin_ray.config import PipelineConfig
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import CloudError, InputError
from coin_ray.stages.collecting.governor_actor import (
    RunState,
    Tally,
    remote_governors,
)
from coin_ray.stages.collecting.governors import governors_for
from coin_ray.stages.collecting.parts import PART_SCHEMA

STOPPED = "stopped"
"""The status of an image that was not asked about because an error ends the run."""
ANSWER_SCHEMA = pa.schema(
    [field for field in PART_SCHEMA if field.name != "clip_probs"]
)
ANSWER_SCHEMA = ANSWER_SCHEMA.append(pa.field("bytes", pa.binary()))
ANSWER_SCHEMA = ANSWER_SCHEMA.append(pa.field("box_counts", pa.string()))
"""Rows of a part before CLIP has labelled them, with the image's file and, as JSON, the
counts of boxes that are not used as the service wrote them (``BoxCounts``)."""
ERROR_CHECK_FROM = 50
"""Answers from which on the share of errors may end the run."""
THREADS = 32
IMAGES_PER_CALL = 2
"""Images in memory for every call under way: some are prepared, others wait until their
answer is on the disk, and no call waits for an image."""


Ask = Callable[..., Awaitable[Answer]]
"""A client's method that gets the image as each cloud gets it."""


@dataclass(frozen=True, slots=True)
class AnsweredImage:
    """An image's file, if CLIP will label it, and the cloud's answer. ``stopped``: it
    was not asked about, and the answer's error ends the run.
    """

    image_id: str
    file: bytes
    answer: Answer
    stopped: bool = False


def journal_uri(root: str) -> str:
    """Return where a run keeps its answers: beside the steps, so that no changed setting
    and no deleted step loses a paid one.
    """
    return storage.join(root, "journal")


class CloudActor:
    """Asks the cloud (or the clouds) about each image of a block, all at once as far as
    the governors allow. Needs no CPU of its own.

    ``second``: ask for the second opinion of a cascade; ``run``: name under which the
    journal records calls; ``governor``: a ``GovernorActor`` that sees the calls of all
    cloud actors. A single actor has governors of its own.
    """

    def __init__(
        self,
        config: PipelineConfig,
        urls: Sequence[str],
        journal: str,
        second: bool = False,
        run: str = "",
        governor: ActorHandle | None = None,
    ) -> None:
        self.config = config
        storage.set_patience(config.storage.patience)
        self.converter = AnswerConverter(config)
        answers = open_journal(journal, run)
        self.worker = uuid.uuid4().hex
        self.governor = governor
        governors: Sequence[AsyncGovernor]
        if governor is None:
            governors = governors_for(config, urls, answers)
        else:
            actor_id = ray.get_runtime_context().get_actor_id()
            ray.get(governor.register.remote(actor_id, self.worker))
            governors = remote_governors(governor, len(config.clouds), self.worker)
        self.client = create_client(config, urls, answers, governors)
        if second and isinstance(self.client, EnsembleClient):
            self.ask: Ask = self.client.second_opinion
        else:
            self.ask = self.client.answer
        most_calls = max(cloud.in_flight for cloud in config.clouds)
        self.image_slots = asyncio.Semaphore(IMAGES_PER_CALL * most_calls + 1)
        self.threads: ThreadPoolExecutor | None = None
        self.stop_error: str | None = None
        """The error that ends the run, as JSON."""
        self.answer_count = 0
        self.failure_count = 0
        self.others = Tally()
        """Images of the other cloud actors, as far as this one has heard."""

    async def __call__(self, batch: pa.Table) -> pa.Table:
        """Return ``ANSWER_SCHEMA`` of the images (``image_id``, ``uri``)."""
        # asyncio's default is too few where files and journal are on an object store
        if self.threads is None:
            self.threads = ThreadPoolExecutor(THREADS)
            asyncio.get_running_loop().set_default_executor(self.threads)
        rows = batch.to_pylist()
        images = await asyncio.gather(
            *(self._ask_about(row["image_id"], row["uri"]) for row in rows)
        )
        await self._update_run_state()
        return await asyncio.to_thread(answer_table, images, self.converter)

    async def _update_run_state(self) -> None:
        """Tell the other actors how far this one has got, and hear of them."""
        if self.governor is None:
            return
        tally = Tally(self.answer_count, self.failure_count)
        with suppress(ray.exceptions.RayActorError):  # the next call says so
            state: RunState = await self.governor.update.remote(
                self.worker, tally, self.stop_error
            )
            self.others = state.others
            self.stop_error = self.stop_error or state.stop_error

    async def _ask_about(self, image_id: str, uri: str) -> AnsweredImage:
        file = b""
        try:
            async with self.image_slots:
                if self.stop_error is not None:
                    return _stopped_image(image_id, self.stop_error)
                file, renderings = await asyncio.to_thread(self._read, uri, image_id)
                if self.stop_error is not None:
                    return _stopped_image(image_id, self.stop_error)
                answer = await self.ask(*renderings)
        except (InputError, FileNotFoundError) as error:
            answer = Answer("error", None, error=f"{type(error).__name__}: {error}")
        except CloudError as error:
            return self._stop(image_id, error)
        self.answer_count += 1
        self.failure_count += answer.status == "error"
        answers = self.answer_count + self.others.answers
        failures = self.failure_count + self.others.failures
        allowed = self.config.cloud.max_error_share * answers
        if answers >= ERROR_CHECK_FROM and failures > allowed:
            message = (
                f"{failures} of {answers} images failed, more than"
                f" cloud.max_error_share; the last: {answer.error}"
            )
            return self._stop(image_id, errors.CloudError(message))
        return AnsweredImage(image_id, file, answer)

    def _read(self, uri: str, image_id: str) -> tuple[bytes, list[CanonicalImage]]:
        """Return the file, if CLIP will label the image, and the image as each cloud
        gets it.
        """
        file = storage.read_bytes(uri)
        renderings = render_for_clouds(
            self.client, file, self.config.intensity_range, inspected_id=image_id
        )
        return (b"" if self.config.collect.labeler == "none" else file), renderings

    def _stop(self, image_id: str, error: CloudError) -> AnsweredImage:
        """End the run with this error, unless another one ends it."""
        if self.stop_error is None:
            self.stop_error = error_as_json(error)
        return _stopped_image(image_id, self.stop_error)


def _stopped_image(image_id: str, error: str) -> AnsweredImage:
    return AnsweredImage(
        image_id, b"", Answer("error", None, error=error), stopped=True
    )


def answer_table(
    images: Sequence[AnsweredImage], converter: AnswerConverter
) -> pa.Table:
    """Return ``ANSWER_SCHEMA``: the answers converted to detections, duplicates merged."""
    answers = [image.answer for image in images]
    raw_answers = [answer.raw for answer in answers]
    score_kinds = [None if raw is None else raw.score_kind for raw in raw_answers]
    columns = detection_columns([converter.convert(answer) for answer in answers])
    columns |= {
        "image_id": [image.image_id for image in images],
        "source": [_source(answer.teachers) for answer in answers],
        "status": [
            STOPPED if image.stopped else image.answer.status for image in images
        ],
        "attempts": [answer.attempts for answer in answers],
        "latency_ms": [answer.latency_ms for answer in answers],
        "cost_usd": [answer.cost_usd for answer in answers],
        "error": [answer.error for answer in answers],
        "calls": [answer.calls for answer in answers],
        "score_kind": score_kinds,  # null without an answer
        # the clouds that answered; empty where there is only one
        "teachers": [list(answer.teachers) for answer in answers],
        "bytes": [image.file for image in images],
        "box_counts": [_box_counts_json(raw) for raw in raw_answers],
    }
    return pa.table(columns, schema=ANSWER_SCHEMA)


def _box_counts_json(raw: RawDetections | None) -> str | None:
    """Return the counts of an answer as JSON; None if all its boxes are used as they
    came.
    """
    if raw is None or not raw.counts.as_dict():
        return None
    return json.dumps(raw.counts.as_dict())


def _source(clouds: Sequence[str]) -> str:
    return f"cloud: {', '.join(clouds)}" if clouds else "cloud"
