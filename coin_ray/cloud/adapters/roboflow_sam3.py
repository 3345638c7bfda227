"""Adapter of SAM 3 on Roboflow's inference server: ``POST /sam3/concept_segment``.

Each class is a prompt of its own with results of its own. They are masks as polygons in
pixels of the image sent; a box is the extent of a mask. ``Query.model`` is SAM 3's model
id.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coin_ray.cloud.adapters.parsing import (
    ParsedBox,
    expect_list,
    expect_numbers,
    expect_object,
    expect_score,
    load_json,
    map_detections,
    raise_malformed,
    sanitize_text,
)
from coin_ray.cloud.adapters.prompts import check_class_names
from coin_ray.cloud.adapters.roboflow import classify_roboflow_error
from coin_ray.cloud.protocol import (
    Auth,
    Capabilities,
    Frame,
    PreparedRequest,
    Query,
    RawDetections,
)
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import CloudError

PROMPTS_MAX = 16
SCORE_MIN = 0.05
"""Below this the server finds most pixels."""


@dataclass(frozen=True)
class RoboflowSam3Adapter:
    """SAM 3 behind Roboflow's inference server. ``key_in_body``: the key is sent in the
    body, for servers that do not read the header.
    """

    key_in_body: bool = False

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "roboflow-sam3",
            open_vocabulary=True,
            per_class_scores=False,
            idempotent=False,
            url="https://serverless.roboflow.com",
            auth=Auth(json_key="api_key") if self.key_in_body else Auth(),
            max_bytes=14_000_000,
            score_min=SCORE_MIN,
            phrases_per_call=PROMPTS_MAX,
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        check_class_names(query.classes)
        body = {
            "image": {"type": "base64", "value": base64.b64encode(image.data).decode()},
            "prompts": [{"type": "text", "text": name} for name in query.classes],
            "format": "polygon",
            "output_prob_thresh": max(SCORE_MIN, float(query.score_min)),
        }
        if query.model != "default":
            body["model_id"] = query.model
        return PreparedRequest("/sam3/concept_segment", json.dumps(body).encode())

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        """Parse a response, which has a list for every prompt."""
        response = expect_object(load_json(headers, body), "the response")
        nodes = expect_list(response.get("prompt_results"), "prompt_results")
        if len(nodes) != len(query.classes):
            raise_malformed(
                f"{len(nodes)} prompt_results for {len(query.classes)} prompts"
            )
        boxes: list[ParsedBox] = []
        for number, node in enumerate(nodes):
            field = f"prompt_results[{number}]"
            prompt_result = expect_object(node, field)
            _check_prompt(prompt_result, number, query.classes[number], field)
            predictions = expect_list(
                prompt_result.get("predictions"), f"{field}.predictions"
            )
            boxes += [
                _parse_box(prediction, query.classes[number], f"{field}.predictions")
                for prediction in predictions
            ]
        return map_detections(boxes, "xyxy", query, frame, "label", expects_names=True)

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        return classify_roboflow_error(status, headers, body)


def _check_prompt(result: Any, number: int, name: str, field: str) -> None:
    """Raise ``ProtocolError`` unless the results are those of this prompt."""
    index = result.get("prompt_index")
    if isinstance(index, bool) or index != number:
        raise_malformed(f"{field}.prompt_index is {sanitize_text(str(index))[:20]}")
    echo = result.get("echo")
    text = echo.get("text") if isinstance(echo, dict) else None
    if text is not None and text != name:
        raise_malformed(f"{field} answers another prompt, expected {name[:60]!r}")


def _parse_box(node: Any, name: str, field: str) -> ParsedBox:
    """Return the extent of a mask: polygons of at least three points."""
    prediction = expect_object(node, field)
    if prediction.get("format", "polygon") != "polygon":
        raise_malformed(f"{field}.format is not polygon")
    points: list[list[float]] = []
    for polygon in expect_list(prediction.get("masks"), f"{field}.masks"):
        for point in expect_list(polygon, f"{field}.masks"):
            points.append(expect_numbers(point, 2, f"{field}.masks"))
    if len(points) < 3:
        raise_malformed(f"{field} has a mask of {len(points)} points, expected 3")
    columns, rows = zip(*points, strict=True)
    extent = (min(columns), min(rows), max(columns), max(rows))
    score = expect_score(prediction.get("confidence"), f"{field}.confidence")
    return ParsedBox(extent, [name], score)
