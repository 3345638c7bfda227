"""The answer of one or several clouds about one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from coin_ray.cloud.protocol import RawDetections

AnswerStatus = Literal[
    "ok", "cached", "empty", "error", "skipped_budget", "skipped_quota", "unreachable"
]


@dataclass(frozen=True, slots=True)
class Answer:
    """The outcome of asking about one image.

    ``raw`` is None for ``error``, ``skipped_budget``, ``skipped_quota`` and
    ``unreachable``; ``empty`` means that the service reported no objects.
    ``teachers``: names of the clouds that answered, if several could.

    ``attempts``: tries, 0 if cached or if an earlier run had asked. ``calls`` and
    ``cost_usd``: those that were or may have been billed. ``latency_ms``: of the last
    try.
    """

    status: AnswerStatus
    raw: RawDetections | None
    attempts: int = 0
    latency_ms: float = 0.0
    cost_usd: float = 0.0
    error: str | None = None
    calls: int = 0
    teachers: tuple[str, ...] = ()
