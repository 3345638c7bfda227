"""Adapter of AWS Rekognition, operation DetectLabels: ``POST /`` with an AWS signature.

The classes are Amazon's own; ``Query.labels`` maps their names. Only common objects
have boxes: ratios of the image's sides that may reach beyond it. One object is listed
under its own name and under those of its ancestors.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coin_ray.cloud.adapters.parsing import (
    ParsedBox,
    error_object,
    expect_list,
    expect_number,
    expect_object,
    expect_score,
    expect_text,
    load_json,
    map_detections,
    sanitize_text,
)
from coin_ray.cloud.label_map import LabelMap
from coin_ray.cloud.protocol import (
    Auth,
    Capabilities,
    Frame,
    PreparedRequest,
    Query,
    RawDetections,
    error_for_status,
    retry_after,
)
from coin_ray.data.canonical import CanonicalImage
from coin_ray.errors import (
    AuthError,
    BadRequest,
    CloudError,
    ImageRejected,
    QuotaExhausted,
    Throttled,
    Transient,
)
from coin_ray.storage import JsonObject

LABELS_MAX = 1000
BOX_DECIMALS = 4
"""Decimals to which the boxes of one object agree under its names."""
ERROR_BY_TYPE: dict[str, type[CloudError]] = {
    "AccessDenied": AuthError,
    "UnrecognizedClient": AuthError,
    "InvalidSignature": AuthError,
    "IncompleteSignature": AuthError,
    "SignatureDoesNotMatch": AuthError,
    "MissingAuthentication": AuthError,
    "InvalidClientTokenId": AuthError,
    "ExpiredToken": AuthError,
    "OptInRequired": AuthError,
    "SubscriptionRequired": QuotaExhausted,
    "Throttling": Throttled,
    "ThrottledException": Throttled,
    "TooManyRequests": Throttled,
    "RequestLimitExceeded": Throttled,
    "ProvisionedThroughputExceeded": Throttled,
    "ImageTooLarge": ImageRejected,
    "InvalidImageFormat": ImageRejected,
    "InternalServer": Transient,
    "InternalFailure": Transient,
    "ServiceUnavailable": Transient,
    "ResourceNotReady": Transient,
    "RequestTimeout": Transient,
}
"""Errors by the beginning of ``__type``; the HTTP status says little: throttling is a
400."""


@dataclass(frozen=True)
class RekognitionAdapter:
    """AWS Rekognition's DetectLabels."""

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(
            "rekognition",
            open_vocabulary=False,
            per_class_scores=False,
            idempotent=False,
            url="https://rekognition.{region}.amazonaws.com",
            auth=Auth(sigv4="rekognition"),
            max_bytes=5_242_880,
            max_side=10_000,
            min_side=80,
        )

    def encode(self, image: CanonicalImage, query: Query) -> PreparedRequest:
        if query.model != "default":
            raise BadRequest(
                "Rekognition has one model, got"
                f" cloud.model={sanitize_text(query.model)[:60]!r}; leave it at default"
            )
        body = {
            "Image": {"Bytes": base64.b64encode(image.data).decode()},
            "MaxLabels": LABELS_MAX,
            "MinConfidence": round(query.score_min * 100, 4),
            "Features": ["GENERAL_LABELS"],
        }
        headers = {"X-Amz-Target": "RekognitionService.DetectLabels"}
        return PreparedRequest(
            "/", json.dumps(body).encode(), "application/x-amz-json-1.1", headers
        )

    def decode(
        self, headers: Mapping[str, str], body: bytes, query: Query, frame: Frame
    ) -> RawDetections:
        content_type = headers.get("content-type", "application/json")
        json_type = content_type.replace("x-amz-json-1.1", "json")
        response = expect_object(
            load_json({"content-type": json_type}, body), "the response"
        )
        nodes = expect_list(response.get("Labels"), "Labels")
        labels = [_parse_label(node, f"Labels[{i}]") for i, node in enumerate(nodes)]
        label_map = query.labels or LabelMap.of_classes(query.classes)
        boxes = _deduplicate_instances(labels, label_map)
        return map_detections(boxes, "ltwh_ratio", query, frame, "label")

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        response = error_object(body)
        type_name = sanitize_text(response.get("__type")).rpartition("#")[2]
        detail = sanitize_text(
            type_name, response.get("message"), response.get("Message")
        )
        message = f"the service answered {status}: {detail}"
        error_class = _error_class(type_name)
        if error_class is Throttled:
            return Throttled(message, retry_after(headers))
        if error_class is Transient:
            return Transient(message, may_have_billed=status >= 500)
        if status == 400 and "image.bytes" in detail:
            return ImageRejected(message)
        if error_class is not None:
            return error_class(message)
        return error_for_status(status, headers, detail)


def _error_class(type_name: str) -> type[CloudError] | None:
    for beginning, error_class in ERROR_BY_TYPE.items():
        if type_name.startswith(beginning):
            return error_class
    return None


@dataclass(frozen=True, slots=True)
class _Instance:
    """One object: left, top, width and height as ratios, and its score."""

    box: tuple[float, ...]
    score: float


@dataclass(frozen=True, slots=True)
class _Label:
    """One label of the response. ``names``: its name and aliases."""

    names: tuple[str, ...]
    ancestors: tuple[str, ...]
    instances: tuple[_Instance, ...]


def _parse_label(node: Any, field: str) -> _Label:
    json_object = expect_object(node, field)
    name = expect_text(json_object.get("Name"), f"{field}.Name")
    aliases = _parse_names(json_object, "Aliases", field)
    instances = expect_list(json_object.get("Instances", []), f"{field}.Instances")
    return _Label(
        (name, *aliases),
        _parse_names(json_object, "Parents", field),
        tuple(
            _parse_instance(instance, f"{field}.Instances[{i}]")
            for i, instance in enumerate(instances)
        ),
    )


def _parse_names(label: JsonObject, key: str, field: str) -> tuple[str, ...]:
    nodes = expect_list(label.get(key, []), f"{field}.{key}")
    objects = [expect_object(node, f"{field}.{key}") for node in nodes]
    return tuple(
        expect_text(json_object.get("Name"), f"{field}.{key}")
        for json_object in objects
    )


def _parse_instance(node: Any, field: str) -> _Instance:
    json_object = expect_object(node, field)
    box = expect_object(json_object.get("BoundingBox"), f"{field}.BoundingBox")
    sides = tuple(
        expect_number(box.get(key), f"{field}.{key}")
        for key in ("Left", "Top", "Width", "Height")
    )
    confidence = json_object.get("Confidence")
    return _Instance(sides, expect_score(confidence, f"{field}.Confidence", 100.0))


def _deduplicate_instances(
    labels: list[_Label], label_map: LabelMap
) -> list[ParsedBox]:
    """Keep one label for each box that is listed under a name and its ancestors.

    That is the label nearest to the leaf that the map has under its own name, else the
    leaf itself.
    """
    depths = {label.names[0]: len(label.ancestors) for label in labels}
    same_box: dict[tuple[float, ...], list[tuple[_Label, ParsedBox]]] = {}
    for label in labels:
        ancestors = sorted(label.ancestors, key=lambda name: -depths.get(name, 0))
        candidates = (*label.names, *ancestors)
        for instance in label.instances:
            rounded = tuple(round(side, BOX_DECIMALS) for side in instance.box)
            parsed_box = ParsedBox(instance.box, candidates, instance.score)
            same_box.setdefault(rounded, []).append((label, parsed_box))
    unique_boxes = []
    for group in same_box.values():
        worse_names = _worse_names([label for label, _ in group], label_map)
        unique_boxes += [
            parsed_box
            for label, parsed_box in group
            if label.names[0] not in worse_names
        ]
    return unique_boxes


def _worse_names(labels: list[_Label], label_map: LabelMap) -> set[str]:
    """Return the names of labels of one box that another of its labels is better than.

    Of a label and its ancestor that is the one which the map has, else the label.
    """
    by_name = {label.names[0]: label for label in labels}
    worse_names = set()
    for name, label in by_name.items():
        for ancestor in label.ancestors:
            if ancestor not in by_name or ancestor == name:
                continue
            only_ancestor_in_map = _is_in_map(
                by_name[ancestor], label_map
            ) and not _is_in_map(label, label_map)
            worse_names.add(name if only_ancestor_in_map else ancestor)
    return worse_names


def _is_in_map(label: _Label, label_map: LabelMap) -> bool:
    return label_map.find(label.names) is not None or label_map.ignores(label.names)
