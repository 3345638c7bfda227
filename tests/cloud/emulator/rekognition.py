"""AWS Rekognition DetectLabels: POST / with an AWS signature; the same object comes as
a child and as its ancestors."""

from __future__ import annotations

from typing import Any

from .app import (
    Call,
    Reply,
    Scene,
    SceneError,
    SceneObject,
    decoded_base64,
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
"""Ancestors that are given boxes of their own."""
SPILL = 0.004
"""How far, as a ratio, a box at the image's border reaches beyond it."""


def answer(call: Call) -> Reply:
    problem = sigv4_problem(call, "rekognition", REGION)
    if problem is not None:
        return _refused(*problem)
    if (call.method, call.path) != ("POST", "/") or call.headers.get(
        "x-amz-target"
    ) != "RekognitionService.DetectLabels":
        return _refused("UnknownOperationException", "")
    question = call.json()
    if call.media_type != "application/x-amz-json-1.1" or not isinstance(
        question, dict
    ):
        return _refused("SerializationException", "")
    if (
        question.get("Features") != ["GENERAL_LABELS"]
        or not 0 <= question.get("MinConfidence", 55.0) <= 100
    ):
        return _refused("InvalidParameterException", "Request has invalid parameters")
    try:
        data = decoded_base64(question["Image"]["Bytes"])
        scene = read_scene(data)
    except SceneError:
        return _refused(
            "InvalidImageFormatException", "Request has invalid image format"
        )
    if len(data) > BYTES_MAX or max(scene.width, scene.height) > 10_000:
        return _refused("ImageTooLargeException", "Image size is too large")
    if scene.format not in ("JPEG", "PNG") or min(scene.width, scene.height) < 80:
        return _refused(
            "InvalidImageFormatException", "Request has invalid image format"
        )
    return _reply(
        200,
        {
            "Labels": _labels(scene, question)[: question.get("MaxLabels", 1000)],
            "LabelModelVersion": "3.0",
        },
    )


def _labels(scene: Scene, question: dict[str, Any]) -> list[dict[str, Any]]:
    """One label per name and ancestor, with all its instances, best first; and a label
    without boxes."""
    instances: dict[str, list[dict[str, Any]]] = {}
    parents: dict[str, tuple[str, ...]] = {}
    for found in scene.objects:
        if found.score * 100 < question.get("MinConfidence", 55.0):
            continue
        lineage = (found.name.title(), *PARENTS.get(found.name, ()))
        for depth, name in enumerate(lineage):
            parents[name] = lineage[depth + 1 :]
            boxed = instances.setdefault(name, [])
            if depth == 0 or name in WITH_BOXES:
                boxed.append(
                    {
                        "BoundingBox": _ratios(found, scene),
                        "Confidence": found.score * 100,
                    }
                )
    labels = [
        {
            "Name": name,
            "Confidence": max((i["Confidence"] for i in boxed), default=90.0),
            "Instances": boxed,
            "Parents": [{"Name": p} for p in parents[name]],
            "Aliases": [{"Name": "Automobile"}] if name == "Car" else [],
            "Categories": [{"Name": "Everyday Objects"}],
        }
        for name, boxed in instances.items()
    ]
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


def _ratios(found: SceneObject, scene: Scene) -> dict[str, float]:
    x0, y0, x1, y1 = (
        v / side
        for v, side in zip(found.box, (scene.width, scene.height) * 2, strict=True)
    )
    x0, y0 = (v - SPILL if v == 0 else v for v in (x0, y0))
    x1, y1 = (v + SPILL if v == 1 else v for v in (x1, y1))
    return {"Left": x0, "Top": y0, "Width": x1 - x0, "Height": y1 - y0}


def _refused(kind: str, message: str) -> Reply:
    return _reply(400, {"__type": kind, "Message": message})


def _reply(status: int, value: Any) -> Reply:
    return Reply(status, value, content_type="application/x-amz-json-1.1")
