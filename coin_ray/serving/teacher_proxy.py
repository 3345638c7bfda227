"""The cloud of a run, asked about single images: to see it beside the student. Answers
are kept, calls are bounded.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from coin_ray.cloud.client import CloudClient, limits
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.journal import Journal
from coin_ray.cloud.renderings import image_in_view
from coin_ray.cloud.services import adapter_for, check_clouds, endpoint_for
from coin_ray.config import PipelineConfig
from coin_ray.errors import CloudError
from coin_ray.serving.launch import local_cloud
from coin_ray.serving.wire import elements

CALLS_MAX = 100


class NotAnswered(Exception):
    """Why there is no answer: the kind of error only, since a service's own words may
    hold what must not be shown.
    """


class CloudBeside:
    """``config.cloud``, in its first view, asked about ``config.classes``, at most
    ``calls_max`` times; starts the local server if the configuration says so.

    ``journal``: of the run (a URI), which has its answers and gets new ones. Without
    one, answers last as long as this. Raises ConfigError for settings that the service
    can't be asked with, AuthError if the secret's variable is not set.
    """

    def __init__(
        self, config: PipelineConfig, calls_max: int = CALLS_MAX, journal: str = ""
    ) -> None:
        cloud = config.clouds[0]
        check_clouds([cloud], config.classes)
        self.name = cloud.service if cloud.serve == "none" else f"local {cloud.serve}"
        self._classes = config.classes
        self._open = ExitStack()
        folder = self._open.enter_context(
            tempfile.TemporaryDirectory(prefix="coin-serve-")
        )
        url = endpoint_for(cloud, adapter_for(cloud)) or self._open.enter_context(
            local_cloud(cloud, str(Path(folder) / "local"))
        )
        answers = Journal.open(journal or str(Path(folder) / "journal"))
        spent = answers.spent()
        most = spent[0] + calls_max
        cloud = replace(cloud, max_calls=min(most, cloud.max_calls or most))
        self._client = CloudClient(
            cloud,
            config.classes,
            url,
            answers,
            LocalGovernor(Governor(limits(cloud), spent)),
        )

    async def ask(self, data: bytes, score_min: float) -> dict[str, Any]:
        """The answer in the reference format about an image file. Raises InputError for
        a bad image, NotAnswered with the kind of error.
        """
        started = time.perf_counter()
        image = await asyncio.to_thread(image_in_view, data, *self._client.view)
        try:
            answer = await self._client.answer(image)
        except CloudError as error:
            raise NotAnswered(type(error).__name__) from None
        if answer.raw is None:
            raise NotAnswered((answer.error or answer.status).partition(":")[0])
        kept = answer.raw.class_scores.max(1, initial=0) >= score_min
        found = elements(
            answer.raw.boxes[kept], answer.raw.class_scores[kept], self._classes
        )
        size, milliseconds = image.original, (time.perf_counter() - started) * 1000
        return {
            "model": self.name,
            "image": {"w": size[0], "h": size[1]},
            "detections": found,
            "usage": {
                "ms": round(milliseconds, 1),
                "calls": answer.calls,
                "usd": answer.cost_usd,
            },
        }

    async def aclose(self) -> None:
        """Close connections, end the local server, forget the answers."""
        await self._client.aclose()
        await asyncio.to_thread(self._open.close)
