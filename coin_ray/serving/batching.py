"""Images of several requests as batches for one detector, in a thread beside the event
loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from PIL import Image

from coin_ray.predictors.scored_boxes import ScoredBoxes
from coin_ray.serving.detectors import BatchDetector, ServedDetector

BATCH_WAIT = 0.01
FAILURES_MAX = 5
SMOOTHING = 0.2


@dataclass(eq=False)
class _QueuedImage:
    image: Image.Image
    detector: ServedDetector
    classes: tuple[str, ...]
    score_min: float
    future: asyncio.Future[ScoredBoxes]
    queued_at: float

    def can_share_batch(self, other: _QueuedImage) -> bool:
        return (
            self.detector is other.detector
            and self.classes == other.classes
            and self.score_min == other.score_min
        )


class BatchQueue:
    """Images wait here for the detector; those with the same classes and threshold go
    to it together, at most ``batch_max`` of them.

    A single image runs at once. A partial batch waits up to ``batch_wait`` seconds for
    more, counted from the arrival of its first image. A detector that is no
    ``BatchDetector`` gets one image at a time. ``detector`` may be replaced at any
    time: images queued earlier are answered by the detector of that time.
    """

    def __init__(
        self, detector: ServedDetector, batch_wait: float = BATCH_WAIT
    ) -> None:
        self.detector = detector
        self.on_batch: Callable[[int, float], None] = lambda _images, _seconds: None
        """Called after each batch with the number of its images and the seconds it
        took."""
        self._batch_wait = batch_wait
        self._queued: deque[_QueuedImage] = deque()
        self._worker = ThreadPoolExecutor(1)
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self.in_detector = 0
        """Images that the detector is working on."""
        self.seconds_per_image = 0.0
        """Smoothed over the last batches."""

    @property
    def healthy(self) -> bool:
        """Whether the detector has succeeded on one of the last five images."""
        return self._failures < FAILURES_MAX

    def replace(self, detector: ServedDetector) -> None:
        """Use ``detector`` from now on; failures of the previous one don't count."""
        self.detector, self._failures = detector, 0

    async def detect(
        self,
        image: Image.Image,
        classes: tuple[str, ...],
        score_min: float,
        detector: ServedDetector | None = None,
    ) -> ScoredBoxes:
        """Return boxes [N, 4] and scores [N, len(classes)] of ``detector``, by default
        the current one; raises what the detector raises.
        """
        future: asyncio.Future[ScoredBoxes] = asyncio.get_running_loop().create_future()
        queued = _QueuedImage(
            image,
            detector or self.detector,
            classes,
            score_min,
            future,
            time.monotonic(),
        )
        self._queued.append(queued)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run_batches())
        try:
            return await future
        finally:
            if queued in self._queued:
                self._queued.remove(queued)

    async def _run_batches(self) -> None:
        while self._queued:
            first = self._queued[0]
            seconds_left = first.queued_at + self._batch_wait - time.monotonic()
            is_partial = 1 < len(self._queued) < _batch_max(first.detector)
            if is_partial and seconds_left > 0:
                await asyncio.sleep(seconds_left)
            batch = self._pop_batch()
            if batch:
                await self._run_batch(batch)

    def _pop_batch(self) -> list[_QueuedImage]:
        """Remove from the queue and return its first image and the next ones that can
        share a batch with it.
        """
        first = self._queued[0]
        compatible = [
            queued for queued in self._queued if queued.can_share_batch(first)
        ]
        batch = compatible[: _batch_max(first.detector)]
        for queued in batch:
            self._queued.remove(queued)
        return batch

    async def _run_batch(self, batch: list[_QueuedImage]) -> None:
        loop = asyncio.get_running_loop()
        started = time.monotonic()
        self.in_detector = len(batch)
        try:
            answers = await loop.run_in_executor(self._worker, _detect_or_errors, batch)
        finally:
            self.in_detector = 0
        self._record_batch(len(batch), time.monotonic() - started)
        for queued, answer in zip(batch, answers, strict=True):
            self._count_failure(queued, answer)
            if queued.future.done():
                continue
            if isinstance(answer, Exception):
                queued.future.set_exception(answer)
            else:
                queued.future.set_result(answer)

    def _record_batch(self, images: int, seconds: float) -> None:
        self.on_batch(images, seconds)
        smoothing = SMOOTHING if self.seconds_per_image else 1.0
        change = seconds / images - self.seconds_per_image
        self.seconds_per_image += smoothing * change

    def _count_failure(
        self, queued: _QueuedImage, answer: ScoredBoxes | Exception
    ) -> None:
        """Count consecutive failures of the current detector; a success resets them."""
        if queued.detector is not self.detector:
            return
        failed = isinstance(answer, Exception)
        self._failures = self._failures + 1 if failed else 0


def _detect_or_errors(batch: list[_QueuedImage]) -> list[ScoredBoxes | Exception]:
    """Return an answer or an error for each image. The images of a batch that fails are
    tried one by one, so that one of them does not fail the others.
    """
    try:
        return list(_detect(batch))
    except Exception as error:
        if len(batch) == 1:
            return [error]
        return [_detect_or_errors([queued])[0] for queued in batch]


def _detect(batch: list[_QueuedImage]) -> list[ScoredBoxes]:
    images = [queued.image for queued in batch]
    detector, classes = batch[0].detector, batch[0].classes
    score_min = batch[0].score_min
    if isinstance(detector, BatchDetector) and len(batch) > 1:
        answers = detector.detect_batch(images, classes, score_min)
        if len(answers) != len(batch):
            raise RuntimeError(
                f"{detector.name} answered {len(answers)} of {len(batch)} images"
            )
        return answers
    return [detector.detect(image, classes, score_min) for image in images]


def _batch_max(detector: ServedDetector) -> int:
    return detector.batch_max if isinstance(detector, BatchDetector) else 1
