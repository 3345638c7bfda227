"""DeepDataSpace, version 2: POST a task, then GET its state until it has ended. A task is
billed when it is created, once per key.
"""

from __future__ import annotations

import hashlib
from typing import Any

from .app import (
    TOKEN,
    Call,
    Reply,
    Scene,
    SceneError,
    decode_base64,
    read_scene,
)

MODELS = {
    "/v2/task/dinox/detection": ("DINO-X-1.0",),
    "/v2/task/grounding_dino/detection": (
        "GroundingDino-1.5-Pro",
        "GroundingDino-1.5-Edge",
        "GroundingDino-1.6-Pro",
        "GroundingDino-1.6-Edge",
    ),
    "/v2/task/trex/detection": ("T-Rex-2.0",),
}
TREX = "/v2/task/trex/detection"
STATES = ("waiting", "running")
"""Responses to a task's first polls; ``emulator.state("dds")["states"]`` overrides them."""
DATA_URL = "data:image/jpeg;base64,"


def answer(call: Call) -> Reply:
    if call.headers.get("token") != TOKEN:
        return _reply(10001, "Token is invalid", status=401)
    if call.method == "GET" and call.path.startswith("/v2/task_status/"):
        return _poll(call)
    if call.method != "POST" or call.path not in MODELS:
        return _reply(10404, "Resource Not Found", status=404)
    return _submit(call)


def _submit(call: Call) -> Reply:
    request_json = call.json()
    problem = _problem(call, request_json)
    if problem:
        return Reply(400, {"code": 10002, "msg": "Bad Request", "errors": [problem]})
    tasks = call.state.setdefault("tasks", {})
    key = call.headers.get("idempotency-key", str(len(tasks)))
    task = f"{hashlib.sha256(key.encode()).hexdigest()[:8]}-0000-4000-8000-000000000000"
    is_new = task not in tasks
    if is_new:
        states = [{"status": state} for state in call.state.get("states", STATES)]
        read_task = _last_exemplar_state if call.path == TREX else _last_state
        tasks[task] = [*states, read_task(request_json)]
    return _reply(0, "ok", {"task_uuid": task}, billed=is_new)


def _problem(call: Call, request_json: Any) -> str | None:
    if call.media_type != "application/json" or not isinstance(request_json, dict):
        return "the body is not JSON"
    if request_json.get("model") not in MODELS[call.path]:
        return "model is not supported"
    prompt_type = request_json.get("prompt", {}).get("type")
    expected_type = "visual_images" if call.path == TREX else "text"
    if prompt_type != expected_type or request_json.get("targets") != ["bbox"]:
        return "prompt or targets are not supported"
    for name in ("bbox_threshold", "iou_threshold"):
        threshold = request_json.get(name)
        if not isinstance(threshold, float) or not 0 <= threshold <= 1:
            return "thresholds must be in 0..1"
    return None


def _last_state(request_json: dict[str, Any]) -> dict[str, Any]:
    try:
        scene = _scene(request_json["image"])
    except SceneError as error:
        return {"status": "failed", "error": f"failed to load the image: {error}"}
    classes = request_json["prompt"]["text"].split(".")
    threshold = request_json["bbox_threshold"]
    detections = [
        {
            "bbox": list(scene_object.box),
            "category": scene_object.name,
            "score": scene_object.score,
        }
        for scene_object in scene.objects
        if scene_object.name in classes and scene_object.score >= threshold
    ]
    return {"status": "success", "result": {"objects": detections}}


def _last_exemplar_state(request_json: dict[str, Any]) -> dict[str, Any]:
    """Return the objects that look like those in the rectangles, by category."""
    try:
        scene = _scene(request_json["image"])
        categories: dict[int, int] = {}
        for visual in request_json["prompt"]["visual_images"]:
            example = _scene(visual["image"])
            for interaction in visual["interactions"]:
                shown = min(
                    example.objects,
                    key=lambda o: sum(
                        abs(a - b)
                        for a, b in zip(o.box, interaction["rect"], strict=True)
                    ),
                )
                categories[shown.class_index] = interaction["category_id"]
    except SceneError as error:
        return {"status": "failed", "error": f"failed to load the image: {error}"}
    objects = [
        {
            "bbox": list(o.box),
            "category_id": categories[o.class_index],
            "score": o.score,
        }
        for o in scene.objects
        if o.class_index in categories and o.score >= request_json["bbox_threshold"]
    ]
    return {"status": "success", "result": {"objects": objects}}


def _scene(image: str) -> Scene:
    if not image.startswith(DATA_URL):
        raise SceneError("neither an address nor a data URL")
    return read_scene(decode_base64(image[len(DATA_URL) :]))


def _poll(call: Call) -> Reply:
    task = call.path.removeprefix("/v2/task_status/")
    states = call.state.get("tasks", {}).get(task)
    if states is None:
        return _reply(10404, "Task Not Found", status=404)
    return _reply(0, "ok", states.pop(0) if len(states) > 1 else states[0])


def _reply(
    code: int,
    message: str,
    task: Any = None,
    *,
    status: int = 200,
    billed: bool = False,
) -> Reply:
    return Reply(status, {"code": code, "msg": message, "data": task}, billed=billed)
