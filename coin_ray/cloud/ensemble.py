"""Several clouds as one: their boxes fused, the first that can be reached, or a second
opinion where CLIP contradicts the first.

Each cloud has its own client, with its governor, budget and keys in the journal.
Imports no torch.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from coin_ray.cloud.answer import Answer
from coin_ray.cloud.answer_fusion import fuse_answers, score_labels
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import AsyncGovernor
from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.protocol import RawDetections
from coin_ray.cloud.question_client import QuestionClient, create_cloud_client
from coin_ray.cloud.renderings import render_image
from coin_ray.config import PLAIN_RENDERING, Cloud, Ensemble, PipelineConfig
from coin_ray.data.canonical import CanonicalImage
from coin_ray.data.pixels import IntensityRange
from coin_ray.errors import (
    BudgetExhausted,
    CloudError,
    CloudUnreachable,
    QuotaExhausted,
)

SKIPPED_ERRORS: Mapping[str, type[CloudError]] = {
    "skipped_budget": BudgetExhausted,
    "skipped_quota": QuotaExhausted,
}
"""The error that stops the run when no other cloud can be asked, by the status of the
answer."""


def clip_contradicts(
    scores: NDArray[np.float32],
    labels: NDArray[np.int64],
    clip_probs: NDArray[np.float32],
    ensemble: Ensemble,
) -> bool:
    """Return whether CLIP disagrees with the cloud's labels in too many boxes of an
    image: scores [N], labels [N], clip_probs [N, K+1].
    """
    counted = scores >= ensemble.doubt_score_min
    if not counted.any():
        return False
    disagrees = clip_probs[counted].argmax(1) != labels[counted]
    return bool(disagrees.mean() > ensemble.doubt_share)


def cloud_names(clouds: Sequence[Cloud]) -> tuple[str, ...]:
    """Return a name for each cloud: its service and its rendering, numbered where
    several are equal.
    """
    names = [_unnumbered_name(cloud) for cloud in clouds]
    totals = Counter(names)
    numbers: Counter[str] = Counter()
    unique_names = []
    for name in names:
        numbers[name] += 1
        is_unique = totals[name] == 1
        unique_names.append(name if is_unique else f"{name} {numbers[name]}")
    return tuple(unique_names)


def _unnumbered_name(cloud: Cloud) -> str:
    if cloud.views == (PLAIN_RENDERING,) or len(cloud.views) > 1:
        return cloud.service
    return f"{cloud.service} {cloud.views[0]}"


class EnsembleClient:
    """``CloudClient.answer`` for several clouds. Use inside one event loop, and
    ``aclose`` at the end.

    An image is an error only if no cloud that was asked answered. An error that stops
    the run does so whichever cloud raised it; an unreachable cloud stops it only if no
    other one answers, and so does a spent budget or quota in ``failover``. ``clients``
    are created with ``skip_unreachable``, and for ``failover`` with
    ``skip_over_budget``.
    """

    def __init__(
        self,
        clients: Sequence[CloudClient | QuestionClient],
        names: Sequence[str],
        ensemble: Ensemble,
    ) -> None:
        self.clients = tuple(clients)
        self._names = tuple(names)
        self._reliability = ensemble.reliability or (1.0,) * len(self.clients)
        self._ensemble = ensemble

    async def aclose(self) -> None:
        """Close the connections of all clients."""
        await asyncio.gather(*(client.aclose() for client in self.clients))

    async def check(self) -> None:
        """Check each service as ``CloudClient.check``; for ``failover`` one that can be
        reached is enough.
        """
        errors = await asyncio.gather(
            *(client.check() for client in self.clients), return_exceptions=True
        )
        problems = [error for error in errors if error is not None]
        can_fail_over = self._ensemble.mode == "failover" and len(problems) < len(
            self.clients
        )
        for problem in problems:
            is_skippable = isinstance(problem, (CloudUnreachable, QuotaExhausted))
            if not (can_fail_over and is_skippable):
                raise problem

    async def answer(self, *images: CanonicalImage) -> Answer:
        """Return one answer about an image; ``images``: it as each cloud gets it, or
        one for all.
        """
        renderings = self._one_for_each(images)
        if self._ensemble.mode == "failover":
            return await self._ask_in_order(renderings)
        count = 1 if self._ensemble.mode == "cascade" else len(self.clients)
        return await self._ask_first(count, renderings)

    async def second_opinion(self, *images: CanonicalImage) -> Answer:
        """Return the answers of all clouds, fused; the first one's is in the journal by
        now.
        """
        return await self._ask_first(len(self.clients), self._one_for_each(images))

    def _one_for_each(
        self, images: Sequence[CanonicalImage]
    ) -> Sequence[CanonicalImage]:
        return images if len(images) > 1 else list(images) * len(self.clients)

    async def _ask_first(self, count: int, images: Sequence[CanonicalImage]) -> Answer:
        """Ask the first ``count`` clouds at once. An error that stops the run is raised
        when the others have finished: their calls may be paid.
        """
        replies = await asyncio.gather(
            *(self.clients[i].answer(images[i]) for i in range(count)),
            return_exceptions=True,
        )
        answers = []
        for cloud, reply in enumerate(replies):
            if isinstance(reply, BaseException):
                raise reply
            answers.append((cloud, reply))
        return self._combine(answers)

    async def _ask_in_order(self, images: Sequence[CanonicalImage]) -> Answer:
        """Return the first answer, one in the journal before all others. Open breakers
        are waited for only if no other cloud answers; spent clouds are skipped.
        """
        for cloud, client in enumerate(self.clients):
            recorded = await client.recorded_answer(images[cloud])
            if recorded is not None:
                return self._combine([(cloud, recorded)])
        tried: list[tuple[int, Answer]] = []
        for wait_for_breaker in (False, True):
            for cloud, client in enumerate(self.clients):
                answer = await client.answer(
                    images[cloud], wait_for_breaker=wait_for_breaker
                )
                tried.append((cloud, answer))
                if answer.raw is not None:
                    return self._combine(tried)
            statuses = {answer.status for _, answer in tried}
            if "error" in statuses or "unreachable" not in statuses:
                break
        return self._combine(tried)

    def _combine(self, answers: Sequence[tuple[int, Answer]]) -> Answer:
        """Return one answer with the calls and costs of all; ``answers``: each with the
        number of its cloud.

        If no cloud could be asked, raises the error of the last one that is spent or,
        if none is, ``CloudUnreachable``.
        """
        detected = [
            (cloud, answer.raw) for cloud, answer in answers if answer.raw is not None
        ]
        problems = self._describe_problems(answers)
        totals: dict[str, Any] = {
            "attempts": sum(answer.attempts for _, answer in answers),
            "latency_ms": max(answer.latency_ms for _, answer in answers),
            "cost_usd": sum(answer.cost_usd for _, answer in answers),
            "calls": sum(answer.calls for _, answer in answers),
            "error": problems or None,
            "teachers": tuple(self._names[cloud] for cloud, _ in detected),
        }
        if detected:
            raw = self._fuse(detected)
            is_cached = all(
                answer.status == "cached"
                for _, answer in answers
                if answer.raw is not None
            )
            if is_cached:
                return Answer("cached", raw, **totals)
            return Answer("ok" if len(raw) else "empty", raw, **totals)
        if any(answer.status == "error" for _, answer in answers):
            return Answer("error", None, **totals)
        skipped = [
            SKIPPED_ERRORS[answer.status]
            for _, answer in answers
            if answer.status in SKIPPED_ERRORS
        ]
        error_type = skipped[-1] if skipped else CloudUnreachable
        raise error_type(problems)

    def _describe_problems(self, answers: Sequence[tuple[int, Answer]]) -> str:
        """Return the last error of each cloud; empty if its last answer had none."""
        last_errors = {self._names[cloud]: answer.error for cloud, answer in answers}
        return "; ".join(
            f"{name}: {error}" for name, error in last_errors.items() if error
        )

    def _fuse(self, detected: Sequence[tuple[int, RawDetections]]) -> RawDetections:
        if len(detected) == 1:
            return detected[0][1]
        answers = [
            score_labels(raw, self.clients[cloud].prior) for cloud, raw in detected
        ]
        reliability = [self._reliability[cloud] for cloud, _ in detected]
        return fuse_answers(answers, reliability, self._ensemble.iou)


Client = CloudClient | QuestionClient | EnsembleClient


def create_client(
    config: PipelineConfig,
    urls: Sequence[str],
    journal: Journal,
    governors: Sequence[AsyncGovernor],
) -> Client:
    """Return the client of a configuration's cloud or clouds; ``urls`` and
    ``governors`` in the order of ``config.clouds``.
    """
    if len(config.clouds) == 1:
        return create_cloud_client(
            config, config.clouds[0], urls[0], journal, governors[0]
        )
    clients = [
        create_cloud_client(
            config,
            cloud,
            url,
            journal,
            governor,
            skip_unreachable=True,
            skip_over_budget=config.ensemble.mode == "failover",
        )
        for cloud, url, governor in zip(config.clouds, urls, governors, strict=True)
    ]
    return EnsembleClient(clients, cloud_names(config.clouds), config.ensemble)


def render_for_clouds(
    client: Client,
    image_file: bytes,
    intensity_range: IntensityRange | None = None,
    inspected_id: str = "",
) -> list[CanonicalImage]:
    """Return a file's image as each cloud gets it if it is asked alone, so that its
    answers are found again whichever others are asked. ``intensity_range``: of a run's
    deep grey images; ``inspected_id``: as in ``canonical_image``. Raises
    ``InputError``.
    """
    clients = client.clients if isinstance(client, EnsembleClient) else (client,)
    renderings = [member.rendering for member in clients]
    images = {
        (max_side, rendering): render_image(
            image_file, max_side, rendering, intensity_range, inspected_id
        )
        for max_side, rendering in set(renderings)
    }
    return [images[rendering] for rendering in renderings]
