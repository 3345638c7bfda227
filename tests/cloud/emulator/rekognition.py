"""AWS Rekognition DetectLabels: POST / with an AWS signature. An object is listed under its
own name and under its ancestors' names.
"""

from __future__ import annotations

from typing import Any

from .app import (
    Call,
    Reply,
    Scene,
    SceneError,
    SceneObject,
    decode_base64,
    read_scene,
    sigv4_problem,
)

REGION = "us-east-1"
BYTES_MAX = 5_242_880
PARENTS = {
    "car": ("Vehicle", "Transportation"),
    "bus": ("Vehicle", "Transportation"),
    "truck": ("Vehicle", "Transportation"),
    "dog": ("Pet", "Mammal", "Animal"),
}
WITH_BOXES = ("Vehicle", "Pet")
"""Ancestors that have boxes too."""
SPILL = 0.004
"""How far, as a ratio, a box at the image's border reaches beyond it."""


def answer(call: Call) -> Reply:
    problem = sigv4_problem(call, "rekognition", REGION)
    if problem is not None:
        return _error_reply(*problem)
    target = call.headers.get("x-amz-target")
    if (call.method, call.path) != ("POST", "/"):
        return _error_reply("UnknownOperationException", "")
    if target != "RekognitionService.DetectLabels":
        return _error_reply("UnknownOperationException", "")
    request_json = call.json()
    if call.media_type != "application/x-amz-json-1.1" or not isinstance(
        request_json, dict
    ):
        return _error_reply("SerializationException", "")
    if (
        request_json.get("Features") != ["GENERAL_LABELS"]
        or not 0 <= request_json.get("MinConfidence", 55.0) <= 100
    ):
        return _error_reply(
            "InvalidParameterException", "Request has invalid parameters"
        )
    try:
        image_file = decode_base64(request_json["Image"]["Bytes"])
        scene = read_scene(image_file)
    except SceneError:
        return _error_reply(
            "InvalidImageFormatException", "Request has invalid image format"
        )
    if len(image_file) > BYTES_MAX or max(scene.width, scene.height) > 10_000:
        return _error_reply("ImageTooLargeException", "Image size is too large")
    if scene.format not in ("JPEG", "PNG") or min(scene.width, scene.height) < 80:
        return _error_reply(
            "InvalidImageFormatException", "Request has invalid image format"
        )
    return _reply(
        200,
        {
            "Labels": _labels(scene, request_json)[
                : request_json.get("MaxLabels", 1000)
            ],
            "LabelModelVersion": "3.0",
        },
    )


def _labels(scene: Scene, request_json: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one label per name and ancestor, with all its instances, best first; and a
    label without boxes.
    """
    instances: dict[str, list[dict[str, Any]]] = {}
    parents: dict[str, tuple[str, ...]] = {}
    for scene_object in scene.objects:
        confidence = scene_object.score * 100
        if confidence < request_json.get("MinConfidence", 55.0):
            continue
        box = _bounding_box(scene_object, scene)
        lineage = (scene_object.name.title(), *PARENTS.get(scene_object.name, ()))
        for depth, name in enumerate(lineage):
            parents[name] = lineage[depth + 1 :]
            named_instances = instances.setdefault(name, [])
            if depth == 0 or name in WITH_BOXES:
                named_instances.append({"BoundingBox": box, "Confidence": confidence})
    labels: list[dict[str, Any]] = []
    for name, named_instances in instances.items():
        confidences = [instance["Confidence"] for instance in named_instances]
        labels.append(
            {
                "Name": name,
                "Confidence": max(confidences, default=90.0),
                "Instances": named_instances,
                "Parents": [{"Name": parent} for parent in parents[name]],
                "Aliases": [{"Name": "Automobile"}] if name == "Car" else [],
                "Categories": [{"Name": "Everyday Objects"}],
            }
        )
    labels.append(
        {
            "Name": "Outdoors",
            "Confidence": 91.2,
            "Instances": [],
            "Parents": [],
            "Aliases": [],
            "Categories": [],
        }
    )
    return sorted(labels, key=lambda label: -float(str(label["Confidence"])))


def _bounding_box(scene_object: SceneObject, scene: Scene) -> dict[str, float]:
    x0, y0, x1, y1 = scene.ratios(scene_object)
    x0, y0 = (ratio - SPILL if ratio == 0 else ratio for ratio in (x0, y0))
    x1, y1 = (ratio + SPILL if ratio == 1 else ratio for ratio in (x1, y1))
    return {"Left": x0, "Top": y0, "Width": x1 - x0, "Height": y1 - y0}


def _error_reply(type_name: str, message: str) -> Reply:
    return _reply(400, {"__type": type_name, "Message": message})


def _reply(status: int, body: Any) -> Reply:
    return Reply(status, body, content_type="application/x-amz-json-1.1")
