"""A Hugging Face Inference Endpoint for zero-shot object detection: POST / with JSON. The
model searches for each class separately.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .app import TOKEN, Call, Reply, SceneError, SceneObject, decode_base64, read_scene

SECOND_SCORE = 0.25
"""Every object is also detected as the next class of the request, with this share of its
score."""


def answer(call: Call) -> Reply:
    if call.headers.get("authorization") != f"Bearer {TOKEN}":
        return Reply(401, {"error": "Invalid credentials in Authorization header"})
    if (call.method, call.path) != ("POST", "/") or call.query:
        return Reply(404, {"error": "Not Found"})
    request_json = call.json()
    if (
        call.media_type != "application/json"
        or not isinstance(request_json, dict)
        or "inputs" not in request_json
    ):
        return Reply(400, {"error": "Body needs to provide a inputs key"})
    parameters = request_json.get("parameters", {})
    labels = parameters.get("candidate_labels")
    threshold = parameters.get("threshold", 0.1)
    if not isinstance(labels, list) or not labels or not isinstance(threshold, float):
        text = "candidate_labels must be a list of names and threshold a number"
        return Reply(400, {"error": text})
    try:
        scene = read_scene(decode_base64(request_json["inputs"]))
    except SceneError as error:
        return Reply(400, {"error": f"cannot identify image file: {error}"})
    detections: list[dict[str, Any]] = []
    for scene_object in scene.objects:
        detections += _detections_json(scene_object, labels)
    confident = [
        detection for detection in detections if detection["score"] >= threshold
    ]
    return Reply(200, sorted(confident, key=lambda detection: -detection["score"]))


def _detections_json(
    scene_object: SceneObject, labels: Sequence[str]
) -> list[dict[str, Any]]:
    """Return an object's detections; its box is truncated to whole pixels."""
    if scene_object.name not in labels:
        return []
    edges = ("xmin", "ymin", "xmax", "ymax")
    box = dict(zip(edges, map(int, scene_object.box), strict=True))
    score = scene_object.score
    detections = [{"score": score, "label": scene_object.name, "box": box}]
    next_label = labels[(labels.index(scene_object.name) + 1) % len(labels)]
    if next_label != scene_object.name:
        detections.append(
            {"score": score * SECOND_SCORE, "label": next_label, "box": box}
        )
    return detections
