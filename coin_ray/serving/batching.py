"""Questions of several calls as batches for one detector, in a thread beside the event
loop.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from PIL import Image

from coin_ray.predictors.onnx_detectors import Detector, Floats

Found = tuple[Floats, Floats]

BATCH_WAIT = 0.01
FAILURES_MAX = 5
SMOOTHING = 0.2


@runtime_checkable
class BatchDetector(Detector, Protocol):
    """A detector that takes several images at once and says itself which classes it can
    be asked about.
    """

    @property
    def batch_max(self) -> int: ...

    def check(self, classes: Sequence[str]) -> None:
        """Raises InputError if it can't be asked about ``classes``, with the reason."""

    def detect_batch(
        self, images: Sequence[Image.Image], classes: Sequence[str], score_min: float
    ) -> list[Found]:
        """``detect`` for each image: the same answers, only sooner."""


@dataclass(eq=False)
class _Entry:
    image: Image.Image
    question: tuple[Detector, tuple[str, ...], float]
    future: asyncio.Future[Found]
    since: float


class BatchQueue:
    """Images wait here for the detector; those with the same question go to it
    together, at most ``batch_max`` of them.

    An image that waits alone goes at once. If several wait and they are fewer than a
    batch, they wait for others at most ``batch_wait`` seconds, counted from the first
    one's arrival. A detector that is no ``BatchDetector`` gets one at a time.
    ``detector`` may be replaced at any time: who asked before is answered by the one
    that was there when it asked.
    """

    def __init__(self, detector: Detector, batch_wait: float = BATCH_WAIT) -> None:
        self.detector = detector
        self.on_batch: Callable[[int, float], None] = lambda _images, _seconds: None
        """Called after each batch with the number of its images and the seconds it
        took."""
        self._batch_wait = batch_wait
        self._entries: deque[_Entry] = deque()
        self._worker = ThreadPoolExecutor(1)
        self._task: asyncio.Task[None] | None = None
        self._failures = 0
        self.under_way = 0
        """Images that the detector has now."""
        self.seconds_each = 0.0
        """Seconds per image, smoothed over the last batches."""

    @property
    def healthy(self) -> bool:
        """Whether the detector has answered one of the last five images."""
        return self._failures < FAILURES_MAX

    def replace(self, detector: Detector) -> None:
        """Calls from now on are for ``detector``; earlier failures are not its."""
        self.detector, self._failures = detector, 0

    async def detect(
        self,
        image: Image.Image,
        classes: tuple[str, ...],
        score_min: float,
        detector: Detector | None = None,
    ) -> Found:
        """Boxes [N, 4] and scores [N, len(classes)] of ``detector``, by default the
        present one; raises what the detector raises.
        """
        question = (detector or self.detector, classes, score_min)
        entry = _Entry(
            image,
            question,
            asyncio.get_running_loop().create_future(),
            time.monotonic(),
        )
        self._entries.append(entry)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain())
        try:
            return await entry.future
        finally:
            if entry in self._entries:
                self._entries.remove(entry)

    async def _drain(self) -> None:
        while self._entries:
            wait = self._entries[0].since + self._batch_wait - time.monotonic()
            if (
                1 < len(self._entries) < _batch_max(self._entries[0].question[0])
                and wait > 0
            ):
                await asyncio.sleep(wait)
            batch = self._taken()
            if batch:
                await self._answer(batch)

    def _taken(self) -> list[_Entry]:
        """The first entry and the next ones with its question, out of the queue."""
        first = self._entries[0].question
        batch = [
            e
            for e in self._entries
            if e.question[0] is first[0] and e.question[1:] == first[1:]
        ][: _batch_max(first[0])]
        for entry in batch:
            self._entries.remove(entry)
        return batch

    async def _answer(self, batch: list[_Entry]) -> None:
        started = time.monotonic()
        self.under_way = len(batch)
        try:
            results = await asyncio.get_running_loop().run_in_executor(
                self._worker, self._results, batch
            )
        finally:
            self.under_way = 0
        seconds = time.monotonic() - started
        self.on_batch(len(batch), seconds)
        each = seconds / len(batch)
        self.seconds_each += (each - self.seconds_each) * (
            SMOOTHING if self.seconds_each else 1.0
        )
        for entry, result in zip(batch, results, strict=True):
            if entry.question[0] is self.detector:
                self._failures = (
                    self._failures + 1 if isinstance(result, Exception) else 0
                )
            if entry.future.done():
                continue
            if isinstance(result, Exception):
                entry.future.set_exception(result)
            else:
                entry.future.set_result(result)

    def _results(self, batch: list[_Entry]) -> list[Found | Exception]:
        """An answer or an error for each. The images of a batch that fails are tried
        one by one: the others must not fail with one.
        """
        try:
            return list(self._found(batch))
        except Exception as error:
            return (
                [error]
                if len(batch) == 1
                else [self._results([entry])[0] for entry in batch]
            )

    def _found(self, batch: list[_Entry]) -> list[Found]:
        detector, classes, score_min = batch[0].question
        if isinstance(detector, BatchDetector) and len(batch) > 1:
            found = detector.detect_batch([e.image for e in batch], classes, score_min)
            if len(found) != len(batch):
                raise RuntimeError(
                    f"{detector.name} answered {len(found)} of {len(batch)} images"
                )
            return found
        return [detector.detect(e.image, classes, score_min) for e in batch]


def _batch_max(detector: Detector) -> int:
    return detector.batch_max if isinstance(detector, BatchDetector) else 1
