from __future__ import annotations

import asyncio
import base64
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coin_ray.cloud.adapters.reference import ReferenceAdapter
from coin_ray.cloud.label_map import LabelMap
from coin_ray.cloud.protocol import (
    BoxCounts,
    Frame,
    Query,
    RawDetections,
    retry_after,
)
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

from .conftest import (
    CLASSES,
    HarnessBuilder,
    detection_json,
    ok_response,
    response_json,
    solid_image,
    status_response,
)
from .json_mutations import ANY_JSON, JsonPath, json_paths, replace_node

ADAPTER = ReferenceAdapter()
QUERY = Query("default", CLASSES, 0.05)
FRAME = Frame((60, 40), (60, 40))
JSON = {"content-type": "application/json; charset=utf-8"}


def _decode(response: Any, frame: Frame = FRAME) -> RawDetections:
    body = response if isinstance(response, bytes) else json.dumps(response).encode()
    return ADAPTER.decode(JSON, body, QUERY, frame)


def test_encode() -> None:
    image = solid_image()
    request = ADAPTER.encode(image, QUERY)
    assert request.path == "/v1/detect"
    body = json.loads(request.body)
    assert base64.b64decode(body["image"]["b64"]) == image.data
    expected = {
        "classes": list(CLASSES),
        "threshold": 0.05,
        "model": "default",
        "return": "probs",
    }
    assert expected.items() <= body.items()
    assert body["image"]["b64"] not in repr(request)


def test_scores_per_class() -> None:
    raw = _decode(
        response_json(
            detection_json("car", 0.71, scores={"car": 0.71, "dog": 0.08}),
            detection_json("bus", 0.2, scores={"bus": 0.2}),
        )
    )
    assert raw.score_kind == "per_class"
    assert np.allclose(raw.class_scores, [[0.71, 0, 0.08], [0, 0.2, 0]])
    assert raw.boxes.dtype == raw.class_scores.dtype == np.float32
    assert np.allclose(raw.boxes[0], [1, 2, 30, 20])


def test_label_and_score_only() -> None:
    raw = _decode(response_json(detection_json("dog", 0.3)))
    assert raw.score_kind == "label"
    assert np.allclose(raw.class_scores, [[0, 0, 0.3]])


def test_proved_empty() -> None:
    raw = _decode(response_json())
    assert raw.boxes.shape == (0, 4)
    assert raw.class_scores.shape == (0, 3)


def test_boxes_in_the_original_frame() -> None:
    raw = _decode(
        response_json(
            detection_json(box=(-5, 0, 30, 45), score=0.9),
            detection_json(box=(10, 10, 10.05, 20)),
            detection_json(box=(9, 9, 3, 3)),
            detection_json(box=(61, 9, 65, 12)),
        ),
        Frame((60, 40), (600, 400)),
    )
    assert np.allclose(raw.boxes, [[0, 0, 300, 400], [30, 30, 90, 90]])
    assert raw.counts == BoxCounts(swapped=1, thin=1, outside=1)


OWN_NAMES = LabelMap(
    {"automobile": (0, 1.0), "van": (0, 0.5), "coach": (1, 1.0), "hound": (2, 1.0)},
    frozenset({"wheel"}),
    service="http",
)


def test_a_server_with_names_of_its_own() -> None:
    """The label decides whether a box is kept; of two names for one class the better
    weighted score counts.
    """
    response = response_json(
        detection_json(
            "Van",
            0.9,
            scores={"Van": 0.9, "automobile": 0.3, "coach": 0.2, "tree": 0.8},
        ),
        detection_json("hound", 0.4, scores={"hound": 0.4, "wheel": 0.3}),
        detection_json("tree", 0.8, scores={"tree": 0.8, "hound": 0.1}),
        detection_json("wheel", 0.7, scores={"wheel": 0.7, "coach": 0.6}),
        detection_json("car", 0.6, scores={"car": 0.6}),
    )
    raw = ADAPTER.decode(
        JSON, json.dumps(response).encode(), replace(QUERY, labels=OWN_NAMES), FRAME
    )
    assert raw.class_scores == pytest.approx(np.array([[0.45, 0.2, 0], [0, 0, 0.4]]))
    assert raw.unmapped == ("tree", "car")
    assert raw.score_kind == "per_class"


def test_names_of_its_own_without_a_map_are_an_error_that_says_what_to_do() -> None:
    with pytest.raises(
        ProtocolError, match=r"'automobile' was not asked for.*--cloud\.label-map"
    ):
        _decode(response_json(detection_json("automobile")))


def test_a_label_map_file_is_used_and_read_again_without_a_call(
    build_harness: HarnessBuilder, tmp_path: Path
) -> None:
    file = tmp_path / "map.yaml"
    file.write_text("service: http\nmap: {automobile: car}\n")
    harness = build_harness(
        ok_response(detection_json("automobile", 0.8), detection_json("tree", 0.9)),
        label_map=str(file),
    )
    first = asyncio.run(harness.client.answer(solid_image()))
    assert first.raw.class_scores == pytest.approx(np.array([[0.8, 0, 0]]))
    assert first.raw.unmapped == ("tree",)
    file.write_text("service: http\nmap: {automobile: bus, tree: dog}\n")
    second_harness = build_harness(status_response(500), label_map=str(file))
    second = asyncio.run(second_harness.client.answer(solid_image()))
    assert second.status == "cached"
    assert second.raw.class_scores == pytest.approx(
        np.array([[0, 0, 0.9], [0, 0.8, 0]])
    )
    assert second_harness.service.requests == []


MALFORMED = {
    "not json": b"<html>",
    "empty body": b"",
    "list": [],
    "null": None,
    "no detections": {"image": {"w": 60, "h": 40}},
    "null detections": {"image": {"w": 60, "h": 40}, "detections": None},
    "object for list": {"image": {"w": 60, "h": 40}, "detections": {}},
    "no image": {"detections": []},
    "another size": response_json(width=61),
    "text size": {"image": {"w": "60", "h": 40}, "detections": []},
    "box of three": response_json(detection_json(box=(1, 2, 3))),
    "box of five": response_json(detection_json(box=(1, 2, 3, 4, 5))),
    "text in box": response_json(detection_json(box=(1, 2, "3", 4))),
    "bool in box": response_json(detection_json(box=(1, 2, True, 4))),
    "NaN": response_json(detection_json(box=(1, 2, float("nan"), 4))),
    "infinity": response_json(detection_json(score=float("inf"))),
    "huge exponent": (
        json.dumps(response_json(detection_json())).replace("0.5", "1e999").encode()
    ),
    "huge integer": (
        json.dumps(response_json(detection_json())).replace("0.5", "9" * 400).encode()
    ),
    "percent": response_json(detection_json(score=97.0)),
    "text score": response_json(detection_json(score="0.9")),  # type: ignore[arg-type]
    "null score": response_json(detection_json(score=None)),  # type: ignore[arg-type]
    "unknown label": response_json(detection_json("cart")),
    "label is a list": response_json(detection_json(["car"])),  # type: ignore[arg-type]
    "no label": response_json({"box": [1, 2, 3, 4], "score": 0.4}),
    "unknown class in scores": response_json(detection_json(scores={"cart": 0.2})),
    "scores is a list": response_json(detection_json(scores=[0.2])),
    "element is a number": {"image": {"w": 60, "h": 40}, "detections": [7]},
    "key twice": b'{"image": {"w": 60, "h": 40}, "detections": [], "detections": []}',
    "deep": b'{"detections":' + b"[" * 100_000,
    "latin-1": '{"detections": ["é"]}'.encode("latin-1"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_answers_are_never_empty(name: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        _decode(MALFORMED[name])
    assert len(str(caught.value)) < 300
    assert caught.value.may_have_billed


def test_other_content_type() -> None:
    body = json.dumps(response_json()).encode()
    with pytest.raises(ProtocolError, match="text/html"):
        ADAPTER.decode({"content-type": "text/html"}, body, QUERY, FRAME)


WHOLE = response_json(
    detection_json("car", 0.71, scores={"car": 0.71, "dog": 0.08}),
    detection_json("bus", 0.2),
)


def test_truncated_at_every_byte() -> None:
    whole = json.dumps(WHOLE).encode()
    for length in range(len(whole)):
        with pytest.raises(ProtocolError):
            _decode(whole[:length])
    assert len(_decode(whole)) == 2


@given(st.sampled_from(list(json_paths(WHOLE))[1:]), ANY_JSON)
def test_mutations_give_valid_detections_or_cloud_errors(
    path: JsonPath, replacement: Any
) -> None:
    try:
        raw = _decode(replace_node(WHOLE, path, replacement))
    except CloudError:
        return
    assert np.isfinite(raw.boxes).all()
    assert (raw.boxes >= 0).all()
    assert (raw.boxes <= [60, 40, 60, 40]).all()
    assert ((raw.class_scores >= 0) & (raw.class_scores <= 1)).all()


@given(st.binary(max_size=60))
def test_any_bytes_of_the_reference_give_cloud_errors(body: bytes) -> None:
    with pytest.raises(CloudError):
        _decode(body)


STATUSES = [
    (400, {}, BadRequest),
    (401, {}, AuthError),
    (402, {}, QuotaExhausted),
    (403, {}, AuthError),
    (403, {"title": "out of Quota"}, QuotaExhausted),
    (404, {}, BadRequest),
    (408, {}, Transient),
    (413, {}, ImageRejected),
    (415, {}, ImageRejected),
    (422, {}, BadRequest),
    (423, {}, QuotaExhausted),
    (425, {}, Transient),
    (429, {}, Throttled),
    (429, {"detail": "daily quota is used up"}, QuotaExhausted),
    (451, {}, Refused),
    (500, {}, Transient),
    (502, {}, Transient),
    (503, {}, Transient),
    (507, {}, Transient),
    (302, {}, BadRequest),
]


@pytest.mark.parametrize(("code", "problem", "kind"), STATUSES)
def test_errors_by_status(
    code: int, problem: dict[str, str], kind: type[CloudError]
) -> None:
    error = ADAPTER.classify_error(code, {}, json.dumps(problem).encode())
    assert type(error) is kind
    assert str(code) in str(error)
    assert error.may_have_billed == (kind is Transient and code >= 500)


def test_unavailable_with_a_hint_is_throttling() -> None:
    error = ADAPTER.classify_error(503, {"retry-after": "7"}, b"")
    assert isinstance(error, Throttled)
    assert error.retry_after == 7


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"\xff", b'{"title": 3}', b"[" * 100_000]
)
def test_error_bodies_of_any_kind(body: bytes) -> None:
    assert str(ADAPTER.classify_error(500, {}, body)) == "the service answered 500"


DATE = "Wed, 21 Oct 2026 07:28:00 GMT"
HINTS = [
    ({}, None),
    ({"retry-after": "2"}, 2),
    ({"retry-after": "1.5"}, 1.5),
    ({"retry-after": "0"}, 0),
    ({"retry-after": "-5"}, 0),
    ({"retry-after": "99999"}, 99_999),
    ({"retry-after": "abc"}, None),
    ({"retry-after": "nan"}, None),
    ({"retry-after": "Wed, 99 Oct"}, None),
    ({"retry-after": "Wed, 21 Oct 2026 07:28:09 GMT", "date": DATE}, 9),
    ({"retry-after": DATE, "date": "Wed, 21 Oct 2026 08:28:09 GMT"}, 0),
    ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
]


@pytest.mark.parametrize(("headers", "seconds"), HINTS)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds
