"""A server with OpenAI's chat API and one model that sees. It writes boxes as it was
trained to, whatever it is told about them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Literal

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

DATA_URL = "data:image/jpeg;base64,"
Habit = Literal["xyxy_1000", "yxyx_1000", "xyxy_pixels"]


def serving(habit: Habit) -> Callable[[Call], Reply]:
    """The provider for a model that writes boxes in this way; one that writes pixels
    also puts its list into a code fence."""

    def answer(call: Call) -> Reply:
        if call.headers.get("authorization") != f"Bearer {TOKEN}":
            return _refused(401, "invalid_api_key", "Incorrect API key provided.")
        if (call.method, call.path) != ("POST", "/chat/completions"):
            return Reply(404, {"detail": "Not Found"})
        question = call.json()
        if (
            call.media_type != "application/json"
            or not isinstance(question, dict)
            or question.get("temperature") != 0
        ):
            return _refused(400, "invalid_request_error", "the body could not be read")
        (message,) = question["messages"]
        picture, prompt = message["content"]
        try:
            scene = _scene(picture["image_url"]["url"])
        except SceneError as error:
            return _refused(400, "invalid_image", f"Failed to load image: {error}")
        asked = asked_classes(prompt["text"])
        found = [written(o, scene, habit) for o in scene.objects if o.name in asked]
        text = json.dumps(found)
        return Reply(
            200, completion(f"```json\n{text}\n```" if habit == "xyxy_pixels" else text)
        )

    return answer


def asked_classes(prompt: str) -> list[str]:
    """The first JSON list in a prompt."""
    names = json.JSONDecoder().raw_decode(prompt[prompt.index("[") :])[0]
    return [str(name) for name in names]


def written(found: SceneObject, scene: Scene, habit: Habit) -> dict[str, Any]:
    x0, y0, x1, y1 = found.box
    if habit == "xyxy_pixels":
        return {"bbox_2d": [round(v) for v in found.box], "label": found.name}
    x0, x1, y0, y1 = (
        round(v)
        for v in (
            x0 / scene.width * 1000,
            x1 / scene.width * 1000,
            y0 / scene.height * 1000,
            y1 / scene.height * 1000,
        )
    )
    if habit == "yxyx_1000":
        return {"box_2d": [y0, x0, y1, x1], "label": found.name}
    return {"bbox_2d": [x0, y0, x1, y1], "label": found.name}


def completion(text: Any, finish_reason: str = "stop") -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": finish_reason,
    }
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "sees",
        "choices": [choice],
    }


def _scene(url: str) -> Scene:
    if not url.startswith(DATA_URL):
        raise SceneError("no data URL")
    return read_scene(decoded_base64(url[len(DATA_URL) :]))


def _refused(status: int, code: str, message: str) -> Reply:
    return Reply(
        status,
        {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": None,
                "code": code,
            }
        },
    )
