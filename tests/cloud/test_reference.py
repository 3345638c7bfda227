from __future__ import annotations

import asyncio
import base64
import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coin_ray.cloud.adapters.reference import ReferenceAdapter
from coin_ray.cloud.label_map import LabelMap
from coin_ray.cloud.protocol import Frame, Query, RawDetections, retry_after
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

from .conftest import CLASSES, answer_body, element, good, picture, status

ADAPTER = ReferenceAdapter()
QUERY = Query("default", CLASSES, 0.05)
FRAME = Frame((60, 40), (60, 40))
JSON = {"content-type": "application/json; charset=utf-8"}


def decode(answer: Any, frame: Frame = FRAME) -> RawDetections:
    return ADAPTER.decode(
        JSON,
        answer if isinstance(answer, bytes) else json.dumps(answer).encode(),
        QUERY,
        frame,
    )


def test_encode() -> None:
    image = picture()
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
    raw = decode(
        answer_body(
            element("car", 0.71, scores={"car": 0.71, "dog": 0.08}),
            element("bus", 0.2, scores={"bus": 0.2}),
        )
    )
    assert raw.score_kind == "per_class"
    assert np.allclose(raw.class_scores, [[0.71, 0, 0.08], [0, 0.2, 0]])
    assert raw.boxes.dtype == raw.class_scores.dtype == np.float32
    assert np.allclose(raw.boxes[0], [1, 2, 30, 20])


def test_label_and_score_only() -> None:
    raw = decode(answer_body(element("dog", 0.3)))
    assert raw.score_kind == "label"
    assert np.allclose(raw.class_scores, [[0, 0, 0.3]])


def test_proved_empty() -> None:
    raw = decode(answer_body())
    assert raw.boxes.shape == (0, 4)
    assert raw.class_scores.shape == (0, 3)


def test_boxes_in_the_original_frame() -> None:
    raw = decode(
        answer_body(
            element(box=(-5, 0, 30, 1e9)),
            element(box=(10, 10, 10.05, 20)),
            element(box=(9, 9, 3, 3)),
        ),
        Frame((60, 40), (601, 397)),
    )
    assert len(raw) == 1
    assert np.allclose(raw.boxes, [[0, 0, 300.5, 397]])


OWN_NAMES = LabelMap(
    {"automobile": (0, 1.0), "van": (0, 0.5), "coach": (1, 1.0), "hound": (2, 1.0)},
    frozenset({"wheel"}),
    service="http",
)


def test_a_server_with_names_of_its_own() -> None:
    """The label decides whether a box stays; of two names for one class the better
    score counts, after its weight."""
    answer = answer_body(
        element(
            "Van",
            0.9,
            scores={"Van": 0.9, "automobile": 0.3, "coach": 0.2, "tree": 0.8},
        ),
        element("hound", 0.4, scores={"hound": 0.4, "wheel": 0.3}),
        element("tree", 0.8, scores={"tree": 0.8, "hound": 0.1}),
        element("wheel", 0.7, scores={"wheel": 0.7, "coach": 0.6}),
        element("car", 0.6, scores={"car": 0.6}),
    )
    raw = ADAPTER.decode(
        JSON, json.dumps(answer).encode(), replace(QUERY, labels=OWN_NAMES), FRAME
    )
    assert raw.class_scores == pytest.approx(np.array([[0.45, 0.2, 0], [0, 0, 0.4]]))
    assert raw.unmapped == ("tree", "car")
    assert raw.score_kind == "per_class"


def test_names_of_its_own_without_a_map_are_an_error_that_says_what_to_do() -> None:
    with pytest.raises(
        ProtocolError, match=r"'automobile' was not asked for.*--cloud\.label-map"
    ):
        decode(answer_body(element("automobile")))


def test_a_label_map_file_is_used_and_read_again_without_a_call(
    bench: Any, tmp_path: Path
) -> None:
    file = tmp_path / "map.yaml"
    file.write_text("service: http\nmap: {automobile: car}\n")
    subject = bench(
        good(element("automobile", 0.8), element("tree", 0.9)), label_map=str(file)
    )
    first = asyncio.run(subject.client.answer(picture()))
    assert first.raw.class_scores == pytest.approx(np.array([[0.8, 0, 0]]))
    assert first.raw.unmapped == ("tree",)
    file.write_text("service: http\nmap: {automobile: bus, tree: dog}\n")
    again = bench(status(500), label_map=str(file))
    second = asyncio.run(again.client.answer(picture()))
    assert second.status == "cached"
    assert second.raw.class_scores == pytest.approx(
        np.array([[0, 0, 0.9], [0, 0.8, 0]])
    )
    assert again.service.requests == []


MALFORMED = {
    "not json": b"<html>",
    "empty body": b"",
    "list": [],
    "null": None,
    "no detections": {"image": {"w": 60, "h": 40}},
    "null detections": {"image": {"w": 60, "h": 40}, "detections": None},
    "object for list": {"image": {"w": 60, "h": 40}, "detections": {}},
    "no image": {"detections": []},
    "another size": answer_body(width=61),
    "text size": {"image": {"w": "60", "h": 40}, "detections": []},
    "box of three": answer_body(element(box=(1, 2, 3))),
    "box of five": answer_body(element(box=(1, 2, 3, 4, 5))),
    "text in box": answer_body(element(box=(1, 2, "3", 4))),
    "bool in box": answer_body(element(box=(1, 2, True, 4))),
    "NaN": answer_body(element(box=(1, 2, float("nan"), 4))),
    "infinity": answer_body(element(score=float("inf"))),
    "huge exponent": (
        json.dumps(answer_body(element())).replace("0.5", "1e999").encode()
    ),
    "huge integer": (
        json.dumps(answer_body(element())).replace("0.5", "9" * 400).encode()
    ),
    "percent": answer_body(element(score=97.0)),
    "text score": answer_body(element(score="0.9")),  # type: ignore[arg-type]
    "null score": answer_body(element(score=None)),  # type: ignore[arg-type]
    "unknown label": answer_body(element("cart")),
    "label is a list": answer_body(element(["car"])),  # type: ignore[arg-type]
    "no label": answer_body({"box": [1, 2, 3, 4], "score": 0.4}),
    "unknown class in scores": answer_body(element(scores={"cart": 0.2})),
    "scores is a list": answer_body(element(scores=[0.2])),
    "element is a number": {"image": {"w": 60, "h": 40}, "detections": [7]},
    "key twice": b'{"image": {"w": 60, "h": 40}, "detections": [], "detections": []}',
    "deep": b'{"detections":' + b"[" * 100_000,
    "latin-1": '{"detections": ["é"]}'.encode("latin-1"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_answers_are_never_empty(name: str) -> None:
    with pytest.raises(ProtocolError) as caught:
        decode(
            MALFORMED[name]
            if isinstance(MALFORMED[name], bytes)
            else json.dumps(MALFORMED[name]).encode()
        )
    assert len(str(caught.value)) < 300
    assert caught.value.may_have_billed


def test_other_content_type() -> None:
    with pytest.raises(ProtocolError, match="text/html"):
        ADAPTER.decode(
            {"content-type": "text/html"},
            json.dumps(answer_body()).encode(),
            QUERY,
            FRAME,
        )


WHOLE = answer_body(
    element("car", 0.71, scores={"car": 0.71, "dog": 0.08}), element("bus", 0.2)
)


def test_truncated_at_every_byte() -> None:
    whole = json.dumps(WHOLE).encode()
    for length in range(len(whole)):
        with pytest.raises(ProtocolError):
            decode(whole[:length])
    assert len(decode(whole)) == 2


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    return [path, *(p for key, child in children for p in places(child, (*path, key)))]


ANY_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=True)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(places(WHOLE)[1:]), ANY_JSON)
def test_mutations_give_valid_detections_or_cloud_errors(
    path: tuple[Any, ...], value: Any
) -> None:
    answer = copy.deepcopy(WHOLE)
    parent: Any = answer
    for key in path[:-1]:
        parent = parent[key]
    parent[path[-1]] = value
    try:
        raw = decode(answer)
    except CloudError:
        return
    assert np.isfinite(raw.boxes).all()
    assert (raw.boxes >= 0).all()
    assert (raw.boxes <= [60, 40, 60, 40]).all()
    assert ((raw.class_scores >= 0) & (raw.class_scores <= 1)).all()


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_give_cloud_errors(body: bytes) -> None:
    with pytest.raises(CloudError):
        decode(body)


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
    ({"retry-after": "99999"}, 120),
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
