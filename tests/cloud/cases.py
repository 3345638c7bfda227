"""The adapters that ``test_adapters.py`` tests by one table. To add one, add a ``Case`` to
``CASES`` and a provider to ``emulator``."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from coin_ray.cloud.adapters.anthropic import AnthropicAdapter
from coin_ray.cloud.adapters.azure_vision import AzureVisionAdapter
from coin_ray.cloud.adapters.dds import DdsAdapter
from coin_ray.cloud.adapters.gemini import GeminiAdapter
from coin_ray.cloud.adapters.google_vision import GoogleVisionAdapter
from coin_ray.cloud.adapters.hf_endpoint import HfEndpointAdapter
from coin_ray.cloud.adapters.model_families import Coordinates
from coin_ray.cloud.adapters.openai_vlm import OpenAiVlmAdapter
from coin_ray.cloud.adapters.reference import ReferenceAdapter
from coin_ray.cloud.adapters.rekognition import RekognitionAdapter
from coin_ray.cloud.adapters.roboflow import RoboflowAdapter
from coin_ray.cloud.adapters.roboflow_sam3 import RoboflowSam3Adapter
from coin_ray.cloud.adapters.t_rex import Exemplar, TRexAdapter
from coin_ray.cloud.label_map import LabelMap
from coin_ray.cloud.protocol import (
    Adapter,
    FieldRefused,
    PreparedRequest,
    Query,
    ScoreKind,
)
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import (
    AuthError,
    BadRequest,
    CloudError,
    ImageRejected,
    ProtocolError,
    QuotaExhausted,
    Refused,
    Throttled,
    Transient,
)

from .emulator.anthropic import message
from .emulator.app import SCENE_CLASSES, scene
from .emulator.gemini import generated
from .emulator.openai_vlm import completion
from .emulator.roboflow_sam3 import mask, prompt_result

CLASSES = ("car", "bus", "dog")
"""The run's classes; each is one of the emulator's SCENE_CLASSES."""
SIZE = (600, 400)
"""Width and height of the image sent in the rows that need no emulator."""
GOLDEN_IMAGE = CanonicalImage(
    b"\xff\xd8image\xff\xd9", "image/jpeg", *SIZE, SIZE, "0" * 64
)
GOLDEN_BASE64 = "/9hpbWFnZf/Z"
Row = Literal[
    "A1",
    "A2",
    "A3",
    "A4",
    "A5",
    "A6",
    "A7",
    "A8",
    "B1",
    "B4",
    "C1",
    "C4",
    "E1",
    "E2",
    "E3",
    "E4",
    "E5",
    "F5",
]


@dataclass(frozen=True, slots=True)
class Truth:
    """One object of a response to build: the service's name for it, xyxy pixels of the
    image sent, score in 0..1.

    ``score`` may be anything in row A8; then the response has it unchanged.
    """

    name: str
    box: tuple[float, float, float, float]
    score: Any = 0.5


@dataclass(frozen=True, slots=True)
class LabelCase:
    """Row A6: a response with difficult names, the classes of its boxes (best first), the
    unmapped names, the scores.
    """

    description: str
    response: Any
    classes: tuple[str, ...]
    unmapped: tuple[str, ...] = ()
    scores: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class Failure:
    """Rows B4, C1, C4: the response of a failed call, and the error it stands for.
    ``body``: bytes, or a value for JSON.
    """

    row: Literal["B4", "C1", "C4"]
    status: int
    body: Any
    kind: type[CloudError]
    headers: Mapping[str, str] = field(default_factory=dict)
    wait: float | None = None


@dataclass(frozen=True)
class Case:
    """One adapter and the particulars of its service."""

    name: str
    adapter: Adapter
    provider: str
    """The service's name in the emulator's PROVIDERS."""
    names: Mapping[str, str]
    """The service's name for each of CLASSES."""
    answer: Callable[[Sequence[Truth], tuple[int, int]], Any]
    """Builds a valid response for objects in an image of that size."""
    golden: PreparedRequest
    """The whole request for GOLDEN_IMAGE, CLASSES, the default model and lowest score
    0.05."""
    content_type: str = "application/json"
    """Media type of the service's responses."""
    labels: LabelMap | None = None
    optional: frozenset[str] = frozenset()
    """Row E2: keys that a valid response may omit."""
    further: tuple[Any, ...] = ()
    """Row E1: other valid responses to truncate, for example one that names a task."""
    label_rows: tuple[LabelCase, ...] = ()
    failures: tuple[Failure, ...] = ()
    embedded: tuple[tuple[Any, type[CloudError]], ...] = ()
    """Row E4: responses of status 200 that are errors."""
    refused_classes: tuple[tuple[str, ...], ...] = ()
    """Row A5: class lists that the adapter must refuse; it may refuse others."""
    broken: Mapping[str, Any] = field(default_factory=dict)
    """Row E2: further responses that must be ProtocolErrors."""
    pixel_rounding: float = 0.0
    """Largest error of an edge by the service's own rounding, in pixels of the image
    sent.
    """
    ratio_rounding: float = 0.0
    """The same as a share of the image's side."""
    score_kind: ScoreKind = "label"
    """Kind of the scores in ``answer``."""
    skips: Mapping[Row, str] = field(default_factory=dict)
    """Rows that cannot apply, each with the reason."""
    answer_about: Callable[[Sequence[Truth], Sequence[str]], Any] | None = None
    """Builds a valid response to other classes, where it depends on them."""

    def respond(self, objects: Sequence[Truth], classes: Sequence[str]) -> Any:
        """Build a valid response for objects in an image of SIZE."""
        if self.answer_about is not None:
            return self.answer_about(objects, classes)
        return self.answer(objects, SIZE)

    @property
    def scored(self) -> bool:
        """Whether a box's score is the service's own and is passed on unchanged."""
        return self.score_kind != "none"

    def query(self, classes: tuple[str, ...] = CLASSES) -> Query:
        labels = self.labels if classes == CLASSES else None
        return Query("default", classes, 0.05, labels)

    def rounding(self, size: tuple[int, int]) -> tuple[float, float]:
        """Return the largest errors of x and y, in pixels of the image sent, that the
        wire format causes.
        """
        width, height = size
        return (
            self.pixel_rounding + self.ratio_rounding * width,
            self.pixel_rounding + self.ratio_rounding * height,
        )


def percent(score: Any) -> Any:
    return score * 100 if isinstance(score, float) else score


def ratios(box: Sequence[float], size: tuple[int, int]) -> list[float]:
    return [edge / side for edge, side in zip(box, size * 2, strict=True)]


def label_map(**names: str) -> LabelMap:
    """Return the map in which the service's names mean the classes; class = name."""
    return LabelMap.of_classes([names.get(c, c) for c in CLASSES])


def request(
    path: str, body: Any, content_type: str = "application/json", **headers: str
) -> PreparedRequest:
    """Build a golden request, whose image is GOLDEN_BASE64. ``body``: bytes, or a value
    for JSON.
    """
    encoded = body if isinstance(body, bytes) else json.dumps(body).encode()
    return PreparedRequest(path, encoded, content_type, headers)


def dds(family: Literal["dino-x", "grounding-dino"], path: str, model: str) -> Case:
    golden = {
        "model": model,
        "image": f"data:image/jpeg;base64,{GOLDEN_BASE64}",
        "prompt": {"type": "text", "text": "car.bus.dog"},
        "targets": ["bbox"],
        "bbox_threshold": 0.05,
        "iou_threshold": 0.8,
    }
    return Case(
        family,
        DdsAdapter(family),
        "dds",
        {name: name for name in CLASSES},
        dds_answer,
        request(path, golden),
        further=(
            {
                "code": 0,
                "msg": "ok",
                "data": {"task_uuid": "092ccde4-a51a-489b-b384-9c4ba8af7375"},
            },
        ),
        label_rows=(
            LabelCase(
                "merged phrase",
                dds_answer(
                    [Truth("car bus", (1, 2, 30, 40)), Truth("dog", (5, 5, 50, 50))]
                ),
                ("dog",),
                ("car bus",),
            ),
            LabelCase(
                "no substrings",
                dds_answer(
                    [
                        Truth("carpet", (1, 2, 30, 40)),
                        Truth("bus stop", (1, 2, 30, 40)),
                        Truth("dog", (1, 2, 30, 40)),
                    ]
                ),
                ("dog",),
                ("carpet", "bus stop"),
            ),
            LabelCase("case", dds_answer([Truth("Car", (1, 2, 30, 40))]), ("car",)),
        ),
        failures=(
            Failure("B4", 401, {"code": 10001, "msg": "Token is invalid"}, AuthError),
            Failure("B4", 401, b"<html>", AuthError),
            Failure("B4", 403, {}, AuthError),
            Failure("B4", 200, {"code": 10001, "msg": "Token has expired"}, AuthError),
            Failure(
                "B4",
                400,
                {"code": 1, "msg": "Bad Request", "errors": ["model is not supported"]},
                BadRequest,
            ),
            Failure(
                "B4",
                400,
                {"code": 1, "msg": "Bad Request", "errors": ["image can't be decoded"]},
                ImageRejected,
            ),
            Failure("B4", 404, {"code": 1, "msg": "Resource Not Found"}, BadRequest),
            Failure(
                "C1", 200, {"code": 5, "msg": "Token exceeds Rate Limit"}, Throttled
            ),
            Failure(
                "C1", 400, {"code": 5, "msg": "Token exceeds Rate Limit"}, Throttled
            ),
            Failure(
                "C1",
                400,
                {"code": 5, "msg": "Token exceeds Rate Limit"},
                Throttled,
                {"retry-after": "4"},
                4.0,
            ),
            Failure("C1", 200, {"code": 202001, "msg": "busy"}, Throttled),
            Failure(
                "C4", 200, {"code": 5, "msg": "Token out of Quota"}, QuotaExhausted
            ),
            Failure(
                "C4", 400, {"code": 5, "msg": "Token out of Quota"}, QuotaExhausted
            ),
            Failure(
                "C4", 429, {"code": 5, "msg": "Token out of Quota"}, QuotaExhausted
            ),
        ),
        embedded=(
            (
                {
                    "code": 7,
                    "msg": "something new",
                    "data": {"status": "success", "result": {"objects": []}},
                },
                ProtocolError,
            ),
            ({"code": 7, "msg": "image is too large"}, ImageRejected),
            (
                {
                    "code": 0,
                    "data": {"status": "failed", "error": "failed to decode image"},
                },
                ImageRejected,
            ),
            (
                {
                    "code": 0,
                    "data": {"status": "failed", "error": "CUDA out of memory"},
                },
                Transient,
            ),
            ({"code": 0, "data": {"status": "failed"}}, Transient),
        ),
        refused_classes=(
            (),
            ("",),
            ("car", " "),
            ("St. Bernard",),
            ("what?",),
            ("car", "Car"),
            ("fire truck", "fire_truck"),
            ("a\nb",),
        ),
        broken={
            "no code": {
                "msg": "ok",
                "data": {"status": "success", "result": {"objects": []}},
            },
            "code is a text": {
                "code": "0",
                "data": {"status": "success", "result": {"objects": []}},
            },
            "unknown state": {
                "code": 0,
                "data": {"status": "paused", "result": {"objects": []}},
            },
            "no state": {"code": 0, "data": {}},
            "task is a path": {
                "code": 0,
                "data": {"task_uuid": "../v2/task/dinox/detection"},
            },
            "task is empty": {"code": 0, "data": {"task_uuid": ""}},
            "no result": {"code": 0, "data": {"status": "success"}},
            "result is null": {
                "code": 0,
                "data": {"status": "success", "result": None},
            },
            "box of three": {
                "code": 0,
                "data": {
                    "status": "success",
                    "result": {
                        "objects": [
                            {"bbox": [1, 2, 3], "category": "car", "score": 0.5}
                        ]
                    },
                },
            },
            "box of five": {
                "code": 0,
                "data": {
                    "status": "success",
                    "result": {
                        "objects": [
                            {"bbox": [1, 2, 3, 4, 5], "category": "car", "score": 0.5}
                        ]
                    },
                },
            },
        },
    )


def dds_answer(objects: Sequence[Truth], size: tuple[int, int] = SIZE) -> Any:
    detections = []
    for truth in objects:
        detections.append(
            {"bbox": list(truth.box), "category": truth.name, "score": truth.score}
        )
    task = {"status": "success", "result": {"objects": detections}}
    return {"code": 0, "msg": "ok", "data": task}


def google_vision() -> Case:
    mids = {"car": "/m/0k4j", "bus": "/m/01bjv", "dog": "/m/0bt9lr"}
    no_name = {
        "score": 0.5,
        "boundingPoly": {
            "normalizedVertices": [{}, {"x": 1}, {"x": 1, "y": 1}, {"y": 1}]
        },
    }
    three_vertices = {
        "mid": "/m/0k4j",
        "score": 0.5,
        "boundingPoly": {"normalizedVertices": [{}, {"x": 1}, {"x": 1, "y": 1}]},
    }
    in_pixels = {
        "mid": "/m/0k4j",
        "score": 0.5,
        "boundingPoly": {"vertices": [{}, {"x": 9}, {"x": 9, "y": 9}, {"y": 9}]},
    }

    def response_with(*annotations: Any) -> Any:
        return {"responses": [{"localizedObjectAnnotations": list(annotations)}]}

    def throttled(message: str, *details: Any) -> Any:
        return {
            "error": {
                "code": 429,
                "status": "RESOURCE_EXHAUSTED",
                "message": message,
                "details": list(details),
            }
        }

    delay = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}
    per_minute = (
        "Quota exceeded for quota metric 'Requests' and limit 'Requests per minute' of"
        " service 'vision.googleapis.com'."
    )
    per_day = (
        "Quota exceeded for quota metric 'All requests' and limit 'All requests per"
        " day' of service 'vision.googleapis.com'."
    )
    full_box = ((0, 0, 600, 400),)
    return Case(
        "google-vision",
        GoogleVisionAdapter(),
        "google-vision",
        mids,
        google_answer,
        request(
            "/v1/images:annotate",
            {
                "requests": [
                    {
                        "image": {"content": GOLDEN_BASE64},
                        "features": [
                            {"type": "OBJECT_LOCALIZATION", "maxResults": 500}
                        ],
                    }
                ]
            },
        ),
        labels=label_map(**mids),
        optional=frozenset(
            {"localizedObjectAnnotations", "mid", "name", "score", "x", "y"}
        ),
        label_rows=(
            LabelCase(
                "a score of zero is left out",
                response_with(
                    {k: v for k, v in no_name.items() if k != "score"}
                    | {"mid": "/m/0k4j"}
                ),
                ("car",),
                scores=(0.0,),
            ),
            LabelCase(
                "name without mid",
                response_with({**no_name, "name": "/m/0k4j"}),
                ("car",),
            ),
            LabelCase(
                "mid before name",
                response_with({**no_name, "mid": "/m/0k4j", "name": "/m/01bjv"}),
                ("car",),
            ),
            LabelCase(
                "name if the mid is not mapped",
                response_with({**no_name, "mid": "/m/zzz", "name": "/m/01bjv"}),
                ("bus",),
            ),
            LabelCase(
                "unmapped",
                google_answer(
                    [Truth("/m/09j2d", *full_box), Truth("/m/0bt9lr", *full_box)]
                ),
                ("dog",),
                ("/m/09j2d",),
            ),
        ),
        failures=(
            Failure(
                "B4",
                400,
                {
                    "error": {
                        "code": 400,
                        "message": "API key not valid. Please pass a valid API key.",
                    }
                },
                AuthError,
            ),
            Failure(
                "B4",
                401,
                {
                    "error": {
                        "code": 401,
                        "message": "Request had invalid authentication credentials.",
                    }
                },
                AuthError,
            ),
            Failure(
                "B4",
                403,
                {
                    "error": {
                        "code": 403,
                        "message": (
                            "Cloud Vision API has not been used in project 1 before."
                        ),
                    }
                },
                AuthError,
            ),
            Failure("B4", 403, b"<html>", AuthError),
            Failure(
                "B4",
                400,
                {
                    "error": {
                        "code": 400,
                        "message": (
                            "Request payload size exceeds the limit: 10485760 bytes."
                        ),
                    }
                },
                ImageRejected,
            ),
            Failure(
                "B4",
                400,
                {"error": {"code": 400, "message": "Invalid JSON payload received."}},
                BadRequest,
            ),
            Failure("B4", 400, {"error": "text"}, BadRequest),
            Failure("B4", 413, b"<html>", ImageRejected),
            Failure("C1", 429, throttled(per_minute), Throttled),
            Failure("C1", 429, throttled(per_minute, delay), Throttled, wait=34.0),
            Failure(
                "C1",
                429,
                throttled(per_minute, {"retryDelay": "1.5s"}),
                Throttled,
                wait=1.5,
            ),
            Failure(
                "C1",
                429,
                throttled(per_minute, {"retryDelay": "900s"}),
                Throttled,
                wait=900.0,
            ),
            Failure(
                "C1",
                429,
                throttled(per_minute, delay),
                Throttled,
                {"retry-after": "2"},
                2.0,
            ),
            Failure(
                "C1",
                429,
                throttled(per_minute, 3, {"retryDelay": 34}, {"retryDelay": "soon"}),
                Throttled,
            ),
            Failure(
                "C1",
                200,
                {"responses": [{"error": {"code": 8, "message": "slow down"}}]},
                Throttled,
            ),
            Failure("C4", 429, throttled(per_day), QuotaExhausted),
            Failure(
                "C4",
                429,
                throttled(
                    "exhausted",
                    {"violations": [{"quotaId": "RequestsPerDayPerProject"}]},
                ),
                QuotaExhausted,
            ),
            Failure(
                "C4",
                403,
                {
                    "error": {
                        "code": 403,
                        "message": "This API method requires billing to be enabled.",
                    }
                },
                QuotaExhausted,
            ),
        ),
        embedded=(
            (
                {"responses": [{"error": {"code": 3, "message": "Bad image data."}}]},
                ImageRejected,
            ),
            (
                {"responses": [{"error": {"code": 13, "message": "Internal"}}]},
                Transient,
            ),
            (
                {"responses": [{"error": {"code": 14, "message": "Unavailable"}}]},
                Transient,
            ),
            ({"responses": [{"error": {"code": 7, "message": "Denied"}}]}, AuthError),
            (
                {
                    "responses": [
                        {"error": {"code": 99}, "localizedObjectAnnotations": []}
                    ]
                },
                ProtocolError,
            ),
            ({"responses": [{"error": {}}]}, ProtocolError),
        ),
        broken={
            "empty": {},
            "no responses": {"responses": []},
            "two responses": {"responses": [{}, {}]},
            "no names": response_with(no_name),
            "three vertices": response_with(three_vertices),
            "five vertices": response_with(
                {
                    **no_name,
                    "mid": "x",
                    "boundingPoly": {"normalizedVertices": [{}] * 5},
                }
            ),
            "pixels": response_with(in_pixels),
            "no polygon": response_with({"mid": "/m/0k4j", "score": 0.5}),
        },
    )


def google_answer(objects: Sequence[Truth], size: tuple[int, int] = SIZE) -> Any:
    annotations = []
    for truth in objects:
        x0, y0, x1, y1 = ratios(truth.box, size)
        vertices = []
        for x, y in ((x0, y0), (x1, y0), (x1, y1), (x0, y1)):
            vertex = {"x": x, "y": y}
            vertices.append({key: ratio for key, ratio in vertex.items() if ratio})
        annotations.append(
            {
                "mid": truth.name,
                "name": "Thing",
                "score": truth.score,
                "boundingPoly": {"normalizedVertices": vertices},
            }
        )
    response = {"localizedObjectAnnotations": annotations} if annotations else {}
    return {"responses": [response]}


def rekognition() -> Case:
    golden = {
        "Image": {"Bytes": GOLDEN_BASE64},
        "MaxLabels": 1000,
        "MinConfidence": 5.0,
        "Features": ["GENERAL_LABELS"],
    }

    def label(
        name: str,
        *boxes: tuple[float, float],
        parents: Sequence[str] = (),
        aliases: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Return one label. ``boxes``: left side and confidence of each."""
        instances = []
        for x0, score in boxes:
            box = {"Left": x0, "Top": 0.1, "Width": 0.2, "Height": 0.3}
            instances.append({"BoundingBox": box, "Confidence": score})
        return {
            "Name": name,
            "Confidence": 90.0,
            "Instances": instances,
            "Parents": [{"Name": parent} for parent in parents],
            "Aliases": [{"Name": alias} for alias in aliases],
        }

    def refused(name: str, key: str = "message") -> Any:
        return {"__type": name, key: "why"}

    return Case(
        "rekognition",
        RekognitionAdapter(),
        "rekognition",
        {"car": "Car", "bus": "Bus", "dog": "Dog"},
        rekognition_answer,
        request(
            "/",
            golden,
            "application/x-amz-json-1.1",
            **{"X-Amz-Target": "RekognitionService.DetectLabels"},
        ),
        content_type="application/x-amz-json-1.1",
        optional=frozenset({"Instances", "Parents", "Aliases"}),
        label_rows=(
            LabelCase("no boxes", {"Labels": [label("Road"), label("Car")]}, ()),
            LabelCase(
                "alias",
                {"Labels": [label("Automobile", (0.1, 70.0), aliases=["Car"])]},
                ("car",),
            ),
            LabelCase(
                "parent",
                {"Labels": [label("Poodle", (0.1, 70.0), parents=["Dog", "Animal"])]},
                ("dog",),
            ),
            LabelCase(
                "the child is a class, so its parent is not used",
                {"Labels": [label("Bus", (0.1, 70.0), parents=["Car"])]},
                ("bus",),
            ),
            LabelCase(
                "the nearest ancestor, in whatever order they come",
                {
                    "Labels": [
                        label("Minibus", (0.1, 70.0), parents=["Car", "Bus"]),
                        label("Bus", parents=["Car"]),
                        label("Car"),
                    ]
                },
                ("bus",),
            ),
            LabelCase(
                "child and ancestor on one box",
                {
                    "Labels": [
                        label("Car", (0.1, 99.0), (0.5, 80.0)),
                        label("Bus", (0.1, 70.0), parents=["Car"]),
                    ]
                },
                ("car", "bus"),
            ),
            LabelCase(
                "the one that is a class wins over its child",
                {
                    "Labels": [
                        label("Poodle", (0.1, 99.0), parents=["Dog", "Pet"]),
                        label("Dog", (0.1, 60.0), parents=["Pet"]),
                        label("Pet", (0.1, 99.0)),
                    ]
                },
                ("dog",),
                scores=(0.6,),
            ),
            LabelCase(
                "unmapped, counted once",
                {
                    "Labels": [
                        label("Oak", (0.1, 9.0), parents=["Tree"]),
                        label("Tree", (0.1, 9.0)),
                    ]
                },
                (),
                ("Oak",),
            ),
            LabelCase(
                "two names without kinship",
                {"Labels": [label("Car", (0.1, 90.0)), label("Dog", (0.1, 80.0))]},
                ("car", "dog"),
            ),
        ),
        failures=(
            *(
                Failure("B4", 400, refused(f"{name}Exception"), AuthError)
                for name in (
                    "AccessDenied",
                    "UnrecognizedClient",
                    "InvalidSignature",
                    "ExpiredToken",
                    "IncompleteSignature",
                )
            ),
            Failure(
                "B4",
                400,
                {
                    "__type": "com.amazon.coral.service#UnrecognizedClientException",
                    "Message": "The token is invalid.",
                },
                AuthError,
            ),
            Failure("B4", 403, b"", AuthError),
            Failure("B4", 400, refused("ImageTooLargeException"), ImageRejected),
            Failure(
                "B4",
                400,
                refused("InvalidImageFormatException", "Message"),
                ImageRejected,
            ),
            Failure(
                "B4",
                400,
                {
                    "__type": "ValidationException",
                    "message": "Value at 'image.bytes' failed: length <= 5242880",
                },
                ImageRejected,
            ),
            Failure("B4", 400, refused("InvalidParameterException"), BadRequest),
            Failure("B4", 400, {"__type": 7}, BadRequest),
            Failure("B4", 500, refused("InternalServerError"), Transient),
            Failure("B4", 400, refused("ResourceNotReadyException"), Transient),
            Failure("C1", 400, refused("ThrottlingException"), Throttled),
            Failure(
                "C1",
                400,
                refused("ThrottlingException"),
                Throttled,
                {"retry-after": "3"},
                3.0,
            ),
            Failure(
                "C1", 400, refused("ProvisionedThroughputExceededException"), Throttled
            ),
            Failure(
                "C1",
                400,
                refused("com.amazonaws.rekognition#ThrottlingException"),
                Throttled,
            ),
        ),
        broken={
            "no labels": {"LabelModelVersion": "3.0"},
            "labels is null": {"Labels": None},
            "label without a name": {"Labels": [{"Confidence": 90.0, "Instances": []}]},
            "no box": {
                "Labels": [{"Name": "Car", "Instances": [{"Confidence": 90.0}]}]
            },
            "box without width": {
                "Labels": [
                    {
                        "Name": "Car",
                        "Instances": [
                            {
                                "BoundingBox": {"Left": 0, "Top": 0, "Height": 1},
                                "Confidence": 9,
                            }
                        ],
                    }
                ]
            },
            "score above 100": rekognition_answer([Truth("Car", (1, 2, 30, 40), 1.2)]),
        },
        skips={
            "C4": (
                "the service has no quota of calls: what is used up is money, and what"
                " is too fast is throttled"
            ),
            "E4": "the service's errors are never inside a 200",
        },
    )


def rekognition_answer(objects: Sequence[Truth], size: tuple[int, int] = SIZE) -> Any:
    labels: dict[str, Any] = {}
    for truth in objects:
        x0, y0, x1, y1 = ratios(truth.box, size)
        new_label = {
            "Name": truth.name,
            "Confidence": 90.0,
            "Instances": [],
            "Parents": [{"Name": "Thing"}],
            "Aliases": [],
        }
        label = labels.setdefault(truth.name, new_label)
        box = {"Left": x0, "Top": y0, "Width": x1 - x0, "Height": y1 - y0}
        label["Instances"].append(
            {"BoundingBox": box, "Confidence": percent(truth.score)}
        )
    return {"Labels": list(labels.values()), "LabelModelVersion": "3.0"}


def azure_vision() -> Case:
    def refused(code: str, message: str, inner: str | None = None) -> Any:
        error: dict[str, Any] = {"code": code, "message": message}
        if inner:
            error["innererror"] = {"code": inner, "message": message}
        return {"error": error}

    no_objects = {
        "modelVersion": "2023-10-01",
        "metadata": {"width": 600, "height": 400},
    }
    car = {"boundingBox": {"x": 1, "y": 2, "w": 30, "h": 40}}
    rate = (
        "Requests have exceeded call rate limit of your current ComputerVision F0"
        " pricing tier. Please retry after 26 seconds."
    )
    return Case(
        "azure-vision",
        AzureVisionAdapter(),
        "azure-vision",
        {name: name for name in CLASSES},
        azure_answer,
        request(
            "/computervision/imageanalysis:analyze?features=Objects&api-version=2023-10-01",
            GOLDEN_IMAGE.data,
            "application/octet-stream",
        ),
        label_rows=(
            LabelCase(
                "unmapped",
                azure_answer(
                    [
                        Truth("dining table", (1, 2, 30, 40)),
                        Truth("dog", (1, 2, 30, 40)),
                    ]
                ),
                ("dog",),
                ("dining table",),
            ),
            LabelCase(
                "the best of several tags",
                {
                    **no_objects,
                    "objectsResult": {
                        "values": [
                            {
                                **car,
                                "tags": [
                                    {"name": "bus", "confidence": 0.2},
                                    {"name": "car", "confidence": 0.7},
                                ],
                            }
                        ]
                    },
                },
                ("car",),
            ),
        ),
        failures=(
            Failure(
                "B4",
                401,
                refused("401", "Access denied due to invalid subscription key."),
                AuthError,
            ),
            Failure("B4", 403, {}, AuthError),
            Failure("B4", 404, refused("404", "Resource not found"), BadRequest),
            Failure(
                "B4",
                400,
                refused(
                    "InvalidRequest",
                    "The image dimension is not allowed.",
                    "InvalidImageSize",
                ),
                ImageRejected,
            ),
            Failure(
                "B4",
                400,
                refused("InvalidRequest", "x", "InvalidImageFormat"),
                ImageRejected,
            ),
            Failure(
                "B4",
                400,
                refused(
                    "InvalidRequest",
                    "Input image is too large. It should not be larger than 20971520"
                    " bytes.",
                ),
                ImageRejected,
            ),
            Failure(
                "B4",
                400,
                refused("BadArgument", "The api-version is not supported."),
                BadRequest,
            ),
            Failure("B4", 400, {"error": {"innererror": 3}}, BadRequest),
            Failure("B4", 415, b"", ImageRejected),
            Failure("C1", 429, refused("429", rate), Throttled, wait=26.0),
            Failure(
                "C1", 429, refused("429", rate), Throttled, {"retry-after": "7"}, 7.0
            ),
            Failure(
                "C1",
                429,
                refused("429", "Please retry after 86400 seconds."),
                Throttled,
                wait=86_400.0,
            ),
            Failure(
                "C1",
                429,
                refused(
                    "429",
                    "Rate limit is exceeded. Ask for a higher quota. Try again in 1"
                    " second.",
                ),
                Throttled,
                wait=1.0,
            ),
            Failure(
                "C4",
                403,
                refused(
                    "403",
                    "Out of call volume quota for ComputerVision F0 pricing tier.",
                ),
                QuotaExhausted,
            ),
        ),
        broken={
            "the feature was not computed": no_objects,
            "objects is null": {**no_objects, "objectsResult": None},
            "no values": {**no_objects, "objectsResult": {}},
            "another size": {
                **azure_answer([]),
                "metadata": {"width": 601, "height": 400},
            },
            "turned": {**azure_answer([]), "metadata": {"width": 400, "height": 600}},
            "no size": {"objectsResult": {"values": []}},
            "no tags": {
                **no_objects,
                "objectsResult": {"values": [{**car, "tags": []}]},
            },
        },
        pixel_rounding=0.5,
        skips={"E4": "the service's errors are never inside a 200"},
    )


def azure_answer(objects: Sequence[Truth], size: tuple[int, int] = SIZE) -> Any:
    detections = []
    for truth in objects:
        x0, y0, x1, y1 = (round(edge) for edge in truth.box)
        box = {"x": x0, "y": y0, "w": x1 - x0, "h": y1 - y0}
        tag = {"name": truth.name, "confidence": truth.score}
        detections.append({"boundingBox": box, "tags": [tag]})
    return {
        "modelVersion": "2023-10-01",
        "metadata": {"width": size[0], "height": size[1]},
        "objectsResult": {"values": detections},
    }


REPEATED = (("car", "Car"), ("fire truck", "fire_truck"))
INVALID_CLASS_LISTS = ((), ("",), ("car", " "), ("a\nb",), *REPEATED)
"""Class lists that no adapter of a service with free class names may send."""


def hf_endpoint() -> Case:
    car = {
        "score": 0.9,
        "label": "car",
        "box": {"xmin": 1, "ymin": 2, "xmax": 31, "ymax": 42},
    }
    loading = {
        "error": "Model google/owlv2-base is currently loading",
        "estimated_time": 20.0,
    }
    quoted = (
        "Incorrect image source. Must be a valid URL, a path or a base64 encoded"
        f" string. Got {GOLDEN_BASE64 * 99}."
    )
    return Case(
        "hf-endpoint",
        HfEndpointAdapter(),
        "hf-endpoint",
        {name: name for name in CLASSES},
        hf_answer,
        request(
            "/",
            {
                "inputs": GOLDEN_BASE64,
                "parameters": {
                    "candidate_labels": ["car", "bus", "dog"],
                    "threshold": 0.05,
                },
            },
        ),
        label_rows=(
            LabelCase(
                "unmapped",
                hf_answer(
                    [Truth("truck", (1, 2, 30, 40)), Truth("dog", (1, 2, 30, 40))]
                ),
                ("dog",),
                ("truck",),
            ),
            LabelCase(
                "one box under three labels",
                [
                    car,
                    {**car, "label": "dog", "score": 0.2},
                    {**car, "label": "bus", "score": 0.1},
                ],
                ("car",),
            ),
            LabelCase(
                "one box twice under one label",
                [{**car, "score": 0.3}, car],
                ("car",),
                scores=(0.9,),
            ),
            LabelCase(
                "nearly the same box is another one",
                [
                    car,
                    {
                        **car,
                        "label": "dog",
                        "score": 0.2,
                        "box": {**car["box"], "xmax": 32},
                    },
                ],  # type: ignore[dict-item]
                ("car", "dog"),
                scores=(0.9, 0.2),
            ),
        ),
        failures=(
            Failure(
                "B4",
                401,
                {"error": "Invalid credentials in Authorization header"},
                AuthError,
            ),
            Failure("B4", 403, {"error": "gated"}, AuthError),
            Failure(
                "B4",
                400,
                {"error": "CUDA out of memory. Tried to allocate 2.00 GiB"},
                Transient,
            ),
            Failure(
                "B4",
                400,
                {
                    "error": (
                        "CUDA error: device-side assert triggered while reading the"
                        " image"
                    )
                },
                Transient,
            ),
            Failure(
                "B4",
                400,
                {"error": "DefaultCPUAllocator: can't allocate memory"},
                Transient,
            ),
            Failure(
                "B4",
                400,
                {"error": "cannot identify image file <_io.BytesIO object>"},
                ImageRejected,
            ),
            Failure("B4", 400, {"error": ["image file is truncated"]}, ImageRejected),
            Failure("B4", 400, {"error": quoted}, ImageRejected),
            Failure("B4", 422, {"error": "the image is too large"}, ImageRejected),
            Failure(
                "B4",
                400,
                {"error": "unexpected keyword argument 'candidate_labels'"},
                BadRequest,
            ),
            Failure("B4", 422, {"error": "inputs: field required"}, BadRequest),
            Failure("B4", 404, {"error": "Not Found"}, BadRequest),
            Failure("B4", 500, {"error": "Internal Server Error"}, Transient),
            Failure("B4", 503, {"error": "Service Unavailable"}, Transient),
            Failure("B4", 503, {"error": "x", "estimated_time": "soon"}, Transient),
            Failure("B4", 503, {"error": "x", "estimated_time": True}, Transient),
            Failure("C1", 503, loading, Throttled, wait=20.0),
            Failure(
                "C1", 503, {**loading, "estimated_time": 410.3}, Throttled, wait=410.3
            ),
            Failure("C1", 503, loading, Throttled, {"retry-after": "3"}, 3.0),
            Failure("C1", 429, {"error": "Rate limit reached"}, Throttled),
            Failure(
                "C4",
                402,
                {"error": "You have exceeded your monthly included credits"},
                QuotaExhausted,
            ),
        ),
        embedded=(
            ([{"score": 0.3}], ProtocolError),
            ([{"label": "car", "score": 0.3}], ProtocolError),
            ([{"error": "CUDA out of memory"}], ProtocolError),
            ({"error": "CUDA out of memory"}, ProtocolError),
        ),
        refused_classes=INVALID_CLASS_LISTS,
        broken={
            "one answer per image": [[car]],
            "no box": [{"label": "car", "score": 0.5}],
            "box is null": [{**car, "box": None}],
            "box without ymax": [{**car, "box": {"xmin": 1, "ymin": 2, "xmax": 3}}],
            "box is a list": [{**car, "box": [1, 2, 31, 42]}],
            "no label": [{"score": 0.5, "box": car["box"]}],
            "a good one and a broken one": [car, {"score": 0.5}],
        },
        pixel_rounding=1.0,
    )


def hf_answer(objects: Sequence[Truth], size: tuple[int, int] = SIZE) -> Any:
    sides = ("xmin", "ymin", "xmax", "ymax")
    detections = []
    for truth in objects:
        box = dict(zip(sides, map(int, truth.box), strict=True))
        detections.append({"score": truth.score, "label": truth.name, "box": box})
    return detections


def roboflow() -> Case:
    no_predictions = {"image": {"width": 600, "height": 400}}
    car = {
        "x": 16.0,
        "y": 22.0,
        "width": 30.0,
        "height": 40.0,
        "confidence": 0.5,
        "class": "car",
    }
    return Case(
        "roboflow",
        RoboflowAdapter(),
        "roboflow",
        {name: name for name in CLASSES},
        roboflow_answer,
        request(
            "/yolo_world/infer",
            {
                "image": {"type": "base64", "value": GOLDEN_BASE64},
                "text": ["car", "bus", "dog"],
                "yolo_world_version_id": "v2-l",
                "confidence": 0.05,
            },
        ),
        label_rows=(
            LabelCase(
                "unmapped",
                roboflow_answer(
                    [Truth("truck", (1, 2, 30, 40)), Truth("dog", (1, 2, 30, 40))]
                ),
                ("dog",),
                ("truck",),
            ),
            LabelCase(
                "no substrings",
                roboflow_answer(
                    [Truth("carpet", (1, 2, 30, 40)), Truth("dog", (1, 2, 30, 40))]
                ),
                ("dog",),
                ("carpet",),
            ),
        ),
        failures=(
            Failure(
                "B4", 401, {"message": "Unauthorized access to roboflow API"}, AuthError
            ),
            Failure(
                "B4",
                400,
                {"message": "Required Roboflow API key is missing."},
                AuthError,
            ),
            Failure(
                "B4",
                400,
                {
                    "message": (
                        "Could not load input image. Cause: malformed base64 input"
                        " image."
                    )
                },
                ImageRejected,
            ),
            Failure("B4", 400, {"message": "Missing argument."}, BadRequest),
            Failure(
                "B4",
                404,
                {"message": "Requested Roboflow resource not found."},
                BadRequest,
            ),
            Failure("B4", 422, {"message": "the request is not valid"}, BadRequest),
            Failure(
                "B4", 501, {"message": "the model is not supported here"}, BadRequest
            ),
            Failure("B4", 507, {"message": "out of memory"}, Transient),
            Failure(
                "C1",
                503,
                {"message": "the model is loading"},
                Throttled,
                {"retry-after": "1"},
                1.0,
            ),
            Failure("C4", 402, {"message": "Payment required"}, QuotaExhausted),
            Failure("C4", 423, {"message": "usage is paused"}, QuotaExhausted),
        ),
        refused_classes=INVALID_CLASS_LISTS,
        broken={
            "no predictions": no_predictions,
            "predictions is null": {**no_predictions, "predictions": None},
            "another size": {"image": {"width": 601, "height": 400}, "predictions": []},
            "turned": {"image": {"width": 400, "height": 600}, "predictions": []},
            "no size": {"predictions": []},
            "two images": [roboflow_answer([]), roboflow_answer([])],
            "no class": {
                **no_predictions,
                "predictions": [{k: v for k, v in car.items() if k != "class"}],
            },
            "no width": {
                **no_predictions,
                "predictions": [{k: v for k, v in car.items() if k != "width"}],
            },
        },
        skips={"E4": "the service's errors are never inside a 200"},
    )


def roboflow_sam3() -> Case:
    def answer(objects: Sequence[Truth], size: tuple[int, int] = SIZE) -> Any:
        return sam3_answer(objects, CLASSES)

    def with_prediction(**changes: Any) -> Any:
        prediction = {"masks": mask((1, 2, 30, 40)), "confidence": 0.5}
        first = prompt_result(0, "car", [prediction | changes])
        return {"prompt_results": [first, *no_objects["prompt_results"][1:]]}

    no_objects: dict[str, Any] = answer([])
    results: list[Any] = no_objects["prompt_results"]
    return Case(
        "roboflow-sam3",
        RoboflowSam3Adapter(),
        "roboflow-sam3",
        {name: name for name in CLASSES},
        answer,
        request(
            "/sam3/concept_segment",
            {
                "image": {"type": "base64", "value": GOLDEN_BASE64},
                "prompts": [{"type": "text", "text": name} for name in CLASSES],
                "format": "polygon",
                "output_prob_thresh": 0.05,
            },
        ),
        optional=frozenset(
            {"time", "echo", "type", "text", "num_boxes", "format", "echo.prompt_index"}
        ),
        label_rows=(
            LabelCase(
                "by prompt",
                answer([Truth("dog", (1, 2, 30, 40), 0.7), Truth("car", (1, 2, 9, 9))]),
                ("dog", "car"),
                scores=(0.7, 0.5),
            ),
        ),
        failures=(
            Failure(
                "B4", 401, {"message": "Unauthorized access to roboflow API"}, AuthError
            ),
            Failure("B4", 403, {"message": "Forbidden"}, AuthError),
            Failure(
                "B4",
                400,
                {"message": "Could not load input image. Cause: malformed base64"},
                ImageRejected,
            ),
            Failure("B4", 404, {"message": "Not Found"}, BadRequest),
            Failure("B4", 410, {"message": "This block is deprecated"}, BadRequest),
            Failure("B4", 501, {"message": "SAM3 is not enabled"}, BadRequest),
            Failure(
                "C1",
                429,
                {"message": "slow down"},
                Throttled,
                {"retry-after": "1"},
                1.0,
            ),
            Failure("C4", 402, {"message": "Payment required"}, QuotaExhausted),
        ),
        refused_classes=INVALID_CLASS_LISTS,
        broken={
            "no results": {"prompt_results": []},
            "a result is missing": {"prompt_results": results[:2]},
            "a result too many": {"prompt_results": [*results, results[0]]},
            "results in another order": {"prompt_results": results[::-1]},
            "another prompt": {
                "prompt_results": [prompt_result(0, "truck", []), *results[1:]]
            },
            "no predictions": {
                "prompt_results": [{"prompt_index": 0}, *results[1:]],
            },
            "no mask": with_prediction(masks=[]),
            "a mask of two points": with_prediction(masks=[[[1, 2], [3, 4]]]),
            "run lengths": with_prediction(masks={"size": [4, 4], "counts": "x"}),
            "another format": with_prediction(format="rle"),
        },
        pixel_rounding=0.5,
        skips={"E4": "the service's errors are never inside a 200"},
        answer_about=sam3_answer,
    )


def sam3_answer(objects: Sequence[Truth], names: Sequence[str]) -> Any:
    results = []
    for number, name in enumerate(names):
        predictions = [
            {
                "masks": mask(truth.box),
                "confidence": truth.score,
                "format": "polygon",
            }
            for truth in objects
            if truth.name == name
        ]
        results.append(prompt_result(number, name, predictions))
    return {"prompt_results": results, "time": 0.2}


EXEMPLAR_BOXES = (
    (10.0, 10.0, 60.0, 60.0),
    (80.0, 10.0, 130.0, 60.0),
    (150.0, 10.0, 200.0, 60.0),
)
EXEMPLAR_IMAGE = scene(
    [SCENE_CLASSES.index(name) for name in CLASSES],
    [[int(edge) for edge in box] for box in EXEMPLAR_BOXES],
    (220, 80),
    "JPEG",
)


def t_rex() -> Case:
    numbers = {name: number for number, name in enumerate(CLASSES, start=1)}
    boxes = tuple(zip(CLASSES, EXEMPLAR_BOXES, strict=True))
    exemplar = Exemplar(EXEMPLAR_IMAGE, "image/jpeg", boxes)

    def answer_about(objects: Sequence[Truth], classes: Sequence[str]) -> Any:
        detections = [
            {
                "bbox": list(truth.box),
                "category_id": list(classes).index(truth.name) + 1,
                "score": truth.score,
            }
            for truth in objects
        ]
        task = {"status": "success", "result": {"objects": detections}}
        return {"code": 0, "msg": "ok", "data": task}

    def answer(objects: Sequence[Truth], size: tuple[int, int] = SIZE) -> Any:
        return answer_about(objects, CLASSES)

    text_case = dds("dino-x", "/v2/task/dinox/detection", "DINO-X-1.0")
    car: dict[str, Any] = {"bbox": [1, 2, 30, 40], "category_id": 1, "score": 0.5}
    return Case(
        "t-rex",
        TRexAdapter((exemplar,)),
        "dds",
        {name: name for name in CLASSES},
        answer,
        request(
            "/v2/task/trex/detection",
            {
                "model": "T-Rex-2.0",
                "image": f"data:image/jpeg;base64,{GOLDEN_BASE64}",
                "targets": ["bbox"],
                "bbox_threshold": 0.05,
                "iou_threshold": 0.8,
                "prompt": {
                    "type": "visual_images",
                    "visual_images": [
                        {
                            "image": "data:image/jpeg;base64,"
                            + base64.b64encode(EXEMPLAR_IMAGE).decode(),
                            "interactions": [
                                {
                                    "type": "rect",
                                    "category_id": numbers[name],
                                    "rect": [float(edge) for edge in box],
                                }
                                for name, box in zip(
                                    CLASSES, EXEMPLAR_BOXES, strict=True
                                )
                            ],
                        }
                    ],
                },
            },
        ),
        further=text_case.further,
        label_rows=(
            LabelCase(
                "by number",
                answer([Truth("dog", (1, 2, 30, 40)), Truth("car", (1, 2, 30, 40))]),
                ("dog", "car"),
            ),
        ),
        failures=text_case.failures,
        embedded=text_case.embedded,
        refused_classes=((), ("truck",), ("car", "truck"), ("car", "Car")),
        broken={
            "no category": answer([])
            | {
                "data": {
                    "status": "success",
                    "result": {"objects": [{"bbox": [1, 2, 3, 4], "score": 0.5}]},
                }
            },
            **{
                f"category {number}": answer([])
                | {
                    "data": {
                        "status": "success",
                        "result": {"objects": [car | {"category_id": number}]},
                    }
                }
                for number in (0, 4, 1.5, "1", None)
            },
        },
        answer_about=answer_about,
    )


def roboflow_answer(objects: Sequence[Truth], size: tuple[int, int] = SIZE) -> Any:
    predictions = []
    for i, truth in enumerate(objects):
        x0, y0, x1, y1 = truth.box
        predictions.append(
            {
                "x": (x0 + x1) / 2,
                "y": (y0 + y1) / 2,
                "width": x1 - x0,
                "height": y1 - y0,
                "confidence": truth.score,
                "class": truth.name,
                "class_id": 0,
                "detection_id": str(i),
            }
        )
    return {
        "inference_id": "1",
        "time": 0.081,
        "image": {"width": size[0], "height": size[1]},
        "predictions": predictions,
    }


INVALID_TEXTS = {
    "prose": "There are no cars in this image.",
    "prose after": "[] I found none.",
    "two lists": "[] []",
    "two fences": "```json\n[]\n```\n```json\n[]\n```",
    "an open fence": "```json\n[]",
    "half a fence": "````",
    "another language": "```python\n[]\n```",
    "nothing": "",
    "a space": " ",
    "null": "null",
    "a list of lists": "[[]]",
    "a list in a text": '"[]"',
    "single quotes": "[{'KEY': [1, 2, 300, 400], 'label': 'car'}]",
    "a comma at the end": '[{"KEY": [1, 2, 300, 400], "label": "car"},]',
    "a comment": "[] // none",
    "not a number": '[{"KEY": [NaN, 2, 300, 400], "label": "car"}]',
    "numbers as texts": '[{"KEY": ["1", "2", "300", "400"], "label": "car"}]',
    "box of three": '[{"KEY": [1, 2, 300], "label": "car"}]',
    "box of five": '[{"KEY": [1, 2, 300, 400, 5], "label": "car"}]',
    "no box": '[{"label": "car"}]',
    "no label": '[{"KEY": [1, 2, 300, 400]}]',
    "label is null": '[{"KEY": [1, 2, 300, 400], "label": null}]',
    "two labels": '[{"KEY": [1, 2, 300, 400], "label": ["car", "bus"]}]',
    "a key twice": '[{"KEY": [1, 2, 300, 400], "KEY": [1, 2, 30, 40], "label": "car"}]',
    "another unit": '[{"KEY": [1, 2, 1900, 1000], "label": "car"}]',
    "negative": '[{"KEY": [-900, 2, 300, 400], "label": "car"}]',
    "a good one and a broken one": (
        '[{"KEY": [1, 2, 300, 400], "label": "car"}, {"label": "car"}]'
    ),
}
"""Texts of language models that are not a list of boxes."""
REFUSALS = (
    "I'm sorry, but I can't help with that.",
    " I cannot identify people in images.",
    "Sorry, no.",
    "I\u2019m unable to see images.",
)


def prefixes(text: str) -> dict[str, str]:
    """Return every beginning of a text."""
    return {f"cut after {length}": text[:length] for length in range(len(text))}


def text_problems(answer: Callable[[str], Any], key: str) -> dict[str, Any]:
    """Return invalid responses of a language model: INVALID_TEXTS, and a list of boxes
    that is cut off anywhere.
    """
    car = {key: [1, 2, 300, 400], "label": "car"}
    dog = {key: [5, 6, 70, 80], "label": "dog"}
    whole = json.dumps([car, dog])
    texts = {name: text.replace("KEY", key) for name, text in INVALID_TEXTS.items()}
    texts |= prefixes(whole)
    for name, text in prefixes(f"```json\n{whole}\n```").items():
        texts[f"fenced, {name}"] = text
    return {name: answer(text) for name, text in texts.items()}


def written_boxes(
    objects: Sequence[Truth], size: tuple[int, int], coordinates: str
) -> list[dict[str, Any]]:
    """Return boxes as a language model writes them."""
    key = "box_2d" if coordinates == "yxyx_1000" else "bbox_2d"
    boxes = []
    for truth in objects:
        x0, y0, x1, y1 = (round(1000 * ratio) for ratio in ratios(truth.box, size))
        box = {
            "xyxy_1000": [x0, y0, x1, y1],
            "yxyx_1000": [y0, x0, y1, x1],
            "xyxy_pixels": [round(edge) for edge in truth.box],
            "xyxy_ratio": [round(ratio, 4) for ratio in ratios(truth.box, size)],
            "xyxy_percent": [
                round(100 * ratio, 1) for ratio in ratios(truth.box, size)
            ],
        }[coordinates]
        boxes.append({key: box, "label": truth.name})
    return boxes


def prompt(box: str, unit: str, ending: str = "") -> str:
    return (
        'Detect every instance of these classes in the image: ["car", "bus", "dog"].'
        f' Answer with a JSON list only, one object per instance: {{{box}, "label":'
        ' "..."}. The label is one of the classes, exactly as written above.'
        f" Coordinates are {unit}. Answer [] if there is none.{ending}"
    )


XYXY = '"bbox_2d": [x1, y1, x2, y2]'
YXYX = '"box_2d": [ymin, xmin, ymax, xmax]'
PROMPTS = {
    "xyxy_1000": prompt(XYXY, "thousandths of the image's width and height, 0 to 1000"),
    "yxyx_1000": prompt(YXYX, "thousandths of the image's height and width, 0 to 1000"),
    "xyxy_pixels": prompt(
        XYXY,
        "pixels of the image",
        " The image is 600 pixels wide and 400 pixels high.",
    ),
    "xyxy_ratio": prompt(
        XYXY, "shares of the image's width and height, 0 to 1, with four decimals"
    ),
    "xyxy_percent": prompt(
        XYXY, "percent of the image's width and height, 0 to 100, with one decimal"
    ),
}
NO_SCORES = "the model gives no scores: every box has 1 in its class's column"


EXAMPLE_BOXES: dict[str, list[float]] = {
    "xyxy_ratio": [0.001, 0.002, 0.3, 0.4],
    "xyxy_percent": [1, 2, 30, 40],
}
RATIO_ROUNDINGS = {
    "xyxy_1000": 0.0005,
    "yxyx_1000": 0.0005,
    "xyxy_pixels": 0.0,
    "xyxy_ratio": 0.00005,
    "xyxy_percent": 0.0005,
}
COORDINATE_SCHEMAS: dict[str, dict[str, Any]] = {
    "xyxy_1000": {"type": "integer", "minimum": 0, "maximum": 1000},
    "yxyx_1000": {"type": "integer", "minimum": 0, "maximum": 1000},
    "xyxy_pixels": {"type": "integer"},
    "xyxy_ratio": {"type": "number", "minimum": 0, "maximum": 1},
    "xyxy_percent": {"type": "number", "minimum": 0, "maximum": 100},
}


def list_schema(key: str, **coordinate: Any) -> Any:
    box = {"type": "array", "items": coordinate, "minItems": 4, "maxItems": 4}
    element = {
        "type": "object",
        "properties": {key: box, "label": {"type": "string", "enum": list(CLASSES)}},
        "required": [key, "label"],
        "additionalProperties": False,
    }
    return {
        "type": "object",
        "properties": {"detections": {"type": "array", "items": element}},
        "required": ["detections"],
        "additionalProperties": False,
    }


def openai_vlm(coordinates: Coordinates, provider: str) -> Case:
    key = "box_2d" if coordinates == "yxyx_1000" else "bbox_2d"
    box = EXAMPLE_BOXES.get(coordinates, [1, 2, 300, 400])
    car = {key: box, "label": "car"}

    def response_with(text: Any, reason: Any = "stop", **message: Any) -> Any:
        answer = completion(text, reason)
        answer["choices"][0]["message"] |= message
        return answer

    def answer(objects: Sequence[Truth], size: tuple[int, int] = SIZE) -> Any:
        return response_with(json.dumps(written_boxes(objects, size, coordinates)))

    def refused(code: Any, message: str, **fields: Any) -> Any:
        error = {
            "message": message,
            "type": "invalid_request_error",
            "param": None,
            "code": code,
        }
        return {"error": error | fields}

    message_parts = [
        {
            "type": "image_url",
            "image_url": {"url": f"data:image/jpeg;base64,{GOLDEN_BASE64}"},
        },
        {"type": "text", "text": PROMPTS[coordinates]},
    ]
    limit = (
        "Rate limit reached for gpt-4o in organization org-1 on tokens per min (TPM):"
        " Limit 30000. See your quota."
    )
    resets = {
        "x-ratelimit-remaining-requests": "0",
        "x-ratelimit-reset-requests": "1m2.5s",
    }
    tokens = {"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "120ms"}
    return Case(
        f"openai-vlm-{coordinates}",
        OpenAiVlmAdapter(coordinates),
        provider,
        {name: name for name in CLASSES},
        answer,
        request(
            "/chat/completions",
            {
                "messages": [{"role": "user", "content": message_parts}],
                "temperature": 0,
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {
                        "name": "boxes",
                        "strict": True,
                        "schema": list_schema(key, **COORDINATE_SCHEMAS[coordinates]),
                    },
                },
            },
        ),
        label_rows=(
            LabelCase(
                "unmapped",
                answer([Truth("truck", (1, 2, 30, 40)), Truth("dog", (1, 2, 30, 40))]),
                ("dog",),
                ("truck",),
            ),
            LabelCase("case", answer([Truth("Cars", (1, 2, 30, 40))]), ("car",)),
            LabelCase(
                "its own order",
                answer([Truth(n, (1, 2, 30, 40)) for n in ("dog", "car", "bus")]),
                ("dog", "car", "bus"),
                scores=(1, 1, 1),
            ),
            LabelCase(
                "a number it wrote is no score",
                response_with(json.dumps([{**car, "confidence": 0.3, "score": 7}])),
                ("car",),
                scores=(1,),
            ),
            LabelCase(
                "a fence",
                response_with(f"```json\n{json.dumps([car], indent=1)}\n```"),
                ("car",),
            ),
            LabelCase(
                "a fence in one line",
                response_with(f" ```JSON {json.dumps([car])}``` \n"),
                ("car",),
            ),
            LabelCase(
                "a fence without language",
                response_with(f"```\n{json.dumps([car])}\n```"),
                ("car",),
            ),
            LabelCase("none in a fence", response_with("```json\n[]\n```"), ()),
            LabelCase(
                "no refusal", response_with(json.dumps([car]), refusal=None), ("car",)
            ),
            LabelCase(
                "no error",
                {**response_with(json.dumps([car])), "error": None},
                ("car",),
            ),
        ),
        failures=(
            Failure(
                "B4",
                401,
                refused("invalid_api_key", "Incorrect API key provided."),
                AuthError,
            ),
            Failure(
                "B4",
                400,
                refused(None, "API key not valid. Please pass a valid API key."),
                AuthError,
            ),
            Failure("B4", 403, {}, AuthError),
            Failure(
                "B4",
                403,
                refused(
                    403,
                    "Your chosen model requires moderation and your input was flagged",
                ),
                Refused,
            ),
            Failure(
                "B4",
                400,
                refused("content_filter", "The response was filtered"),
                Refused,
            ),
            Failure(
                "B4",
                400,
                refused(
                    "data_inspection_failed",
                    "Input data may contain inappropriate content.",
                ),
                Refused,
            ),
            Failure(
                "B4",
                400,
                refused("invalid_image_format", "You uploaded an unsupported image."),
                ImageRejected,
            ),
            Failure(
                "B4",
                400,
                refused(
                    "context_length_exceeded",
                    "Please reduce the length of the messages.",
                ),
                ImageRejected,
            ),
            Failure(
                "B4",
                400,
                refused(
                    400,
                    "You passed 9015 input tokens, but the context length is only 8192"
                    " tokens.",
                ),
                ImageRejected,
            ),
            Failure("B4", 422, {"detail": "cannot identify image file"}, ImageRejected),
            Failure(
                "B4",
                400,
                {
                    "object": "error",
                    "message": "cannot identify image file",
                    "code": 400,
                },
                ImageRejected,
            ),
            Failure("B4", 400, {"error": "failed to process image"}, ImageRejected),
            Failure(
                "B4",
                400,
                refused(
                    None,
                    "Invalid content type. image_url is only supported by certain"
                    " models.",
                ),
                BadRequest,
            ),
            Failure(
                "B4",
                400,
                refused(None, "This model does not support image inputs."),
                BadRequest,
            ),
            Failure(
                "B4",
                400,
                refused(
                    "unsupported_value",
                    "'temperature' does not support 0 with this model.",
                ),
                FieldRefused,
            ),
            Failure(
                "B4",
                422,
                {"detail": [{"loc": ["body"], "msg": "field required"}]},
                BadRequest,
            ),
            Failure(
                "B4",
                404,
                refused("model_not_found", "The model does not exist."),
                BadRequest,
            ),
            Failure("B4", 404, {"detail": "Not Found"}, BadRequest),
            Failure("B4", 500, refused(None, "The server had an error"), Transient),
            Failure(
                "C1",
                429,
                refused("rate_limit_exceeded", limit, type="tokens"),
                Throttled,
            ),
            Failure(
                "C1",
                429,
                refused("rate_limit_exceeded", limit),
                Throttled,
                {"retry-after": "7", **resets},
                7.0,
            ),
            Failure(
                "C1",
                429,
                refused("rate_limit_exceeded", limit),
                Throttled,
                resets,
                62.5,
            ),
            Failure(
                "C1",
                429,
                refused("rate_limit_exceeded", limit),
                Throttled,
                resets | tokens,
                62.5,
            ),
            Failure(
                "C1",
                429,
                refused("rate_limit_exceeded", limit),
                Throttled,
                tokens,
                0.12,
            ),
            Failure(
                "C1",
                429,
                {},
                Throttled,
                {**resets, "x-ratelimit-reset-requests": "8h"},
                28_800.0,
            ),
            Failure(
                "C1",
                429,
                {},
                Throttled,
                {**resets, "x-ratelimit-remaining-requests": "12"},
            ),
            Failure(
                "C1",
                429,
                {},
                Throttled,
                {**resets, "x-ratelimit-reset-requests": "soon"},
            ),
            Failure(
                "C1", 429, {}, Throttled, {**resets, "x-ratelimit-reset-requests": ""}
            ),
            Failure("C1", 200, refused(429, "Provider returned error"), Throttled),
            Failure(
                "C4",
                429,
                refused("insufficient_quota", "You exceeded your current quota."),
                QuotaExhausted,
            ),
            Failure(
                "C4",
                429,
                refused(
                    None, "You exceeded your current quota.", type="insufficient_quota"
                ),
                QuotaExhausted,
            ),
            Failure(
                "C4",
                429,
                refused("insufficient_quota", "x"),
                QuotaExhausted,
                {"retry-after": "1"},
            ),
            Failure("C4", 402, refused(402, "Insufficient credits"), QuotaExhausted),
        ),
        embedded=(
            (response_with(json.dumps([car]), "length"), ProtocolError),
            (response_with("[]", "length"), ProtocolError),
            (response_with("[]", "content_filter"), Refused),
            (response_with(None, "content_filter"), Refused),
            (response_with("[]", "tool_calls"), ProtocolError),
            (response_with("[]", "error"), ProtocolError),
            (response_with("[]", "MAX_TOKENS"), ProtocolError),
            (response_with("[]", "tool_use"), ProtocolError),
            (response_with("[]", "SAFETY"), Refused),
            (response_with("[]", None), ProtocolError),
            (response_with(None, refusal="I can't help with that."), Refused),
            (response_with("[]", refusal="I can't help with that."), Refused),
            *((response_with(text), Refused) for text in REFUSALS),
            (refused(502, "Provider returned error"), Transient),
            (refused(200, "what?"), ProtocolError),
            (refused("server_error", "what?"), ProtocolError),
            ({**response_with("[]"), "error": "what?"}, ProtocolError),
            (
                {
                    "choices": [
                        {
                            **response_with("[]")["choices"][0],
                            "error": {"code": 503, "message": "busy"},
                        }
                    ]
                },
                Transient,
            ),
        ),
        refused_classes=INVALID_CLASS_LISTS,
        broken={
            "no choices": {"choices": []},
            "two choices": {"choices": response_with("[]")["choices"] * 2},
            "no message": {"choices": [{"finish_reason": "stop"}]},
            "no content": response_with(None),
            "thoughts and no text": response_with([{"type": "thinking"}]),
            "a part of another kind": response_with([{"type": "image"}]),
            "parts that are no objects": response_with(["[]"]),
            "half a character": response_with('[{"\ud800'),
            **text_problems(response_with, key),
        },
        pixel_rounding=0.5 if coordinates == "xyxy_pixels" else 0.0,
        ratio_rounding=RATIO_ROUNDINGS[coordinates],
        score_kind="none",
        skips={"A8": NO_SCORES},
    )


def anthropic() -> Case:
    box = [1, 2, 300, 400]
    car = {"bbox_2d": box, "label": "car"}

    def answer(objects: Sequence[Truth], size: tuple[int, int] = SIZE) -> Any:
        return message(json.dumps(written_boxes(objects, size, "xyxy_pixels")))

    def refused(kind: str, text: str) -> Any:
        return {"type": "error", "error": {"type": kind, "message": text}}

    schema = list_schema("bbox_2d", type="integer")
    numbers = schema["properties"]["detections"]["items"]["properties"]["bbox_2d"]
    del numbers["minItems"], numbers["maxItems"]
    blocks = [
        {
            "type": "image",
            "source": {
                "type": "base64",
                "media_type": "image/jpeg",
                "data": GOLDEN_BASE64,
            },
        },
        {"type": "text", "text": PROMPTS["xyxy_pixels"]},
    ]
    reset = {
        "anthropic-ratelimit-requests-remaining": "0",
        "anthropic-ratelimit-requests-reset": "2026-11-29T10:00:20Z",
        "anthropic-ratelimit-tokens-remaining": "7",
        "anthropic-ratelimit-tokens-reset": "2026-11-29T11:00:00Z",
        "date": "Sun, 29 Nov 2026 10:00:00 GMT",
    }
    return Case(
        "anthropic",
        AnthropicAdapter(),
        "anthropic",
        {name: name for name in CLASSES},
        answer,
        request(
            "/v1/messages",
            {
                "model": "claude-sonnet-5-5",
                "max_tokens": 8192,
                "messages": [{"role": "user", "content": blocks}],
                "output_config": {
                    "format": {"type": "json_schema", "schema": schema},
                },
            },
            **{"anthropic-version": "2023-06-01"},
        ),
        optional=frozenset({"model", "usage", "id", "role"}),
        label_rows=(
            LabelCase(
                "unmapped",
                answer([Truth("truck", (1, 2, 30, 40)), Truth("dog", (1, 2, 30, 40))]),
                ("dog",),
                ("truck",),
            ),
            LabelCase(
                "a list in an object",
                message(json.dumps({"detections": [car]})),
                ("car",),
                scores=(1,),
            ),
            LabelCase(
                "thoughts aside",
                message(json.dumps([car]))
                | {
                    "content": [
                        {"type": "thinking", "thinking": "[]?"},
                        {"type": "text", "text": json.dumps([car])},
                    ]
                },
                ("car",),
            ),
        ),
        failures=(
            Failure(
                "B4",
                401,
                refused("authentication_error", "invalid x-api-key"),
                AuthError,
            ),
            Failure("B4", 403, refused("permission_error", "no"), AuthError),
            Failure("B4", 404, refused("not_found_error", "model: x"), BadRequest),
            Failure("B4", 413, refused("request_too_large", "x"), ImageRejected),
            Failure(
                "B4",
                400,
                refused("invalid_request_error", "Could not process image"),
                ImageRejected,
            ),
            Failure("B4", 400, refused("invalid_request_error", "x"), BadRequest),
            Failure(
                "B4",
                400,
                refused(
                    "invalid_request_error",
                    "output_config.format: Extra inputs are not permitted",
                ),
                FieldRefused,
            ),
            Failure(
                "B4", 500, refused("api_error", "Internal server error"), Transient
            ),
            Failure("C1", 529, refused("overloaded_error", "Overloaded"), Throttled),
            Failure(
                "C1",
                529,
                refused("overloaded_error", "Overloaded"),
                Throttled,
                {"retry-after": "7"},
                7.0,
            ),
            Failure(
                "C1",
                429,
                refused("rate_limit_error", "This request would exceed the limit"),
                Throttled,
                {**reset, "retry-after": "3"},
                3.0,
            ),
            Failure(
                "C1", 429, refused("rate_limit_error", "x"), Throttled, reset, 20.0
            ),
            Failure(
                "C1",
                429,
                {},
                Throttled,
                {**reset, "anthropic-ratelimit-requests-reset": "soon"},
            ),
            Failure(
                "C4",
                400,
                refused(
                    "invalid_request_error",
                    "Your credit balance is too low to access the API.",
                ),
                QuotaExhausted,
            ),
            Failure("C4", 402, refused("billing_error", "x"), QuotaExhausted),
        ),
        embedded=(
            (message(json.dumps([car]), "max_tokens"), ProtocolError),
            (message("[]", "max_tokens"), ProtocolError),
            (message("[]", "model_context_window_exceeded"), ProtocolError),
            (message("[]", "pause_turn"), ProtocolError),
            (message("[]", "tool_use"), ProtocolError),
            (message("[]", "refusal"), Refused),
            (refused("overloaded_error", "Overloaded"), Throttled),
            (refused("api_error", "x"), Transient),
            *((message(text), Refused) for text in REFUSALS),
        ),
        refused_classes=INVALID_CLASS_LISTS,
        broken={
            "no reason": {**message("[]"), "stop_reason": None},
            "no content": {**message("[]"), "content": []},
            "only thoughts": {
                **message("[]"),
                "content": [{"type": "thinking", "thinking": "[]"}],
            },
            "a tool": {
                **message("[]"),
                "content": [{"type": "tool_use", "name": "x", "input": {}}],
            },
            **text_problems(message, "bbox_2d"),
        },
        pixel_rounding=0.5,
        score_kind="none",
        skips={"A8": NO_SCORES},
    )


def gemini() -> Case:
    car = {"box_2d": [1, 2, 300, 400], "label": "car"}

    def answer(objects: Sequence[Truth], size: tuple[int, int] = SIZE) -> Any:
        return generated(json.dumps(written_boxes(objects, size, "yxyx_1000")))

    def response_with_parts(*texts: Any) -> Any:
        whole = generated("")
        whole["candidates"][0]["content"]["parts"] = list(texts)
        return whole

    def refused(code: int, message: str, *details: Any) -> Any:
        return {"error": {"code": code, "message": message, "details": list(details)}}

    def exceeded(*names: str) -> Any:
        return {
            "@type": "type.googleapis.com/google.rpc.QuotaFailure",
            "violations": [{"quotaId": name} for name in names],
        }

    minute, day = (
        "GenerateRequestsPerMinutePerProjectPerModel-FreeTier",
        "GenerateRequestsPerDayPerProjectPerModel-FreeTier",
    )
    delay = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "34s"}
    plan = (
        "You exceeded your current quota, please check your plan and billing details."
    )
    coordinate = {"type": "INTEGER", "minimum": 0, "maximum": 1000}
    schema = {
        "type": "ARRAY",
        "items": {
            "type": "OBJECT",
            "properties": {
                "box_2d": {
                    "type": "ARRAY",
                    "items": coordinate,
                    "minItems": 4,
                    "maxItems": 4,
                },
                "label": {"type": "STRING", "enum": list(CLASSES)},
            },
            "required": ["box_2d", "label"],
        },
    }
    request_parts = [
        {"inlineData": {"mimeType": "image/jpeg", "data": GOLDEN_BASE64}},
        {"text": PROMPTS["yxyx_1000"]},
    ]
    config = {
        "responseMimeType": "application/json",
        "responseSchema": schema,
        "thinkingConfig": {"thinkingLevel": "low"},
    }
    return Case(
        "gemini",
        GeminiAdapter(),
        "gemini",
        {name: name for name in CLASSES},
        answer,
        request(
            "/v1beta/models/gemini-3.8-flash:generateContent",
            {
                "contents": [{"role": "user", "parts": request_parts}],
                "generationConfig": config,
            },
        ),
        label_rows=(
            LabelCase(
                "unmapped",
                answer([Truth("truck", (1, 2, 30, 40)), Truth("dog", (1, 2, 30, 40))]),
                ("dog",),
                ("truck",),
            ),
            LabelCase(
                "a number it wrote is no score",
                generated(json.dumps([{**car, "confidence": 0.3}])),
                ("car",),
                scores=(1,),
            ),
            LabelCase(
                "a fence", generated(f"```json\n{json.dumps([car])}\n```"), ("car",)
            ),
            LabelCase(
                "thoughts aside",
                response_with_parts(
                    {"text": "[]?", "thought": True}, {"text": json.dumps([car])}
                ),
                ("car",),
            ),
            LabelCase(
                "in two parts",
                response_with_parts(
                    {"text": json.dumps([car])[:20]}, {"text": json.dumps([car])[20:]}
                ),
                ("car",),
            ),
            LabelCase(
                "nothing blocked",
                {**generated(json.dumps([car])), "promptFeedback": {}},
                ("car",),
            ),
        ),
        failures=(
            Failure(
                "B4",
                400,
                refused(400, "API key not valid. Please pass a valid API key."),
                AuthError,
            ),
            Failure(
                "B4", 400, refused(400, "x", {"reason": "API_KEY_INVALID"}), AuthError
            ),
            Failure("B4", 403, refused(403, "Permission denied"), AuthError),
            Failure(
                "B4", 400, refused(400, "Unable to process input image."), ImageRejected
            ),
            Failure(
                "B4", 400, refused(400, "Provided image is not valid"), ImageRejected
            ),
            Failure(
                "B4",
                400,
                refused(400, "Request payload size exceeds the limit: 20971520 bytes."),
                ImageRejected,
            ),
            Failure(
                "B4",
                400,
                refused(400, "Invalid JSON payload received. Unknown name"),
                BadRequest,
            ),
            Failure(
                "B4",
                404,
                refused(404, "models/x is not found for API version v1beta"),
                BadRequest,
            ),
            Failure(
                "B4",
                503,
                refused(503, "The model is overloaded. Please try again later."),
                Transient,
            ),
            Failure("C1", 503, refused(503, "busy", delay), Throttled, wait=34.0),
            Failure(
                "C1",
                429,
                refused(429, plan, exceeded(minute), delay),
                Throttled,
                wait=34.0,
            ),
            Failure(
                "C1",
                429,
                refused(429, plan, exceeded(minute), delay),
                Throttled,
                {"retry-after": "2"},
                2.0,
            ),
            Failure(
                "C1",
                429,
                refused(429, plan, exceeded(minute), {"retryDelay": "900s"}),
                Throttled,
                wait=900.0,
            ),
            Failure("C1", 429, refused(429, plan, exceeded(minute)), Throttled),
            Failure("C1", 429, refused(429, plan), Throttled),
            Failure(
                "C1",
                429,
                refused(429, "Resource has been exhausted (e.g. check quota)."),
                Throttled,
            ),
            Failure(
                "C1",
                429,
                refused(
                    429, plan, 3, {"violations": 3}, {"violations": [3, {"quotaId": 3}]}
                ),
                Throttled,
            ),
            Failure(
                "C4", 429, refused(429, plan, exceeded(day), delay), QuotaExhausted
            ),
            Failure(
                "C4",
                429,
                refused(429, plan, exceeded(minute, day), delay),
                QuotaExhausted,
                {"retry-after": "2"},
            ),
            Failure(
                "C4",
                429,
                refused(
                    429,
                    plan,
                    {"violations": [{"quotaMetric": "x/requests_per_model_per_day"}]},
                ),
                QuotaExhausted,
            ),
            Failure(
                "C4",
                429,
                refused(429, "Your prepayment credits are depleted."),
                QuotaExhausted,
            ),
        ),
        embedded=(
            ({"promptFeedback": {"blockReason": "SAFETY"}}, Refused),
            ({"promptFeedback": {"blockReason": "OTHER"}, "candidates": []}, Refused),
            (
                {**answer([]), "promptFeedback": {"blockReason": "PROHIBITED_CONTENT"}},
                Refused,
            ),
            *(
                (generated("[]", reason), Refused)
                for reason in (
                    "SAFETY",
                    "RECITATION",
                    "BLOCKLIST",
                    "PROHIBITED_CONTENT",
                    "SPII",
                )
            ),
            ({"candidates": [{"finishReason": "IMAGE_SAFETY"}]}, Refused),
            *(
                (generated("[]", reason), ProtocolError)
                for reason in (
                    "MAX_TOKENS",
                    "OTHER",
                    "MALFORMED_FUNCTION_CALL",
                    "stop",
                    "",
                )
            ),
            *((generated(text), Refused) for text in REFUSALS),
        ),
        refused_classes=INVALID_CLASS_LISTS,
        broken={
            "no candidates": {"candidates": []},
            "nothing": {"usageMetadata": {}},
            "two candidates": {"candidates": answer([])["candidates"] * 2},
            "no reason": {"candidates": [{"content": {"parts": [{"text": "[]"}]}}]},
            "no parts": {
                "candidates": [{"content": {"role": "model"}, "finishReason": "STOP"}]
            },
            "no content": {"candidates": [{"finishReason": "STOP"}]},
            "empty parts": response_with_parts(),
            "only thoughts": response_with_parts({"text": "[]", "thought": True}),
            "a call": response_with_parts({"functionCall": {"name": "detect"}}),
            "a text and a call": response_with_parts(
                {"text": "[]"}, {"functionCall": {"name": "detect"}}
            ),
            **text_problems(generated, "box_2d"),
        },
        ratio_rounding=0.0005,
        score_kind="none",
        skips={"A8": NO_SCORES},
    )


def reference() -> Case:
    golden = {
        "image": {"b64": GOLDEN_BASE64, "media_type": "image/jpeg"},
        "classes": ["car", "bus", "dog"],
        "threshold": 0.05,
        "model": "default",
        "return": "probs",
    }
    empty = reference_answer([])
    car = {"box": [1, 2, 30, 40], "label": "car", "score": 0.5}
    return Case(
        "reference",
        ReferenceAdapter(),
        "reference",
        {name: name for name in CLASSES},
        reference_answer,
        request("/v1/detect", golden),
        optional=frozenset({"scores"}),
        label_rows=(
            LabelCase(
                "exactly as asked for",
                reference_answer([Truth("bus", (1, 2, 30, 40))]),
                ("bus",),
            ),
        ),
        failures=(
            Failure(
                "B4",
                401,
                {"title": "unauthorized", "detail": "the token is not valid"},
                AuthError,
            ),
            Failure("B4", 403, b"", AuthError),
            Failure(
                "B4", 415, {"title": "refused", "detail": "not an image"}, ImageRejected
            ),
            Failure("B4", 404, {"title": "refused"}, BadRequest),
            Failure("B4", 400, {"title": 3}, BadRequest),
            Failure("C1", 503, {}, Throttled, {"retry-after": "4"}, 4.0),
            Failure("C4", 402, {"title": "pay"}, QuotaExhausted),
            Failure("C4", 423, {"title": "paused"}, QuotaExhausted),
            Failure(
                "C4", 429, {"title": "the monthly quota is used up"}, QuotaExhausted
            ),
        ),
        refused_classes=(("car", "bus", "car"),),
        broken={
            "no detections": {"image": {"w": 600, "h": 400}},
            "no size": {"detections": []},
            "another size": {**empty, "image": {"w": 601, "h": 400}},
            "turned": {**empty, "image": {"w": 400, "h": 600}},
            "box of three": {**empty, "detections": [{**car, "box": [1, 2, 3]}]},
            "a label that was not asked for": {
                **empty,
                "detections": [{**car, "label": "truck"}],
            },
            "a class that was not asked for": {
                **empty,
                "detections": [{**car, "scores": {"truck": 0.5}}],
            },
        },
        skips={
            "E4": "the wire format's errors are never inside a 200",
        },
    )


def reference_answer(objects: Sequence[Truth], size: tuple[int, int] = SIZE) -> Any:
    detections = []
    for truth in objects:
        detections.append(
            {"box": list(truth.box), "label": truth.name, "score": truth.score}
        )
    return {
        "id": "1",
        "model": "m",
        "image": {"w": size[0], "h": size[1]},
        "detections": detections,
    }


CASES = [
    dds("dino-x", "/v2/task/dinox/detection", "DINO-X-1.0"),
    dds("grounding-dino", "/v2/task/grounding_dino/detection", "GroundingDino-1.6-Pro"),
    google_vision(),
    rekognition(),
    azure_vision(),
    hf_endpoint(),
    roboflow(),
    roboflow_sam3(),
    t_rex(),
    openai_vlm("xyxy_1000", "openai-vlm"),
    openai_vlm("yxyx_1000", "openai-vlm-yxyx"),
    openai_vlm("xyxy_pixels", "openai-vlm-pixels"),
    openai_vlm("xyxy_ratio", "openai-vlm-ratio"),
    openai_vlm("xyxy_percent", "openai-vlm-percent"),
    anthropic(),
    gemini(),
    reference(),
]

assert base64.b64encode(GOLDEN_IMAGE.data).decode() == GOLDEN_BASE64
