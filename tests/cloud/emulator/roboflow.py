"""Roboflow's inference server with YOLO-World: POST /yolo_world/infer. Boxes by their
centres."""

from __future__ import annotations

from typing import Any

from .app import TOKEN, Call, Reply, SceneError, SceneObject, decoded_base64, read_scene

VERSIONS = ("s", "m", "l", "x", "v2-s", "v2-m", "v2-l", "v2-x")


def answer(call: Call) -> Reply:
    if (
        call.headers.get("authorization") != f"Bearer {TOKEN}"
        or "api_key" in call.params
    ):
        return Reply(
            401,
            {
                "message": (
                    "Unauthorized access to roboflow API - check API key and make sure"
                    " the key is valid."
                )
            },
        )
    if (call.method, call.path) != ("POST", "/yolo_world/infer"):
        return Reply(404, {"message": "Not Found"})
    question = call.json()
    if (
        call.media_type != "application/json"
        or not isinstance(question, dict)
        or question.get("image", {}).get("type") != "base64"
    ):
        return Reply(422, {"message": "the request is not valid"})
    if question.get("yolo_world_version_id", "l") not in VERSIONS:
        return Reply(404, {"message": "Requested Roboflow resource not found."})
    try:
        scene = read_scene(decoded_base64(question["image"]["value"]))
    except SceneError:
        return Reply(
            400,
            {
                "message": (
                    "Could not load input image. Cause: malformed base64 input image."
                )
            },
        )
    asked, least = question["text"], question.get("confidence", 0.4)
    predictions = [
        _prediction(o, asked.index(o.name))
        for o in scene.objects
        if o.name in asked and o.score >= least
    ]
    return Reply(
        200,
        {
            "image": {"width": scene.width, "height": scene.height},
            "time": 0.08,
            "predictions": predictions,
        },
    )


def _prediction(found: SceneObject, index: int) -> dict[str, Any]:
    x0, y0, x1, y1 = found.box
    centre = {
        "x": (x0 + x1) / 2,
        "y": (y0 + y1) / 2,
        "width": x1 - x0,
        "height": y1 - y0,
    }
    return {
        **centre,
        "confidence": found.score,
        "class": found.name,
        "class_id": index,
        "detection_id": str(found.object_id),
    }
