"""Roboflow's inference server with SAM 3: POST /sam3/concept_segment. Results are masks as
polygons with whole coordinates, one list for each prompt.
"""

from __future__ import annotations

from typing import Any

from .app import TOKEN, Call, Reply, SceneError, SceneObject, decode_base64, read_scene

PROMPTS_MAX = 16


def answer(call: Call) -> Reply:
    request_json = call.json()
    header = call.headers.get("authorization")
    body_key = request_json.get("api_key") if isinstance(request_json, dict) else None
    reads = call.state.get("reads_key_in", "header")
    key_is_right = (
        header == f"Bearer {TOKEN}" if reads == "header" else body_key == TOKEN
    )
    if not key_is_right or "api_key" in call.params:
        return Reply(401, {"message": "Unauthorized access to roboflow API"})
    if (call.method, call.path) != ("POST", "/sam3/concept_segment"):
        return Reply(404, {"message": "Not Found"})
    prompts = request_json.get("prompts", [])
    if not 0 < len(prompts) <= PROMPTS_MAX or request_json.get("format") != "polygon":
        return Reply(422, {"message": "the request is not valid"})
    try:
        scene = read_scene(decode_base64(request_json["image"]["value"]))
    except SceneError:
        return Reply(400, {"message": "Could not load input image."})
    threshold = request_json["output_prob_thresh"]
    results = []
    for number, prompt in enumerate(prompts):
        predictions = [
            _prediction_json(scene_object)
            for scene_object in scene.objects
            if scene_object.name == prompt["text"] and scene_object.score >= threshold
        ]
        results.append(prompt_result(number, prompt["text"], predictions))
    return Reply(200, {"prompt_results": results, "time": 0.2})


def prompt_result(number: int, text: str, predictions: list[Any]) -> dict[str, Any]:
    return {
        "prompt_index": number,
        "echo": {"prompt_index": number, "type": "text", "text": text, "num_boxes": 0},
        "predictions": predictions,
    }


def mask(box: tuple[float, float, float, float]) -> list[list[list[int]]]:
    """Return two polygons whose extent is the box, in whole pixels."""
    x0, y0, x1, y1 = (round(edge) for edge in box)
    middle = (x0 + x1) // 2
    return [
        [[x0, y0], [middle, y0], [middle, y1], [x0, y1]],
        [[middle, y0], [x1, y0], [x1, y1]],
    ]


def _prediction_json(scene_object: SceneObject) -> dict[str, Any]:
    return {
        "masks": mask(scene_object.box),
        "confidence": scene_object.score,
        "format": "polygon",
    }
