"""DeepDataSpace, version 2: POST a task, then GET its state until it has ended. Billed
when the task is taken on, once per key."""

from __future__ import annotations

import hashlib
from typing import Any

from .app import (
    TOKEN,
    Call,
    Reply,
    Scene,
    SceneError,
    SceneObject,
    decoded_base64,
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
}
STATES = ("waiting", "running")
"""What a task's first polls are told; ``emulator.state("dds")["states"]`` overrides it.
"""
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
    question = call.json()
    problem = _problem(call, question)
    if problem:
        return Reply(400, {"code": 10002, "msg": "Bad Request", "errors": [problem]})
    tasks = call.state.setdefault("tasks", {})
    key = call.headers.get("idempotency-key", str(len(tasks)))
    task = f"{hashlib.sha256(key.encode()).hexdigest()[:8]}-0000-4000-8000-000000000000"
    known = task in tasks
    if not known:
        tasks[task] = [
            *({"status": s} for s in call.state.get("states", STATES)),
            _result(question),
        ]
    return _reply(0, "ok", {"task_uuid": task}, billed=not known)


def _problem(call: Call, question: Any) -> str | None:
    if call.media_type != "application/json" or not isinstance(question, dict):
        return "the body is not JSON"
    if question.get("model") not in MODELS[call.path]:
        return "model is not supported"
    if question.get("prompt", {}).get("type") != "text" or question.get("targets") != [
        "bbox"
    ]:
        return "prompt or targets are not supported"
    if not all(
        isinstance(question.get(name), float) and 0 <= question[name] <= 1
        for name in ("bbox_threshold", "iou_threshold")
    ):
        return "thresholds must be in 0..1"
    return None


def _result(question: dict[str, Any]) -> dict[str, Any]:
    """The last state of a task."""
    try:
        scene = _scene(question["image"])
    except SceneError as error:
        return {"status": "failed", "error": f"failed to load the image: {error}"}
    asked = question["prompt"]["text"].split(".")
    objects = [
        _object(o)
        for o in scene.objects
        if o.name in asked and o.score >= question["bbox_threshold"]
    ]
    return {"status": "success", "result": {"objects": objects}}


def _scene(image: str) -> Scene:
    if not image.startswith(DATA_URL):
        raise SceneError("neither an address nor a data URL")
    return read_scene(decoded_base64(image[len(DATA_URL) :]))


def _object(found: SceneObject) -> dict[str, Any]:
    return {"bbox": list(found.box), "category": found.name, "score": found.score}


def _poll(call: Call) -> Reply:
    states = call.state.get("tasks", {}).get(call.path.removeprefix("/v2/task_status/"))
    if states is None:
        return _reply(10404, "Task Not Found", status=404)
    return _reply(0, "ok", states.pop(0) if len(states) > 1 else states[0])


def _reply(
    code: int,
    message: str,
    data: Any = None,
    *,
    status: int = 200,
    billed: bool = False,
) -> Reply:
    return Reply(status, {"code": code, "msg": message, "data": data}, billed=billed)
