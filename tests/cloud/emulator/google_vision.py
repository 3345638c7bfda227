"""Google Cloud Vision, OBJECT_LOCALIZATION: POST /v1/images:annotate, answers as
protobuf writes JSON (zeros are left out)."""

from __future__ import annotations

from typing import Any

from .app import (
    TOKEN,
    Call,
    Reply,
    Scene,
    SceneError,
    SceneObject,
    decoded_base64,
    read_scene,
)

MIDS = {
    "car": "/m/0k4j",
    "bus": "/m/01bjv",
    "dog": "/m/0bt9lr",
    "person": "/m/01g317",
    "bicycle": "/m/0199g",
    "truck": "/m/07r04",
}
JSON_MAX = 10_485_760
PIXELS_MAX = 75_000_000


def answer(call: Call) -> Reply:
    if call.headers.get("x-goog-api-key") != TOKEN:
        return refused(
            400,
            "INVALID_ARGUMENT",
            "API key not valid. Please pass a valid API key.",
            reason="API_KEY_INVALID",
        )
    if (call.method, call.path) != ("POST", "/v1/images:annotate") or call.query:
        return Reply(
            404,
            b"<!DOCTYPE html><title>Error 404 (Not Found)!!1</title>",
            content_type="text/html; charset=UTF-8",
        )
    if len(call.body) > JSON_MAX:
        return refused(
            400,
            "INVALID_ARGUMENT",
            f"Request payload size exceeds the limit: {JSON_MAX} bytes.",
        )
    question = call.json()
    if (
        call.media_type != "application/json"
        or not isinstance(question, dict)
        or len(question.get("requests", ())) != 1
    ):
        return refused(400, "INVALID_ARGUMENT", "Invalid JSON payload received.")
    (one,) = question["requests"]
    (feature,) = one["features"]
    if feature["type"] != "OBJECT_LOCALIZATION":
        return refused(
            400, "INVALID_ARGUMENT", "Invalid value at 'requests[0].features[0].type'"
        )
    try:
        scene = read_scene(decoded_base64(one["image"]["content"]))
    except SceneError:
        return Reply(
            200,
            {"responses": [{"error": {"code": 3, "message": "Bad image data."}}]},
            billed=False,
        )
    if scene.width * scene.height > PIXELS_MAX:
        return Reply(
            200,
            {
                "responses": [
                    {"error": {"code": 3, "message": "The image is too large."}}
                ]
            },
            billed=False,
        )
    found = [
        _annotation(o, scene) for o in scene.objects[: feature.get("maxResults", 10)]
    ]
    return Reply(
        200,
        {"responses": [{"localizedObjectAnnotations": found} if found else {}]},
        content_type="application/json; charset=UTF-8",
    )


def _annotation(found: SceneObject, scene: Scene) -> dict[str, Any]:
    x0, y0, x1, y1 = (
        v / side
        for v, side in zip(found.box, (scene.width, scene.height) * 2, strict=True)
    )
    corners = ((x0, y0), (x1, y0), (x1, y1), (x0, y1))
    vertices = [
        {name: value for name, value in zip("xy", corner, strict=True) if value != 0}
        for corner in corners
    ]
    names = (
        {"mid": MIDS[found.name], "name": found.name.title()}
        if found.name in MIDS
        else {"name": found.name.title()}
    )
    return names | {
        "score": found.score,
        "boundingPoly": {"normalizedVertices": vertices},
    }


def refused(status: int, code: str, message: str, reason: str = "") -> Reply:
    error: dict[str, Any] = {"code": status, "message": message, "status": code}
    if reason:
        error["details"] = [
            {
                "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                "reason": reason,
                "domain": "googleapis.com",
            }
        ]
    return Reply(status, {"error": error})
