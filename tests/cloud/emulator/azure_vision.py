"""Azure AI Vision, Image Analysis 4.0: POST
/computervision/imageanalysis:analyze?features=Objects."""

from __future__ import annotations

from typing import Any

from .app import TOKEN, Call, Reply, SceneError, SceneObject, read_scene

BYTES_MAX = 20_971_520


def answer(call: Call) -> Reply:
    if call.headers.get("ocp-apim-subscription-key") != TOKEN:
        return _error_reply(
            401,
            "401",
            "Access denied due to invalid subscription key or wrong API endpoint.",
        )
    if (call.method, call.path) != ("POST", "/computervision/imageanalysis:analyze"):
        return _error_reply(404, "404", "Resource not found")
    if (
        call.params.get("api-version") != "2023-10-01"
        or call.params.get("features") != "Objects"
    ):
        return _error_reply(
            400,
            "BadArgument",
            "The api-version or the visual features are not supported.",
        )
    if call.media_type != "application/octet-stream":
        return _error_reply(415, "UnsupportedMediaType", "Unsupported media type")
    if len(call.body) > BYTES_MAX:
        return _error_reply(
            400,
            "InvalidRequest",
            f"Input image is too large. It should not be larger than {BYTES_MAX}"
            " bytes.",
        )
    try:
        scene = read_scene(call.body)
    except SceneError:
        return _error_reply(
            400,
            "InvalidRequest",
            "The image format is not valid.",
            "InvalidImageFormat",
        )
    if not all(50 <= side <= 16_000 for side in (scene.width, scene.height)):
        return _error_reply(
            400,
            "InvalidRequest",
            "The image dimension is not allowed.",
            "InvalidImageSize",
        )
    return Reply(
        200,
        {
            "modelVersion": "2023-10-01",
            "metadata": {"width": scene.width, "height": scene.height},
            "objectsResult": {"values": list(map(_object_json, scene.objects))},
        },
    )


def _object_json(scene_object: SceneObject) -> dict[str, Any]:
    x0, y0, x1, y1 = (round(edge) for edge in scene_object.box)
    return {
        "boundingBox": {"x": x0, "y": y0, "w": x1 - x0, "h": y1 - y0},
        "tags": [{"name": scene_object.name, "confidence": scene_object.score}],
    }


def _error_reply(status: int, code: str, message: str, inner: str = "") -> Reply:
    error: dict[str, Any] = {"code": code, "message": message}
    if inner:
        error["innererror"] = {"code": inner, "message": message}
    return Reply(status, {"error": error})
