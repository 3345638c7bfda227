"""Adapter of AWS Rekognition, operation DetectLabels: ``POST /`` with an AWS signature.

The classes are Amazon's own; ``Query.labels`` maps their names. Only common objects
have boxes: ratios of the image's sides that may reach beyond it. One object comes back
under its own name and under those of its ancestors.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from coin_ray.cloud.adapters.parsing import (
    Found,
    as_list,
    as_number,
    as_object,
    as_score,
    as_text,
    detections,
    error_object,
    load_json,
    short_text,
)
from coin_ray.cloud.label_map import LabelMap
from coin_ray.cloud.protocol import (
    Auth,
    Capabilities,
    Frame,
    PreparedRequest,
    Query,
    RawDetections,
    by_status,
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

LABELS_MAX = 1000
BOX_DECIMALS = 4
"""Decimals to which the boxes of one object agree under its names."""
BY_TYPE: dict[str, type[CloudError]] = {
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
"""Beginnings of ``__type``; the HTTP status says little, throttling is a 400."""


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
                "Rekognition has one model; got"
                f" cloud.model={short_text(query.model)[:60]!r}, leave it at default"
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
        media_type = headers.get("content-type", "application/json").replace(
            "x-amz-json-1.1", "json"
        )
        answer = as_object(load_json({"content-type": media_type}, body), "the answer")
        labels = [
            _label(v, f"Labels[{i}]")
            for i, v in enumerate(as_list(answer.get("Labels"), "Labels"))
        ]
        mapping = query.labels or LabelMap.of_classes(query.classes)
        return detections(
            _one_name_per_object(labels, mapping), "ltwh_ratio", query, frame, "label"
        )

    def classify_error(
        self, status: int, headers: Mapping[str, str], body: bytes
    ) -> CloudError:
        answer = error_object(body)
        name = short_text(answer.get("__type")).rpartition("#")[2]
        detail = short_text(name, answer.get("message"), answer.get("Message"))
        message = f"the service answered {status}: {detail}"
        kind = next(
            (kind for beginning, kind in BY_TYPE.items() if name.startswith(beginning)),
            None,
        )
        if kind is Throttled:
            return Throttled(message, retry_after(headers))
        if kind is Transient:
            return Transient(message, may_have_billed=status >= 500)
        if status == 400 and "image.bytes" in detail:
            return ImageRejected(message)
        return kind(message) if kind else by_status(status, headers, detail)


@dataclass(frozen=True, slots=True)
class _Label:
    """``names``: the name and its aliases; ``instances``: box and score of each."""

    names: tuple[str, ...]
    ancestors: tuple[str, ...]
    instances: tuple[tuple[tuple[float, ...], float], ...]

    def descends_from(self, other: _Label) -> bool:
        return other.names[0] in self.ancestors


def _label(value: Any, place: str) -> _Label:
    one = as_object(value, place)
    names = (as_text(one.get("Name"), f"{place}.Name"), *_names(one, "Aliases", place))
    instances = as_list(one.get("Instances", []), f"{place}.Instances")
    return _Label(
        names,
        _names(one, "Parents", place),
        tuple(_instance(v, f"{place}.Instances[{i}]") for i, v in enumerate(instances)),
    )


def _names(label: dict[str, Any], key: str, place: str) -> tuple[str, ...]:
    return tuple(
        as_text(as_object(v, f"{place}.{key}").get("Name"), f"{place}.{key}")
        for v in as_list(label.get(key, []), f"{place}.{key}")
    )


def _instance(value: Any, place: str) -> tuple[tuple[float, ...], float]:
    one = as_object(value, place)
    box = as_object(one.get("BoundingBox"), f"{place}.BoundingBox")
    sides = tuple(
        as_number(box.get(key), f"{place}.{key}")
        for key in ("Left", "Top", "Width", "Height")
    )
    return sides, as_score(one.get("Confidence"), f"{place}.Confidence", 100.0)


def _one_name_per_object(labels: list[_Label], mapping: LabelMap) -> list[Found]:
    """Of a box under a name and its ancestors one is kept: the nearest to the leaf that
    the map has under its own name, else the leaf.
    """
    depth = {label.names[0]: len(label.ancestors) for label in labels}
    same_box: dict[tuple[float, ...], list[tuple[_Label, Found]]] = {}
    for label in labels:
        candidates = (
            *label.names,
            *sorted(label.ancestors, key=lambda name: -depth.get(name, 0)),
        )
        for box, score in label.instances:
            same_box.setdefault(tuple(round(v, BOX_DECIMALS) for v in box), []).append(
                (label, Found(box, candidates, score))
            )
    return [
        found
        for group in same_box.values()
        for label, found in group
        if not any(_replaces(other, label, mapping) for other, _ in group)
    ]


def _replaces(one: _Label, other: _Label, mapping: LabelMap) -> bool:
    """Whether ``one`` says better than ``other`` what an object of both is."""
    if not (one.descends_from(other) or other.descends_from(one)):
        return False
    known, other_known = (
        mapping.find(label.names) is not None or mapping.ignores(label.names)
        for label in (one, other)
    )
    return known if known != other_known else one.descends_from(other)
