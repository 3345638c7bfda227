"""Roboflow's inference server with YOLO-World: POST /yolo_world/infer. Boxes are given by
their centres.
"""

from __future__ import annotations

from typing import Any

from .app import TOKEN, Call, Reply, SceneError, SceneObject, decode_base64, read_scene

VERSIONS = ("s", "m", "l", "x", "v2-s", "v2-m", "v2-l", "v2-x")


def answer(call: Call) -> Reply:
    if (
        call.headers.get("authorization") != f"Bearer {TOKEN}"
        or "api_key" in call.params
    ):
        text = (
            "Unauthorized access to roboflow API - check API key and make sure the key is"
            " valid."
        )
        return Reply(401, {"message": text})
    if (call.method, call.path) != ("POST", "/yolo_world/infer"):
        return Reply(404, {"message": "Not Found"})
    request_json = call.json()
    if (
        call.media_type != "application/json"
        or not isinstance(request_json, dict)
        or request_json.get("image", {}).get("type") != "base64"
    ):
        return Reply(422, {"message": "the request is not valid"})
    if request_json.get("yolo_world_version_id", "l") not in VERSIONS:
        return Reply(404, {"message": "Requested Roboflow resource not found."})
    try:
        scene = read_scene(decode_base64(request_json["image"]["value"]))
    except SceneError:
        text = "Could not load input image. Cause: malformed base64 input image."
        return Reply(400, {"message": text})
    classes, threshold = request_json["text"], request_json.get("confidence", 0.4)
    predictions = [
        _prediction_json(scene_object, classes.index(scene_object.name))
        for scene_object in scene.objects
        if scene_object.name in classes and scene_object.score >= threshold
    ]
    return Reply(
        200,
        {
            "image": {"width": scene.width, "height": scene.height},
            "time": 0.08,
            "predictions": predictions,
        },
    )


def _prediction_json(scene_object: SceneObject, index: int) -> dict[str, Any]:
    x0, y0, x1, y1 = scene_object.box
    return {
        "x": (x0 + x1) / 2,
        "y": (y0 + y1) / 2,
        "width": x1 - x0,
        "height": y1 - y0,
        "confidence": scene_object.score,
        "class": scene_object.name,
        "class_id": index,
        "detection_id": str(scene_object.object_id),
    }
