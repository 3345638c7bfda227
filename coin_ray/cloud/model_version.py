"""The version of the model that a service says has answered. Another one is another
teacher, which would share one journal with the first without anybody noticing.
"""

from __future__ import annotations

import logging
import re
from typing import Literal

from coin_ray.cloud.adapters.parsing import sanitize_text
from coin_ray.errors import BadRequest

VERSION = re.compile(
    rb'"(?:modelVersion|LabelModelVersion|model_version|model)"\s*:\s*"([^"\\]{1,100})"'
)
"""A member of a service's JSON. In the text of a language model, quotes are escaped."""

logger = logging.getLogger(__name__)


def reported_version(body: bytes) -> str:
    """Return the model or version that an answer names; empty if it names none."""
    match = VERSION.search(body)
    return sanitize_text(match.group(1).decode(errors="replace")) if match else ""


class VersionWatch:
    """Notices when a service's answers come from another version of its model.

    ``version``: of the latest answer on record, empty if none is known; ``policy``:
    whether a change stops the run, or warns.
    """

    def __init__(
        self, name: str, version: str, policy: Literal["stop", "warn"]
    ) -> None:
        self._name = name
        self._version = version
        self._policy = policy
        self._change = ""

    def note(self, body: bytes) -> str:
        """Return the version that an answer names, and warn if it is another one than
        that of the answer before.
        """
        version = reported_version(body)
        if version and self._version and version != self._version:
            self._change = (
                f"{self._name} answers with another model: {version!r}, before it was"
                f" {self._version!r}. Answers of both would be mixed: name the version"
                " as cloud.model where the service allows that, or start another --root"
            )
            if self._policy == "warn":
                logger.warning("%s", self._change)
        self._version = version or self._version
        return version

    def check(self) -> None:
        """Raise ``BadRequest`` if the version has changed and that stops the run."""
        if self._change and self._policy == "stop":
            raise BadRequest(
                f"{self._change}, or go on with --cloud.on-version-change warn. The"
                " answer that shows the change is on record"
            )
