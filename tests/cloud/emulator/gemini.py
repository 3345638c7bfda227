"""Gemini: POST /v1beta/models/{model}:generateContent. This model thinks in levels and
refuses the settings of older ones."""

from __future__ import annotations

import json
from typing import Any

from .app import TOKEN, Call, Reply, SceneError, decoded_base64, read_scene
from .google_vision import refused
from .openai_vlm import asked_classes, written

MODEL = "gemini-3.7-flash"
SETTINGS = {"responseMimeType", "responseSchema", "thinkingConfig", "maxOutputTokens"}


def answer(call: Call) -> Reply:
    if call.headers.get("x-goog-api-key") != TOKEN:
        return refused(
            400,
            "INVALID_ARGUMENT",
            "API key not valid. Please pass a valid API key.",
            reason="API_KEY_INVALID",
        )
    if (call.method, call.path) != (
        "POST",
        f"/v1beta/models/{MODEL}:generateContent",
    ) or call.query:
        return refused(
            404, "NOT_FOUND", "the model is not found for API version v1beta"
        )
    question = call.json()
    if call.media_type != "application/json" or not isinstance(question, dict):
        return refused(400, "INVALID_ARGUMENT", "Invalid JSON payload received.")
    config = question.get("generationConfig", {})
    if not config.keys() <= SETTINGS or "thinkingBudget" in config.get(
        "thinkingConfig", {}
    ):
        return refused(
            400, "INVALID_ARGUMENT", "a setting is not supported by this model"
        )
    (turn,) = question["contents"]
    picture, prompt = turn["parts"]
    try:
        scene = read_scene(decoded_base64(picture["inlineData"]["data"]))
    except SceneError:
        return refused(400, "INVALID_ARGUMENT", "Unable to process input image.")
    asked = asked_classes(prompt["text"])
    return Reply(
        200,
        generated(
            json.dumps(
                [
                    written(o, scene, "yxyx_1000")
                    for o in scene.objects
                    if o.name in asked
                ]
            )
        ),
    )


def generated(text: Any, finish_reason: str = "STOP") -> dict[str, Any]:
    """The answer that holds a text."""
    candidate = {
        "content": {"role": "model", "parts": [{"text": text}]},
        "finishReason": finish_reason,
        "index": 0,
    }
    return {"candidates": [candidate], "modelVersion": MODEL}
