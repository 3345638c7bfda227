"""Gemini: POST /v1beta/models/{model}:generateContent. This model has thinking levels and
rejects the settings of older ones.
"""

from __future__ import annotations

import json
from typing import Any

from .app import TOKEN, Call, Reply, SceneError, decode_base64, read_scene
from .google_vision import error_reply
from .openai_vlm import box_json, parse_classes

MODEL = "gemini-3.8-flash"
SETTINGS = {"responseMimeType", "responseSchema", "thinkingConfig", "maxOutputTokens"}


def answer(call: Call) -> Reply:
    if call.headers.get("x-goog-api-key") != TOKEN:
        return error_reply(
            400,
            "INVALID_ARGUMENT",
            "API key not valid. Please pass a valid API key.",
            reason="API_KEY_INVALID",
        )
    path = f"/v1beta/models/{MODEL}:generateContent"
    if (call.method, call.path) != ("POST", path) or call.query:
        return error_reply(
            404, "NOT_FOUND", "the model is not found for API version v1beta"
        )
    request_json = call.json()
    if call.media_type != "application/json" or not isinstance(request_json, dict):
        return error_reply(400, "INVALID_ARGUMENT", "Invalid JSON payload received.")
    config = request_json.get("generationConfig", {})
    thinking_config = config.get("thinkingConfig", {})
    if not config.keys() <= SETTINGS or "thinkingBudget" in thinking_config:
        return error_reply(
            400, "INVALID_ARGUMENT", "a setting is not supported by this model"
        )
    (turn,) = request_json["contents"]
    image_part, prompt = turn["parts"]
    try:
        scene = read_scene(decode_base64(image_part["inlineData"]["data"]))
    except SceneError:
        return error_reply(400, "INVALID_ARGUMENT", "Unable to process input image.")
    classes = parse_classes(prompt["text"])
    detections = [
        box_json(scene_object, scene, "yxyx_1000")
        for scene_object in scene.objects
        if scene_object.name in classes
    ]
    return Reply(200, generated(json.dumps(detections)))


def generated(text: Any, finish_reason: str = "STOP") -> dict[str, Any]:
    """Return the response that contains a text."""
    candidate = {
        "content": {"role": "model", "parts": [{"text": text}]},
        "finishReason": finish_reason,
        "index": 0,
    }
    return {"candidates": [candidate], "modelVersion": MODEL}
