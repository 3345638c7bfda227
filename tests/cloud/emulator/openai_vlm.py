"""A server with OpenAI's chat API and one vision language model. The model writes boxes as
it was trained to, whatever the prompt says about them.
"""

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
    decode_base64,
    read_scene,
)

DATA_URL = "data:image/jpeg;base64,"
Coordinates = Literal[
    "xyxy_1000", "yxyx_1000", "xyxy_pixels", "xyxy_ratio", "xyxy_percent"
]


def serving(coordinates: Coordinates) -> Callable[[Call], Reply]:
    """Return the provider for a model that writes boxes in these coordinates; one that
    writes pixels also puts its list into a code fence.
    """

    def answer(call: Call) -> Reply:
        if call.headers.get("authorization") != f"Bearer {TOKEN}":
            return _error_reply(401, "invalid_api_key", "Incorrect API key provided.")
        if (call.method, call.path) != ("POST", "/chat/completions"):
            return Reply(404, {"detail": "Not Found"})
        request_json = call.json()
        if (
            call.media_type != "application/json"
            or not isinstance(request_json, dict)
            or request_json.get("temperature") != 0
        ):
            return _error_reply(
                400, "invalid_request_error", "the body could not be read"
            )
        (message,) = request_json["messages"]
        image_part, prompt = message["content"]
        try:
            scene = _scene(image_part["image_url"]["url"])
        except SceneError as error:
            return _error_reply(400, "invalid_image", f"Failed to load image: {error}")
        classes = parse_classes(prompt["text"])
        detections = [
            box_json(scene_object, scene, coordinates)
            for scene_object in scene.objects
            if scene_object.name in classes
        ]
        text = json.dumps(detections)
        if coordinates == "xyxy_pixels":
            text = f"```json\n{text}\n```"
        return Reply(200, completion(text))

    return answer


def parse_classes(prompt: str) -> list[str]:
    """Return the first JSON list in a prompt."""
    names = json.JSONDecoder().raw_decode(prompt[prompt.index("[") :])[0]
    return [str(name) for name in names]


def box_json(
    scene_object: SceneObject, scene: Scene, coordinates: Coordinates
) -> dict[str, Any]:
    """Return a box as the model writes it."""
    if coordinates == "xyxy_pixels":
        pixels = [round(edge) for edge in scene_object.box]
        return {"bbox_2d": pixels, "label": scene_object.name}
    if coordinates == "xyxy_ratio":
        shares = [round(ratio, 4) for ratio in scene.ratios(scene_object)]
        return {"bbox_2d": shares, "label": scene_object.name}
    if coordinates == "xyxy_percent":
        percents = [round(100 * ratio, 1) for ratio in scene.ratios(scene_object)]
        return {"bbox_2d": percents, "label": scene_object.name}
    x0, y0, x1, y1 = (round(ratio * 1000) for ratio in scene.ratios(scene_object))
    if coordinates == "yxyx_1000":
        return {"box_2d": [y0, x0, y1, x1], "label": scene_object.name}
    return {"bbox_2d": [x0, y0, x1, y1], "label": scene_object.name}


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
    return read_scene(decode_base64(url[len(DATA_URL) :]))


def _error_reply(status: int, code: str, message: str) -> Reply:
    error = {
        "message": message,
        "type": "invalid_request_error",
        "param": None,
        "code": code,
    }
    return Reply(status, {"error": error})
