"""The reference wire format: POST /v1/detect, with a score for every class that was
asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .app import TOKEN, Call, Reply, SceneError, SceneObject, decoded_base64, read_scene

OTHERS = 0.1
"""Score of each class that an object is not, as a share of its own."""


def answer(call: Call) -> Reply:
    if call.headers.get("authorization") != f"Bearer {TOKEN}":
        return _refused(401, "the token is not valid")
    if (call.method, call.path) == ("GET", "/health"):
        return Reply(200, {"status": "ok"}, billed=False)
    if (call.method, call.path) != ("POST", "/v1/detect"):
        return _refused(404, "no such path")
    question = call.json()
    if (
        call.media_type != "application/json"
        or not isinstance(question, dict)
        or question.get("return") != "probs"
    ):
        return _refused(400, "the body could not be read")
    try:
        scene = read_scene(decoded_base64(question["image"]["b64"]))
    except SceneError as error:
        return _refused(415, str(error))
    asked, least = question["classes"], question["threshold"]
    found = [
        _detection(o, asked)
        for o in scene.objects
        if o.name in asked and o.score >= least
    ]
    return Reply(
        200,
        {
            "id": "1",
            "model": "emulated",
            "image": {"w": scene.width, "h": scene.height},
            "detections": found,
        },
    )


def _detection(found: SceneObject, asked: Sequence[str]) -> dict[str, Any]:
    scores = {
        name: found.score * (1.0 if name == found.name else OTHERS) for name in asked
    }
    return {
        "box": list(found.box),
        "label": found.name,
        "score": found.score,
        "scores": scores,
    }


def _refused(status: int, detail: str) -> Reply:
    return Reply(
        status,
        {"title": "refused", "detail": detail},
        content_type="application/problem+json",
    )
