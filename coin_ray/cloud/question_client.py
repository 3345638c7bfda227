"""Asks a service all questions about an image, and combines their answers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from coin_ray.cloud.answer import Answer
from coin_ray.cloud.class_questions import ClassQuestion, merge_answers, plan_questions
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import AsyncGovernor
from coin_ray.cloud.journal.base import Journal
from coin_ray.cloud.label_map import Prior
from coin_ray.cloud.services import adapter_for
from coin_ray.config import Cloud, PipelineConfig
from coin_ray.data.canonical import CanonicalImage


class QuestionClient:
    """``CloudClient`` for a service that is asked several questions about an image. It
    has no answer where one of its questions has none.
    """

    def __init__(
        self,
        clients: Sequence[CloudClient],
        questions: Sequence[ClassQuestion],
        num_classes: int,
    ) -> None:
        self.clients = tuple(clients)
        self._questions = tuple(questions)
        self._num_classes = num_classes

    async def aclose(self) -> None:
        """Close the connections."""
        await asyncio.gather(*(client.aclose() for client in self.clients))

    @property
    def max_side(self) -> int:
        """Return the longest side in pixels of the images that are sent."""
        return self.clients[0].max_side

    @property
    def rendering(self) -> tuple[int, str]:
        """Return the arguments of ``render_image`` after the file."""
        return self.clients[0].rendering

    @property
    def prior(self) -> Prior:
        """Return what is known of the service's labels."""
        prior = self.clients[0].prior
        if prior.precision:
            return Prior(precision=(prior.precision[0],) * self._num_classes)
        return prior

    async def check(self) -> None:
        """Ask for the service's health, as ``CloudClient.check``."""
        await self.clients[0].check()

    async def answer(
        self, image: CanonicalImage, *, wait_for_breaker: bool = True
    ) -> Answer:
        """Return the service's detections of the classes. Negatives are asked for only
        where something was found.
        """
        answers: list[Answer] = []
        for is_negative in (False, True):
            if is_negative and not _has_boxes(answers):
                break
            replies = await asyncio.gather(
                *(
                    client.answer(image, wait_for_breaker=wait_for_breaker)
                    for client, question in zip(
                        self.clients, self._questions, strict=True
                    )
                    if question.is_negative == is_negative
                ),
                return_exceptions=True,
            )
            for reply in replies:
                if isinstance(reply, BaseException):
                    raise reply
                answers.append(reply)
        return self._combine(answers)

    async def recorded_answer(self, image: CanonicalImage) -> Answer | None:
        """Return the answer in the journal, if all questions have one."""
        answers: list[Answer] = []
        for client, question in zip(self.clients, self._questions, strict=True):
            if question.is_negative and not _has_boxes(answers):
                break
            recorded = await client.recorded_answer(image)
            if recorded is None:
                return None
            answers.append(recorded)
        return self._combine(answers)

    def _combine(self, answers: Sequence[Answer]) -> Answer:
        totals: dict[str, Any] = {
            "attempts": sum(answer.attempts for answer in answers),
            "latency_ms": max(answer.latency_ms for answer in answers),
            "cost_usd": sum(answer.cost_usd for answer in answers),
            "calls": sum(answer.calls for answer in answers),
        }
        for answer in answers:
            if answer.raw is None:
                return Answer(answer.status, None, error=answer.error, **totals)
        questions = self._questions[: len(answers)]
        raws = [answer.raw for answer in answers if answer.raw is not None]
        raw = merge_answers(questions, raws, self._num_classes)
        if all(answer.status == "cached" for answer in answers):
            return Answer("cached", raw, **totals)
        return Answer("ok" if len(raw) else "empty", raw, **totals)


def _has_boxes(answers: Sequence[Answer]) -> bool:
    return any(answer.raw is None or len(answer.raw) for answer in answers)


def questions_for(config: PipelineConfig, cloud: Cloud) -> list[ClassQuestion]:
    """Return the questions that a cloud is asked about each image."""
    return plan_questions(
        config.classes,
        config.class_prompts,
        adapter_for(cloud).capabilities,
        has_label_map=cloud.label_map is not None,
    )


def question_clients(
    config: PipelineConfig,
    cloud: Cloud,
    url: str,
    journal: Journal,
    governor: AsyncGovernor,
    **options: Any,
) -> list[CloudClient]:
    """Return a client for each question; ``options``: further arguments of
    ``CloudClient``.
    """
    return [
        CloudClient(
            cloud,
            question.phrases,
            url,
            journal,
            governor,
            descriptions=question.descriptions,
            **options,
        )
        for question in questions_for(config, cloud)
    ]


def create_cloud_client(
    config: PipelineConfig,
    cloud: Cloud,
    url: str,
    journal: Journal,
    governor: AsyncGovernor,
    **options: Any,
) -> CloudClient | QuestionClient:
    """Return the client of one cloud of a configuration; ``options``: further arguments
    of ``CloudClient``.
    """
    questions = questions_for(config, cloud)
    clients = question_clients(config, cloud, url, journal, governor, **options)
    if len(questions) == 1 and questions[0].phrases == config.classes:
        return clients[0]
    return QuestionClient(clients, questions, len(config.classes))
