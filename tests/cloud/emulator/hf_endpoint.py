"""A Hugging Face Inference Endpoint for zero-shot object detection: POST / with JSON.
Each class is looked for by itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .app import TOKEN, Call, Reply, SceneError, SceneObject, decoded_base64, read_scene

LIKENESS = 0.25
"""Every object looks a little like the class that was asked for next, by this share of
its score."""


def answer(call: Call) -> Reply:
    if call.headers.get("authorization") != f"Bearer {TOKEN}":
        return Reply(401, {"error": "Invalid credentials in Authorization header"})
    if (call.method, call.path) != ("POST", "/") or call.query:
        return Reply(404, {"error": "Not Found"})
    question = call.json()
    if (
        call.media_type != "application/json"
        or not isinstance(question, dict)
        or "inputs" not in question
    ):
        return Reply(400, {"error": "Body needs to provide a inputs key"})
    parameters = question.get("parameters", {})
    labels, threshold = (
        parameters.get("candidate_labels"),
        parameters.get("threshold", 0.1),
    )
    if not isinstance(labels, list) or not labels or not isinstance(threshold, float):
        return Reply(
            400,
            {
                "error": (
                    "candidate_labels must be a list of names and threshold a number"
                )
            },
        )
    try:
        scene = read_scene(decoded_base64(question["inputs"]))
    except SceneError as error:
        return Reply(400, {"error": f"cannot identify image file: {error}"})
    found = [
        element
        for o in scene.objects
        for element in _elements(o, labels)
        if element["score"] >= threshold
    ]
    return Reply(200, sorted(found, key=lambda element: -float(element["score"])))


def _elements(found: SceneObject, labels: Sequence[str]) -> list[dict[str, Any]]:
    """Boxes are cut to whole pixels."""
    if found.name not in labels:
        return []
    box = dict(
        zip(("xmin", "ymin", "xmax", "ymax"), (int(v) for v in found.box), strict=True)
    )
    other = labels[(labels.index(found.name) + 1) % len(labels)]
    elements = [{"score": found.score, "label": found.name, "box": box}]
    return (
        elements
        if other == found.name
        else [*elements, {"score": found.score * LIKENESS, "label": other, "box": box}]
    )
