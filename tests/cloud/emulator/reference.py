"""The reference wire format: POST /v1/detect, with a score for every class of the request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .app import TOKEN, Call, Reply, SceneError, SceneObject, decode_base64, read_scene

OTHER_CLASS_SCORE = 0.1
"""Score of each class that an object does not have, as a share of its own."""


def answer(call: Call) -> Reply:
    if call.headers.get("authorization") != f"Bearer {TOKEN}":
        return _error_reply(401, "the token is not valid")
    if (call.method, call.path) == ("GET", "/health"):
        return Reply(200, {"status": "ok"}, billed=False)
    if (call.method, call.path) != ("POST", "/v1/detect"):
        return _error_reply(404, "no such path")
    request_json = call.json()
    if (
        call.media_type != "application/json"
        or not isinstance(request_json, dict)
        or request_json.get("return") != "probs"
    ):
        return _error_reply(400, "the body could not be read")
    try:
        scene = read_scene(decode_base64(request_json["image"]["b64"]))
    except SceneError as error:
        return _error_reply(415, str(error))
    classes, threshold = request_json["classes"], request_json["threshold"]
    detections = [
        _detection_json(scene_object, classes)
        for scene_object in scene.objects
        if scene_object.name in classes and scene_object.score >= threshold
    ]
    return Reply(
        200,
        {
            "id": "1",
            "model": "emulated",
            "image": {"w": scene.width, "h": scene.height},
            "detections": detections,
        },
    )


def _detection_json(
    scene_object: SceneObject, classes: Sequence[str]
) -> dict[str, Any]:
    scores = dict.fromkeys(classes, scene_object.score * OTHER_CLASS_SCORE)
    scores[scene_object.name] = scene_object.score
    return {
        "box": list(scene_object.box),
        "label": scene_object.name,
        "score": scene_object.score,
        "scores": scores,
    }


def _error_reply(status: int, detail: str) -> Reply:
    return Reply(
        status,
        {"title": "refused", "detail": detail},
        content_type="application/problem+json",
    )
