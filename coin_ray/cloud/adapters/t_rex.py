"""Adapter of T-Rex2 behind DeepDataSpace's API: classes are shown by boxes on other
images, not named.

``POST /v2/task/trex/detection`` creates a task, which is polled as those of ``dds``.
Each class is a number in request and response.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coin_ray.cloud.adapters.dds import MERGE_IOU, DdsAdapter
from coin_ray.cloud.adapters.parsing import (
    ParsedBox,
    expect_list,
    expect_number,
    expect_numbers,
    expect_object,
    expect_score,
    map_detections,
    raise_malformed,
)
from coin_ray.cloud.adapters.prompts import check_class_names
from coin_ray.cloud.label_map import LabelMap
from coin_ray.cloud.protocol import (
    Auth,
    Capabilities,
    Frame,
    Pending,
    PreparedRequest,
    Query,
    RawDetections,
)
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import BadRequest, CloudError
from coin_ray.storage import JsonObject

SIDE_MAX = 1333
Rectangle = tuple[float, float, float, float]


@dataclass(frozen=True)
class Exemplar:
    """An image file with boxes of labels: xyxy pixels of that image."""

    data: bytes = field(repr=False)
    media_type: str
    boxes: tuple[tuple[str, Rectangle], ...]


@dataclass(frozen=True)
class TRexAdapter:
    """T-Rex2, which is shown the classes by exemplars."""

    exemplars: tuple[Exemplar, ...]

    @property
    def capabilities(self) -> Capabilities:
        digest = hashlib.sha256()
        for exemplar in self.exemplars:
            digest.update(exemplar.data + repr(exemplar.boxes).encode())
        return Capabilities(
            "t-rex",
            open_vocabulary=True,
            per_class_scores=False,
            idempotent=True,
            url="https://api.deepdataspace.com",
            auth=Auth("Token", ""),
            max_side=SIDE_MAX,
            asynchronous=True,
            reads_names=False,
            key_settings=(("exemplars", digest.hexdigest()[:16]),),
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        """Build the request that creates a task. Raises ``BadRequest`` for a class of
        which no exemplar has a box.
        """
        check_class_names(query.classes)
        body = {
            "model": "T-Rex-2.0" if query.model == "default" else query.model,
            "image": _data_url(image.media_type, image.data),
            "targets": ["bbox"],
            "bbox_threshold": float(query.score_min),
            "iou_threshold": MERGE_IOU,
            "prompt": {
                "type": "visual_images",
                "visual_images": self._visual_images(query.classes),
            },
        }
        return PreparedRequest("/v2/task/trex/detection", json.dumps(body).encode())

    def _visual_images(self, classes: Sequence[str]) -> list[JsonObject]:
        """Return the exemplars with the boxes of these classes, numbered from 1."""
        labels = LabelMap.of_classes(classes)
        visual_images: list[JsonObject] = []
        shown = set()
        for exemplar in self.exemplars:
            interactions = []
            for label, rectangle in exemplar.boxes:
                match = labels.find([label])
                if match is None:
                    continue
                shown.add(match[0])
                interactions.append(
                    {
                        "type": "rect",
                        "category_id": match[0] + 1,
                        "rect": list(rectangle),
                    }
                )
            if interactions:
                url = _data_url(exemplar.media_type, exemplar.data)
                visual_images.append({"image": url, "interactions": interactions})
        missing = [name for k, name in enumerate(classes) if k not in shown]
        if missing:
            raise BadRequest(
                "cloud.exemplars have no box of the class"
                f" {', '.join(missing)[:200]}: label one on any image"
            )
        return visual_images

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections | Pending:
        task = DdsAdapter("dino-x").decode_task(headers, body)
        if isinstance(task, Pending):
            return task
        objects = expect_list(task.get("objects"), "data.result.objects")
        boxes = []
        for number, node in enumerate(objects):
            field_name = f"objects[{number}]"
            json_object = expect_object(node, field_name)
            category = expect_number(
                json_object.get("category_id"), f"{field_name}.category_id"
            )
            if category not in range(1, len(query.classes) + 1):
                raise_malformed(f"{field_name}.category_id is {category:g}")
            box = expect_numbers(json_object.get("bbox"), 4, f"{field_name}.bbox")
            score = expect_score(json_object.get("score"), f"{field_name}.score")
            boxes.append(ParsedBox(box, [query.classes[int(category) - 1]], score))
        return map_detections(boxes, "xyxy", query, frame, "label", expects_names=True)

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        return DdsAdapter("dino-x").classify_error(status, headers, body)


def _data_url(media_type: str, data: bytes) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"
