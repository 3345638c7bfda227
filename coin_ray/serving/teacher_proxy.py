"""Single images answered by the cloud of a run, to show it beside the student. Answers
are stored, calls are bounded.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.protocol import RawDetections
from coin_ray.cloud.renderings import render_image
from coin_ray.cloud.services import adapter_for, check_clouds, endpoint_for
from coin_ray.config import PipelineConfig
from coin_ray.errors import CloudError
from coin_ray.serving.launch import local_cloud
from coin_ray.serving.wire import DetectResponseJson, detections_as_json

CALLS_MAX = 100


class TeacherUnavailable(Exception):
    """The cloud gave no answer. The message is the kind of error only, since a service's
    own message may contain what must not be shown.
    """


class TeacherProxy:
    """``config.cloud``, with its first rendering, asked about ``config.classes``, at
    most ``calls_max`` times; starts the local server if the configuration says so.

    ``journal``: the run's (a URI), which holds its answers and gets new ones. Without
    one, answers are kept until ``aclose``. Raises ConfigError for settings that the
    service can't be called with, AuthError if the secret's variable is not set.
    """

    def __init__(
        self, config: PipelineConfig, calls_max: int = CALLS_MAX, journal: str = ""
    ) -> None:
        cloud = config.clouds[0]
        check_clouds([cloud], config.classes)
        self.name = cloud.service if cloud.serve == "none" else f"local {cloud.serve}"
        self._classes = config.classes
        self._intensity_range = config.intensity_range
        self._resources = ExitStack()
        folder = Path(
            self._resources.enter_context(
                tempfile.TemporaryDirectory(prefix="coin-serve-")
            )
        )
        url = endpoint_for(cloud, adapter_for(cloud))
        if not url:
            server = local_cloud(cloud, str(folder / "local"))
            url = self._resources.enter_context(server)
        answers = open_journal(journal or str(folder / "journal"))
        spent = answers.spent()
        calls_allowed = spent[0] + calls_max
        if cloud.max_calls:
            calls_allowed = min(calls_allowed, cloud.max_calls)
        cloud = replace(cloud, max_calls=calls_allowed, batch=False)  # asked singly
        governor = LocalGovernor(Governor(governor_limits(cloud), spent))
        self._client = CloudClient(cloud, config.classes, url, answers, governor)

    async def ask(self, image_bytes: bytes, score_min: float) -> DetectResponseJson:
        """Return the cloud's answer about an image file in the reference format. Raises
        InputError for a bad image, TeacherUnavailable with the kind of error.
        """
        started = time.perf_counter()
        image = await asyncio.to_thread(
            render_image,
            image_bytes,
            *self._client.rendering,
            self._intensity_range,
        )
        try:
            answer = await self._client.answer(image)
        except CloudError as error:
            raise TeacherUnavailable(type(error).__name__) from None
        detections = _detections_of(answer)
        above = detections.class_scores.max(1, initial=0) >= score_min
        boxes, scores = detections.boxes[above], detections.class_scores[above]
        width, height = image.original
        milliseconds = (time.perf_counter() - started) * 1000
        return {
            "model": self.name,
            "image": {"w": width, "h": height},
            "detections": detections_as_json(boxes, scores, self._classes),
            "usage": {
                "ms": round(milliseconds, 1),
                "calls": answer.calls,
                "usd": answer.cost_usd,
            },
        }

    async def aclose(self) -> None:
        """Close connections, stop the local server, delete temporary answers."""
        await self._client.aclose()
        await asyncio.to_thread(self._resources.close)


def _detections_of(answer: Answer) -> RawDetections:
    """Return the answer's detections. Raises TeacherUnavailable if it has none."""
    if answer.raw is None:
        reason = answer.error or answer.status
        raise TeacherUnavailable(reason.partition(":")[0])
    return answer.raw
