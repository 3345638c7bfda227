"""Answers images by the batch endpoints of the clouds before the collection's stream,
which then finds their answers in the journal.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from coin_ray import storage
from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.batch.batch_pass import BatchCounts, BatchPass
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.keys import BATCH
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.question_client import question_clients, questions_for
from coin_ray.cloud.renderings import render_image
from coin_ray.config import Cloud, PipelineConfig
from coin_ray.config.cloud import LANGUAGE_MODELS
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import InputError
from coin_ray.stages.collecting.cloud_actor import journal_uri


class RenderedImages:
    """Images as a cloud gets them, read anew each time they are iterated. Files that
    can't be used are left out: the stream names them.
    """

    def __init__(
        self, uris: Sequence[str], client: CloudClient, config: PipelineConfig
    ) -> None:
        self._uris = uris
        self._rendering = client.rendering
        self._intensity_range = config.intensity_range

    def __iter__(self) -> Iterator[CanonicalImage]:
        for uri in self._uris:
            image = self.read(uri)
            if image is not None:
                yield image

    def read(self, uri: str) -> CanonicalImage | None:
        """Return one image; None if it can't be used."""
        try:
            file = storage.read_bytes(uri)
            return render_image(file, *self._rendering, self._intensity_range)
        except (InputError, FileNotFoundError):
            return None


def answer_by_batches(
    config: PipelineConfig,
    clouds: Sequence[tuple[Cloud, str]],
    uris: Sequence[str],
    root: str,
    run: str,
) -> None:
    """Wait until the jobs of these clouds and addresses have answered the images, and
    those of earlier runs.

    A run that is stopped leaves its jobs to the next, or cancels them
    (``cloud.batch_on_stop``). Raises the ``CloudError`` that stops a run.
    """
    journal = open_journal(journal_uri(root))
    has_jobs = any(key.endswith(BATCH) for key in journal.keys())  # noqa: SIM118
    journal.close()
    asked = [
        (cloud, url)
        for cloud, url in clouds
        if cloud.batch or (has_jobs and cloud.service in LANGUAGE_MODELS)
    ]
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        for cloud, url in asked:
            waiting = pool.submit(
                asyncio.run, _answer(config, cloud, url, uris, root, run, stop)
            )
            try:
                waiting.result()
            except BaseException:
                stop.set()
                raise


async def _answer(
    config: PipelineConfig,
    cloud: Cloud,
    url: str,
    uris: Sequence[str],
    root: str,
    run: str,
    stop: threading.Event,
) -> None:
    """Answer the images by one cloud, its negatives only where something was found."""
    journal = open_journal(journal_uri(root), run)
    governor = LocalGovernor(Governor(governor_limits(cloud)))  # makes no single call
    clients = question_clients(config, cloud, url, journal, governor)
    questions = questions_for(config, cloud)
    try:
        for client, question in zip(clients, questions, strict=True):
            asked = uris
            if question.is_negative:
                asked = await _with_boxes(config, clients, uris)
            images = RenderedImages(asked, client, config)
            if cloud.batch:
                print(
                    f"collect: {cloud.service} answers by batches, within a day; Ctrl-C"
                    " ends the wait, the same command continues it",
                    flush=True,
                )
            _print_counts(cloud, await BatchPass(client, stop).run(images))
    finally:
        await asyncio.gather(*(client.aclose() for client in clients))
        journal.close()


async def _with_boxes(
    config: PipelineConfig, clients: Sequence[CloudClient], uris: Sequence[str]
) -> list[str]:
    """Return the images in which a question on record has found something."""
    images = RenderedImages(uris, clients[0], config)
    found = []
    for uri in uris:
        image = images.read(uri)
        if image is None:
            continue
        for client in clients:
            recorded = await client.recorded_answer(image)
            if recorded is not None and recorded.raw is not None and len(recorded.raw):
                found.append(uri)
                break
    return found


def _print_counts(cloud: Cloud, counts: BatchCounts) -> None:
    if not counts.answered and not counts.failed:
        return
    reasons = sorted(counts.reasons.items(), key=lambda item: -item[1])
    details = f" ({reasons[0][0]}: {reasons[0][1]})" if reasons else ""
    print(
        f"collect: batches of {cloud.service} answered {counts.answered} images,"
        f" {counts.failed} without an answer{details}",
        flush=True,
    )
