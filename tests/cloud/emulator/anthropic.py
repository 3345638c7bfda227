"""Claude: POST /v1/messages. The model writes pixels of the image it received, and refuses
what the service would make smaller.
"""

from __future__ import annotations

import json
from typing import Any

from .app import TOKEN, Call, Reply, SceneError, decode_base64, read_scene
from .openai_vlm import box_json, parse_classes

MODEL = "claude-sonnet-5-5"
FIELDS = {"model", "max_tokens", "messages", "output_config"}
SIDE_MAX, PIXELS_MAX = 1568, 1_150_000


def answer(call: Call) -> Reply:
    if call.headers.get("x-api-key") != TOKEN:
        return _error_reply(401, "authentication_error", "invalid x-api-key")
    if (call.method, call.path) != ("POST", "/v1/messages"):
        return _error_reply(404, "not_found_error", "Not found")
    request_json = call.json()
    if (
        call.headers.get("anthropic-version") != "2023-06-01"
        or not isinstance(request_json, dict)
        or not {"model", "max_tokens", "messages"} <= request_json.keys() <= FIELDS
    ):
        return _error_reply(400, "invalid_request_error", "unexpected request")
    (turn,) = request_json["messages"]
    image_block, prompt = turn["content"]
    source = image_block["source"]
    try:
        scene = read_scene(decode_base64(source["data"]))
    except SceneError:
        return _error_reply(400, "invalid_request_error", "Could not process image")
    if max(scene.width, scene.height) > SIDE_MAX or (
        scene.width * scene.height > PIXELS_MAX
    ):
        return _error_reply(400, "invalid_request_error", "would be made smaller")
    classes = parse_classes(prompt["text"])
    detections = [
        box_json(scene_object, scene, "xyxy_pixels")
        for scene_object in scene.objects
        if scene_object.name in classes
    ]
    return Reply(200, message(json.dumps({"detections": detections})))


def message(text: Any, stop_reason: str = "end_turn") -> dict[str, Any]:
    """Return the response that contains a text."""
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": MODEL,
        "content": [{"type": "text", "text": text}],
        "stop_reason": stop_reason,
        "usage": {"input_tokens": 1200, "output_tokens": 80},
    }


def _error_reply(status: int, kind: str, text: str) -> Reply:
    return Reply(status, {"type": "error", "error": {"type": kind, "message": text}})
