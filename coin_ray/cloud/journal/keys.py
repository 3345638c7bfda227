"""Keys under which answers are kept: equal for equal questions, whoever asks."""

from __future__ import annotations

import hashlib
import json

from coin_ray.cloud.protocol import Query
from coin_ray.storage import JsonObject

TASK = ".task"
"""Suffix of the keys under which a task's id is kept until its answer has arrived."""
BATCH = ".batch" + TASK
"""Suffix of the keys under which an image's job of a batch endpoint is kept."""


def answer_key(
    adapter: str, endpoint: str, query: Query, max_side: int, sent: bytes
) -> str:
    """Return the key of an answer [64 hexadecimal digits]: a digest of everything that
    could change it.

    ``endpoint``: host and path, or the name of a local server; ``sent``: the image file
    that is sent.
    """
    digest = hashlib.sha256(sent).hexdigest()
    return answer_key_from_digest(adapter, endpoint, query, max_side, digest)


def answer_key_from_digest(
    adapter: str, endpoint: str, query: Query, max_side: int, digest: str
) -> str:
    """Return ``answer_key`` for the hexadecimal sha256 of the file that is sent."""
    before, after = answer_key_parts(adapter, endpoint, query, max_side)
    return hashlib.sha256(f"{before}{digest}{after}".encode()).hexdigest()


def answer_key_parts(
    adapter: str, endpoint: str, query: Query, max_side: int
) -> tuple[str, str]:
    """Return the texts before and after the image's digest, of whose concatenation with
    it ``answer_key`` is the sha256.
    """
    identity: JsonObject = {
        "adapter": adapter,
        "endpoint": endpoint,
        "model": query.model,
        "classes": list(query.classes),
        "threshold": query.score_min,
        "max_side": max_side,
        "image": "",
    }
    if query.descriptions:
        identity["descriptions"] = dict(query.descriptions)
    if query.settings:
        identity["settings"] = dict(query.settings)
    canonical = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    # quotation marks inside names and texts are escaped
    before, mark, after = canonical.partition('"image":"')
    return before + mark, after
