"""Google Cloud Vision, OBJECT_LOCALIZATION: POST /v1/images:annotate. Responses are
protobuf's JSON, which omits zeros.
"""

from __future__ import annotations

from typing import Any

from .app import (
    TOKEN,
    Call,
    Reply,
    Scene,
    SceneError,
    SceneObject,
    decode_base64,
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
        return error_reply(
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
        return error_reply(
            400,
            "INVALID_ARGUMENT",
            f"Request payload size exceeds the limit: {JSON_MAX} bytes.",
        )
    request_json = call.json()
    if (
        call.media_type != "application/json"
        or not isinstance(request_json, dict)
        or len(request_json.get("requests", ())) != 1
    ):
        return error_reply(400, "INVALID_ARGUMENT", "Invalid JSON payload received.")
    (image_request,) = request_json["requests"]
    (feature,) = image_request["features"]
    if feature["type"] != "OBJECT_LOCALIZATION":
        return error_reply(
            400, "INVALID_ARGUMENT", "Invalid value at 'requests[0].features[0].type'"
        )
    try:
        scene = read_scene(decode_base64(image_request["image"]["content"]))
    except SceneError:
        return _image_error_reply("Bad image data.")
    if scene.width * scene.height > PIXELS_MAX:
        return _image_error_reply("The image is too large.")
    objects = scene.objects[: feature.get("maxResults", 10)]
    annotations = [_annotation(scene_object, scene) for scene_object in objects]
    response = {"localizedObjectAnnotations": annotations} if annotations else {}
    return Reply(
        200, {"responses": [response]}, content_type="application/json; charset=UTF-8"
    )


def _image_error_reply(message: str) -> Reply:
    error = {"code": 3, "message": message}
    return Reply(200, {"responses": [{"error": error}]}, billed=False)


def _annotation(scene_object: SceneObject, scene: Scene) -> dict[str, Any]:
    x0, y0, x1, y1 = scene.ratios(scene_object)
    vertices = []
    for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1)):
        vertex = {"x": x, "y": y}
        vertices.append({axis: ratio for axis, ratio in vertex.items() if ratio != 0})
    annotation = {
        "name": scene_object.name.title(),
        "score": scene_object.score,
        "boundingPoly": {"normalizedVertices": vertices},
    }
    if scene_object.name in MIDS:
        annotation["mid"] = MIDS[scene_object.name]
    return annotation


def error_reply(status: int, code: str, message: str, reason: str = "") -> Reply:
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
