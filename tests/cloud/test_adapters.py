"""One table for all adapters: rows of tests x ``CASES``. A row that cannot apply to a
service is skipped with a reason in writing."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any, TypeVar, get_args

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from coin_ray.class_names import normalize_class_name
from coin_ray.cloud.http.signing import signer_for
from coin_ray.cloud.label_map import LabelMap
from coin_ray.cloud.protocol import (
    Auth,
    Frame,
    Pending,
    PreparedRequest,
    Query,
    RawDetections,
)
from coin_ray.cloud.services import shrink_to_limits
from coin_ray.data.canonical import CanonicalImage, canonical_image
from coin_ray.errors import (
    AuthError,
    BadRequest,
    CloudError,
    ImageRejected,
    ProtocolError,
    Refused,
    Throttled,
    Transient,
)

from .cases import (
    CASES,
    CLASSES,
    GOLDEN_IMAGE,
    SIZE,
    Case,
    Failure,
    LabelCase,
    Row,
    Truth,
)
from .conftest import same_detections
from .emulator import PROVIDERS, Emulator, scene
from .emulator.app import AWS_KEY_ID, AWS_SECRET, TOKEN, score_of
from .json_mutations import ANY_JSON, json_paths, node_at, remove_node, replace_node

FRAME = Frame(SIZE, SIZE)
REGION = "us-east-1"
POLLS_MAX = 5
Box = tuple[int, int, int, int]
Test = TypeVar("Test", bound=Callable[..., None])

ROW_ATTRIBUTE = "conformance_row"


def _row(name: Row) -> Callable[[Test], Test]:
    """Parametrize the test of a row with every case; skip those that give a reason."""

    def decorate(test: Test) -> Test:
        parameters = []
        for case in CASES:
            reason = case.skips.get(name)
            marks = [pytest.mark.skip(reason)] if reason is not None else []
            parameters.append(pytest.param(case, id=case.name, marks=marks))
        setattr(test, ROW_ATTRIBUTE, name)
        return pytest.mark.parametrize("case", parameters)(test)  # type: ignore[no-any-return]

    return decorate


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Set the emulator's secrets in the environment."""
    monkeypatch.setenv("EMULATED_TOKEN", TOKEN)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", AWS_KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS_SECRET)
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    return monkeypatch


def _query_emulator(
    case: Case,
    image: CanonicalImage,
    emulator: Emulator | None = None,
    query: Query | None = None,
) -> RawDetections:
    """Query the emulator, which decodes the image that it receives, by the adapter."""
    transport = (emulator or Emulator(PROVIDERS)).transport()

    async def run() -> RawDetections:
        async with httpx.AsyncClient(transport=transport) as http:
            return await _poll_until_answered(case, http, image, query or case.query())

    return asyncio.run(run())


async def _poll_until_answered(
    case: Case, http: httpx.AsyncClient, image: CanonicalImage, query: Query
) -> RawDetections:
    request = case.adapter.encode(image, query)
    frame = Frame((image.width, image.height), image.original)
    for _ in range(POLLS_MAX):
        response = await _send(case, http, request)
        body = response.content
        if response.status_code != 200:
            raise case.adapter.classify_error(
                response.status_code, response.headers, body
            )
        headers = {"content-type": response.headers["content-type"]}
        decoded = case.adapter.decode(headers, body, query, frame)
        if isinstance(decoded, RawDetections):
            return decoded
        assert case.adapter.capabilities.asynchronous
        request = decoded.request or request
    raise AssertionError("still pending")


async def _send(
    case: Case, http: httpx.AsyncClient, request: PreparedRequest
) -> httpx.Response:
    auth = case.adapter.capabilities.auth
    url = f"https://emulator.example.com/{case.provider}{request.path}"
    headers = {**request.headers, "Idempotency-Key": "key-0"}
    if request.body:
        headers["Content-Type"] = request.content_type
    has_token = isinstance(auth, Auth) and auth.sigv4 is None
    signer = signer_for(auth, "EMULATED_TOKEN" if has_token else None, REGION)
    if auth is not None:
        signed = signer.sign(request.method, url, headers, request.body)
        headers |= signed.headers
    return await http.request(
        request.method, url, content=request.body, headers=headers
    )


def _decode(
    case: Case, response: Any, frame: Frame = FRAME, query: Query | None = None
) -> RawDetections | Pending:
    """Decode a body: bytes, or a value for JSON."""
    headers = {"content-type": case.content_type}
    body = response if isinstance(response, bytes) else json.dumps(response).encode()
    return case.adapter.decode(headers, body, query or case.query(), frame)


def _decode_detections(
    case: Case, response: Any, frame: Frame = FRAME, query: Query | None = None
) -> RawDetections:
    raw = _decode(case, response, frame, query)
    assert isinstance(raw, RawDetections)
    return raw


def _three_objects(case: Case) -> Any:
    """Return a valid response with a car, a bus and a dog."""
    boxes = ((10, 20, 110, 170), (200, 30, 330, 90), (400, 200, 599, 399))
    truths = []
    for name, box, score in zip(CLASSES, boxes, (0.9, 0.8, 0.7), strict=True):
        truths.append(Truth(case.names[name], box, score))
    return case.answer(truths, SIZE)


def _check_detections(
    case: Case,
    raw: RawDetections,
    class_indices: Sequence[int],
    boxes: Sequence[Box],
    image: CanonicalImage,
    tolerance: float = 0.01,
) -> None:
    """Check that each object is detected once, under its class, with its edges exact to
    ``tolerance`` original pixels plus the service's own rounding.
    """
    assert raw.boxes.dtype == raw.class_scores.dtype == np.float32
    assert len(raw) == len(boxes)
    assert not raw.unmapped
    truth = np.array(boxes, np.float64).reshape(-1, 4)
    sent = (image.width, image.height)
    rounding = np.array(case.rounding(sent)) * image.original / sent
    for box, index in zip(raw.boxes, raw.class_scores.argmax(1), strict=True):
        nearest = int(np.abs(truth - box).max(1).argmin())
        errors = np.abs(truth[nearest] - box).reshape(2, 2)
        assert (errors <= rounding + tolerance).all()
        assert index == class_indices[nearest]
    best_scores = raw.class_scores.max(1)
    assert (np.diff(best_scores) <= 0).all()
    if case.scored:
        expected = [score_of(object_id) for object_id in range(len(boxes))]
        assert np.allclose(best_scores, expected, atol=1e-5)


def _scene_image(
    class_indices: Sequence[int],
    boxes: Sequence[Box],
    size: tuple[int, int],
    max_side: int = 4096,
) -> CanonicalImage:
    return _cached_scene_image(tuple(class_indices), tuple(boxes), size, max_side)


@cache
def _cached_scene_image(
    class_indices: tuple[int, ...],
    boxes: tuple[Box, ...],
    size: tuple[int, int],
    max_side: int,
) -> CanonicalImage:
    """Draw the image once for all services."""
    return canonical_image(scene(class_indices, boxes, size), max_side)


@_row("A1")
def test_a1_no_objects(case: Case, secrets: pytest.MonkeyPatch) -> None:
    raw = _query_emulator(case, _scene_image([], [], (320, 240)))
    assert raw.boxes.shape == (0, 4)
    assert raw.class_scores.shape == (0, 3)


@_row("A2")
def test_a2_one_object(case: Case, secrets: pytest.MonkeyPatch) -> None:
    image = _scene_image([1], [(40, 30, 271, 188)], (320, 240))
    raw = _query_emulator(case, image)
    _check_detections(case, raw, [1], [(40, 30, 271, 188)], image)
    if not any(case.rounding(SIZE)):
        assert _iou(raw.boxes[0], (40, 30, 271, 188)) >= 0.999


@_row("A3")
def test_a3_300_objects(case: Case, secrets: pytest.MonkeyPatch) -> None:
    boxes = [
        (x * 40 + 8, y * 40 + 8, x * 40 + 32, y * 40 + 32 - x % 5)
        for y in range(15)
        for x in range(20)
    ]
    classes = [i % 3 for i in range(300)]
    image = _scene_image(classes, boxes, (808, 608))
    _check_detections(case, _query_emulator(case, image), classes, boxes, image)


@_row("A4")
def test_a4_boxes_at_the_edges(case: Case, secrets: pytest.MonkeyPatch) -> None:
    boxes = [(0, 0, 90, 70), (230, 170, 320, 240), (0, 100, 320, 140)]
    image = _scene_image([0, 1, 2], boxes, (320, 240))
    _check_detections(case, _query_emulator(case, image), [0, 1, 2], boxes, image)


CLASS_LISTS: list[tuple[str, ...]] = [
    (),
    ("car",),
    ("car", "bus"),
    ("bus", "car"),
    ("car", "car"),
    ("Car", "car"),
    ("feu rouge", "Hündin", "犬", "🚲"),
    ("car, red", "bus"),
    ("St. Bernard", "dog"),
    ("what?",),
    ("", "car"),
    (" car ",),
    ("fire_truck", "fire-engine"),
    ('say "dog"', "back\\slash", "{}", "<b>"),
    ("a" * 300,),
    tuple(f"class {i}" for i in range(90)),
]


@_row("A5")
def test_a5_class_lists(case: Case) -> None:
    for classes in (*CLASS_LISTS, *case.refused_classes):
        query = Query("default", classes, 0.05)
        try:
            case.adapter.encode(GOLDEN_IMAGE, query)
        except BadRequest:
            continue
        assert classes not in case.refused_classes
        boxes = [(float(3 * i), 10.0, 3.0 * i + 20, 60.0) for i in range(len(classes))]
        truths = [Truth(name, box) for name, box in zip(classes, boxes, strict=True)]
        response = case.respond(truths, classes)
        raw = _decode_detections(case, response, query=query)
        assert len(raw) == len(classes)
        for xyxy, scores in zip(raw.boxes, raw.class_scores, strict=True):
            nearest = int(np.abs(np.array(boxes) - xyxy).max(1).argmin())
            expected = normalize_class_name(classes[nearest])
            assert normalize_class_name(classes[scores.argmax()]) == expected


@_row("A6")
def test_a6_names(case: Case) -> None:
    assert case.label_rows
    for labels in case.label_rows:
        _check_labels(case, labels)


def _check_labels(case: Case, labels: LabelCase) -> None:
    raw = _decode_detections(case, labels.response)
    names = tuple(CLASSES[k] for k in raw.class_scores.argmax(1))
    assert names == labels.classes, labels.description
    assert raw.unmapped == labels.unmapped, labels.description
    if labels.scores is not None:
        assert np.allclose(raw.class_scores.max(1), labels.scores), labels.description


@_row("A6")
def test_a6_weights_and_ignored_names(case: Case) -> None:
    truths = [
        Truth(case.names["car"], (10, 20, 110, 170), 0.8),
        Truth(case.names["dog"], (10, 20, 110, 170), 0.6),
    ]
    car, dog = (normalize_class_name(case.names[name]) for name in ("car", "dog"))
    query = replace(case.query(), labels=LabelMap({car: (1, 0.5)}, frozenset({dog})))
    raw = _decode_detections(case, case.answer(truths, SIZE), query=query)
    assert raw.class_scores.argmax(1).tolist() == [1]
    assert not raw.unmapped
    if case.scored:
        assert np.allclose(raw.class_scores, [[0, 0.4, 0]])


@_row("A7")
def test_a7_scores_become_distributions(case: Case) -> None:
    from tests.cloud.tensors import to_detections

    for classes in (CLASSES, CLASSES[:2], CLASSES[:1]):
        names = [case.names[c] for c in classes]
        query = Query("default", classes, 0.05, LabelMap.of_classes(names))
        scores = [round(0.95 - 0.06 * i, 2) for i in range(15)]
        truths = []
        for i, score in enumerate(scores):
            box = (10.0 * i, 20, 10.0 * i + 60, 170)
            truths.append(Truth(names[i % len(names)], box, score))
        response = case.respond(truths, classes)
        raw = _decode_detections(case, response, query=query)
        _check_scores(case, raw, len(truths))
        detections, sources = to_detections(raw, score_min=0.05)
        probs = detections.probs.numpy()
        assert np.allclose(probs.sum(1), 1, atol=1e-5)
        assert (probs[:, :-1].argmax(1) == detections.labels.numpy()).all()
        assert len(sources) == len(probs) == len(truths)
        if case.scored:
            assert (np.diff(probs[:, :-1].max(1)) <= 1e-6).all()


def _check_scores(case: Case, raw: RawDetections, count: int) -> None:
    assert len(raw) == count
    assert raw.score_kind == case.score_kind
    if raw.score_kind == "per_class":
        assert case.adapter.capabilities.per_class_scores
    assert ((raw.class_scores >= 0) & (raw.class_scores <= 1)).all()
    assert (raw.class_scores.max(1) > 0).all()
    if raw.score_kind == "none":
        assert set(raw.class_scores.ravel()) <= {0.0, 1.0}


SCORES = [(0.97, 0.97), (0.0, 0.0), (1.0, 1.0), (1.0000001, 1.0), (-0.0000001, 0.0)]
BAD_SCORES = [
    1.5,
    97.5,
    -0.5,
    float("nan"),
    float("inf"),
    "0.9",
    None,
    [0.9],
    {"value": 0.9},
    True,
    10**400,
]


@_row("A8")
def test_a8_scores(case: Case) -> None:
    def response(score: Any) -> Any:
        return case.answer([Truth(case.names["bus"], (10, 20, 110, 170), score)], SIZE)

    for score, expected in SCORES:
        raw = _decode_detections(case, response(score))
        assert np.allclose(raw.class_scores, [[0, expected, 0]], atol=1e-6), score
    for bad_score in BAD_SCORES:
        with pytest.raises(ProtocolError):
            _decode(case, response(bad_score))


@_row("B1")
def test_b1_golden_request(case: Case) -> None:
    request = case.adapter.encode(GOLDEN_IMAGE, case.query())
    assert request == case.golden
    repeated = case.adapter.encode(GOLDEN_IMAGE, case.query())
    assert repeated == request
    assert case.golden.body[:20].decode("latin-1") not in repr(request)


def _check_failures(case: Case, failures: Sequence[Failure]) -> None:
    assert failures
    for failure in failures:
        body = failure.body
        if not isinstance(body, bytes):
            body = json.dumps(body).encode()
        headers = {"content-type": case.content_type, **failure.headers}
        error = _failure_error(case, failure.status, headers, body)
        assert type(error) is failure.kind, (failure, error)
        assert len(str(error)) < 400
        if isinstance(error, Throttled):
            assert error.retry_after == failure.wait, failure


def _failure_error(
    case: Case, status: int, headers: Mapping[str, str], body: bytes
) -> CloudError:
    if status != 200:
        return case.adapter.classify_error(status, headers, body)
    with pytest.raises(CloudError) as caught:
        case.adapter.decode(headers, body, case.query(), FRAME)
    return caught.value


@_row("B4")
def test_b4_a_wrong_secret(case: Case, secrets: pytest.MonkeyPatch) -> None:
    if case.adapter.capabilities.auth is None:
        return
    emulator = Emulator(PROVIDERS)
    secrets.setenv("EMULATED_TOKEN", "another-token-9876543210")
    secrets.setenv("AWS_SECRET_ACCESS_KEY", "another/secret")
    image = _scene_image([0], [(40, 30, 271, 188)], (320, 240))
    with pytest.raises(AuthError):
        _query_emulator(case, image, emulator)
    assert len(emulator.calls) == 1
    assert not emulator.billed[case.provider]


@_row("B4")
def test_b4_failures(case: Case) -> None:
    _check_failures(case, [f for f in case.failures if f.row == "B4"])


STATUSES: list[tuple[int, type[CloudError]]] = [
    (401, AuthError),
    (408, Transient),
    (413, ImageRejected),
    (425, Transient),
    (451, Refused),
    (500, Transient),
    (502, Transient),
    (503, Transient),
    (504, Transient),
    (507, Transient),
    (307, BadRequest),
]
JUNK = [
    b"",
    b"<html>502</html>",
    b"[]",
    b"null",
    b"3",
    b"{",
    b"\xff\xfe",
    b"[" * 100_000,
    b'{"error": []}',
    b'{"error": {"message": {}}}',
]
JUNK += [
    b'{"error": {"message": "x", "details": 3}}',
    b'{"__type": []}',
    b'{"code": null, "msg": [], "errors": {}}',
    b'{"message": 5}',
]


@_row("B4")
def test_b4_statuses_with_any_body(case: Case) -> None:
    for status, kind in STATUSES:
        for body in JUNK:
            error = case.adapter.classify_error(status, {}, body)
            assert type(error) is kind, (status, body[:40])
            assert error.may_have_billed or status < 500


DATE = "Wed, 21 Oct 2026 07:28:00 GMT"
HINTS: list[tuple[dict[str, str], float | None]] = [
    ({"retry-after": "2"}, 2),
    ({"retry-after": "Wed, 21 Oct 2026 07:28:09 GMT", "date": DATE}, 9),
    ({}, None),
    ({"retry-after": "0"}, 0),
    ({"retry-after": "-5"}, 0),
    ({"retry-after": "99999"}, 99_999),
    ({"retry-after": "abc"}, None),
]


@_row("C1")
def test_c1_throttled(case: Case) -> None:
    for headers, seconds in HINTS:
        for body in JUNK:
            error = case.adapter.classify_error(429, headers, body)
            assert isinstance(error, Throttled)
            assert error.retry_after == seconds
    failures = [f for f in case.failures if f.row == "C1"]
    if failures:
        _check_failures(case, failures)


@_row("C4")
def test_c4_quota_used_up(case: Case) -> None:
    _check_failures(case, [f for f in case.failures if f.row == "C4"])


@_row("E1")
def test_e1_truncated_at_every_byte(case: Case) -> None:
    for response in (_three_objects(case), case.answer([], SIZE), *case.further):
        body = json.dumps(response).encode()
        _decode(case, body)
        for length in range(len(body)):
            with pytest.raises(ProtocolError) as caught:
                _decode(case, body[:length])
            assert caught.value.may_have_billed


@_row("E1")
def test_e1_indented_answers_too(case: Case) -> None:
    body = (
        json.dumps(_three_objects(case), indent=2, ensure_ascii=False).encode() + b"\n"
    )
    expected = _decode_detections(case, _three_objects(case))
    for length in range(len(body) + 1):
        try:
            assert same_detections(_decode_detections(case, body[:length]), expected)
        except ProtocolError:
            assert len(body[:length].rstrip()) < len(body.rstrip())


@_row("E2")
def test_e2_missing_and_extra_keys(case: Case) -> None:
    response = _three_objects(case)
    expected = _decode_detections(case, response)
    for path in json_paths(response):
        node = node_at(response, path)
        if isinstance(node, dict):
            extended = replace_node(response, path, {**node, "new_field": [None]})
            assert same_detections(_decode_detections(case, extended), expected)
        if not path or not isinstance(path[-1], str) or path[-1] in case.optional:
            continue
        with contextlib.suppress(ProtocolError):
            raw = _decode_detections(case, remove_node(response, path))
            assert same_detections(raw, expected), path


WRONG_TYPES: list[Any] = [None, True, 7, "text", [], {}]


@_row("E2")
def test_e2_wrong_types(case: Case) -> None:
    """A value of another JSON type is a ``ProtocolError``, or changes nothing."""
    response = _three_objects(case)
    expected = _decode_detections(case, response)
    rejected = 0
    for path in json_paths(response):
        node = node_at(response, path)
        for replacement in WRONG_TYPES:
            both_numbers = (
                isinstance(node, (int, float))
                and isinstance(replacement, int)
                and not isinstance(replacement, bool)
            )
            if type(replacement) is type(node) or both_numbers:
                continue
            changed = replace_node(response, path, replacement)
            try:
                raw = _decode_detections(case, changed)
            except ProtocolError:
                rejected += 1
            else:
                assert same_detections(raw, expected), (path, replacement)
    assert rejected >= 30


@_row("E2")
def test_e2_broken_answers(case: Case) -> None:
    for name, response in case.broken.items():
        with pytest.raises(ProtocolError):
            print(name, _decode(case, response))


ODD_BOXES: list[tuple[tuple[float, float, float, float], bool]] = [
    ((10, 20, 110, 170), True),
    ((110, 20, 10, 170), False),
    ((10, 170, 110, 20), False),
    ((10, 20, 10, 170), False),
    ((10, 20, 10.4, 170), False),
    ((-50, -60, 110, 170), True),
    ((10, 20, 700, 500), True),
    ((700, 20, 800, 170), False),
    ((-1e9, -1e9, 1e9, 1e9), True),
]


@_row("E2")
def test_e2_odd_boxes(case: Case) -> None:
    """Boxes are clipped to the image, and dropped if less than a pixel remains. Corners
    in another order are accepted from services that return a polygon.
    """
    for box, is_kept in ODD_BOXES:
        try:
            response = case.answer([Truth(case.names["car"], box)], SIZE)
            raw = _decode_detections(case, response)
        except ProtocolError:
            assert box != (10, 20, 110, 170)
            continue
        assert (raw.boxes >= 0).all()
        assert (raw.boxes <= [*SIZE, *SIZE]).all()
        assert ((raw.boxes[:, 2:] - raw.boxes[:, :2]) >= 1).all()
        if box[0] <= box[2] and box[1] <= box[3]:
            assert len(raw) == is_kept, box
            errors = np.abs(np.clip(box, 0, [*SIZE, *SIZE]) - raw.boxes)
            tolerance = np.array(case.rounding(SIZE)) + 0.01
            assert (errors.reshape(-1, 2, 2) <= tolerance).all()


@_row("E3")
def test_e3_not_an_answer(case: Case) -> None:
    valid = json.dumps(_three_objects(case)).encode()
    bodies = [
        b"",
        b" ",
        b"\n",
        b"<html><body>OK</body></html>",
        b"OK",
        b"null",
        b"0",
        b'""',
        b"[]",
        b"{}",
        b"[null]",
    ]
    bodies += [
        valid + b"x",
        valid + valid,
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'[{"a":' * 50_000,
        b"\x1f\x8b" + valid,
        valid[:-1] + b"\0",
    ]
    bodies += [
        valid.replace(b"{", b'{"twice": 1, "twice": 2, ', 1),
        valid.replace(b"{", '{"é": 1, '.encode("latin-1"), 1),
    ]
    empty = json.dumps(case.answer([], SIZE)).encode()
    for body in bodies:
        if body == empty:
            continue
        with pytest.raises(ProtocolError):
            _decode(case, body)


@_row("E3")
def test_e3_other_encodings_and_types(case: Case) -> None:
    valid = json.dumps(_three_objects(case)).encode()
    for body in (
        b"\xef\xbb\xbf" + valid,
        valid.decode().encode("utf-16"),
        valid.decode().encode("utf-32"),
    ):
        with contextlib.suppress(ProtocolError):
            raw = _decode_detections(case, body)
            assert same_detections(raw, _decode_detections(case, valid))
    for content_type in (
        "text/html",
        "application/zip",
        "text/html; charset=application/json",
    ):
        headers = {"content-type": content_type}
        with pytest.raises(ProtocolError):
            case.adapter.decode(headers, valid, case.query(), FRAME)
    with_charset = {"content-type": f"{case.content_type}; charset=UTF-8"}
    decoded = case.adapter.decode(with_charset, valid, case.query(), FRAME)
    assert isinstance(decoded, RawDetections)


@_row("E4")
def test_e4_errors_inside_an_answer(case: Case) -> None:
    assert case.embedded
    for response, kind in case.embedded:
        with pytest.raises(CloudError) as caught:
            _decode(case, response)
        assert type(caught.value) is kind, response


@_row("E5")
def test_e5_proved_empty(case: Case) -> None:
    raw = _decode_detections(case, case.answer([], SIZE))
    assert raw.boxes.shape == (0, 4)
    assert raw.class_scores.shape == (0, len(CLASSES))
    assert raw.boxes.dtype == raw.class_scores.dtype == np.float32
    assert not raw.unmapped


LARGE: tuple[Box, ...] = (
    (0, 0, 403, 377),
    (501, 155, 867, 522),
    (1200, 600, 1601, 901),
    (1003, 101, 1399, 400),
)


@_row("F5")
def test_f5_boxes_of_a_smaller_image(case: Case, secrets: pytest.MonkeyPatch) -> None:
    for max_side in (1201, 640):
        image = _scene_image([0, 1, 2, 0], LARGE, (1601, 901), max_side)
        assert max(image.width, image.height) == max_side
        raw = _query_emulator(case, image)
        _check_detections(case, raw, [0, 1, 2, 0], LARGE, image, tolerance=0.5)


@cache
def _photograph() -> bytes:
    return scene([0, 1, 2, 0], LARGE, (1601, 901), "JPEG")


@_row("F5")
def test_f5_boxes_of_an_odd_sized_jpeg(case: Case, secrets: pytest.MonkeyPatch) -> None:
    """A JPEG that is decoded at half its size ends within the last pixel if a side is
    odd. It is downsized when it is read, or when it is sent.
    """
    photograph = _photograph()
    whole = canonical_image(photograph, 4096)
    assert whole.data == photograph
    for image in (
        canonical_image(photograph, 640),
        shrink_to_limits(whole, case.adapter.capabilities, 640),
    ):
        assert (image.width, image.height, image.original) == (640, 360, (1601, 901))
        raw = _query_emulator(case, image)
        _check_detections(case, raw, [0, 1, 2, 0], LARGE, image, tolerance=0.5)


@_row("F5")
def test_f5_an_image_file_that_is_too_large(
    case: Case, secrets: pytest.MonkeyPatch
) -> None:
    boxes = [(0, 0, 403, 377), (501, 155, 867, 522), (1200, 600, 1600, 896)]
    image = _scene_image([0, 1, 2], boxes, (1600, 896))
    capabilities = replace(
        case.adapter.capabilities, max_bytes=len(image.data) * 2 // 3
    )
    smaller = shrink_to_limits(image, capabilities, min(1500, capabilities.max_side))
    assert len(smaller.data) <= capabilities.max_bytes
    assert smaller.width < 1500
    raw = _query_emulator(case, smaller)
    _check_detections(case, raw, [0, 1, 2], boxes, smaller, tolerance=0.5)


@_row("F5")
def test_f5_each_axis_by_its_own_factor(case: Case) -> None:
    boxes = ((10.0, 20.0, 110.0, 170.0), (400.0, 200.0, 599.0, 399.0))
    car = case.names["car"]
    truths = [Truth(car, boxes[0], 0.9), Truth(car, boxes[1], 0.8)]
    response = case.answer(truths, SIZE)
    original = (4001, 2251)
    expected = np.array(boxes) * (np.array(original * 2) / (SIZE * 2))
    tolerance = (np.array(case.rounding(SIZE)) * original / SIZE + 0.01).tolist() * 2
    raw = _decode_detections(case, response, Frame(SIZE, original))
    assert (np.abs(raw.boxes - expected) <= tolerance).all()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@given(draws=st.data())
def test_mutated_answers_give_valid_detections_or_cloud_errors(
    case: Case, draws: st.DataObject
) -> None:
    responses = [_three_objects(case), *case.further]
    responses += [labels.response for labels in case.label_rows]
    response = draws.draw(st.sampled_from(responses))
    for _ in range(draws.draw(st.integers(1, 3))):
        paths = list(json_paths(response))
        path = draws.draw(st.sampled_from(paths))
        moved = node_at(response, draws.draw(st.sampled_from(paths)))
        response = replace_node(response, path, draws.draw(ANY_JSON | st.just(moved)))
    try:
        raw = _decode(case, response)
    except CloudError:
        return
    if isinstance(raw, Pending):
        return
    assert np.isfinite(raw.boxes).all()
    assert ((raw.boxes >= 0) & (raw.boxes <= [*SIZE, *SIZE])).all()
    assert ((raw.class_scores >= 0) & (raw.class_scores <= 1)).all()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@given(
    status=st.sampled_from([400, 401, 403, 404, 409, 422, 429, 500, 503]),
    error=ANY_JSON,
    draws=st.data(),
)
def test_any_error_body_is_classified(
    case: Case, status: int, error: Any, draws: st.DataObject
) -> None:
    bodies = [f.body for f in case.failures if not isinstance(f.body, bytes)]
    original = draws.draw(st.sampled_from(bodies)) if bodies else {}
    path = draws.draw(st.sampled_from(list(json_paths(original))))
    body = json.dumps(replace_node(original, path, error)).encode()
    assert isinstance(case.adapter.classify_error(status, {}, body), CloudError)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@given(body=st.binary(max_size=60))
def test_any_bytes_give_cloud_errors(case: Case, body: bytes) -> None:
    with pytest.raises(CloudError):
        _decode(case, b"\x01" + body)


def _iou(first: NDArray[np.float32], second_box: Sequence[float]) -> float:
    second = np.array(second_box, np.float64)
    upper_left = np.maximum(first[:2], second[:2])
    lower_right = np.minimum(first[2:], second[2:])
    overlap = np.clip(lower_right - upper_left, 0, None).prod()
    areas = (first[2:] - first[:2]).prod() + (second[2:] - second[:2]).prod()
    return float(overlap / (areas - overlap))


def _conformance_tests() -> list[tuple[Row, Callable[..., None]]]:
    """Return the tests of rows that pytest collects from this module, with their rows.

    The module's names are read, not what ``_row`` was applied to: a test that another
    one of the same name has replaced, or that pytest does not collect, is not there.
    """
    return [
        (getattr(test, ROW_ATTRIBUTE), test)
        for name, test in globals().items()
        if name.startswith("test_") and hasattr(test, ROW_ATTRIBUTE)
    ]


def _skip_reasons(test: Any) -> dict[str, str | None]:
    """Return the reason for which a test skips a case, None if it runs, by case name."""
    (parametrization,) = (
        mark for mark in test.pytestmark if mark.name == "parametrize"
    )
    assert {mark.name for mark in test.pytestmark} == {"parametrize"}
    reasons: dict[str, str | None] = {}
    for parameters in parametrization.args[1]:
        (case,) = parameters.values
        reasons[case.name] = None
        for mark in parameters.marks:
            assert mark.name == "skip"
            reasons[case.name] = mark.args[0]
    return reasons


def test_every_row_runs_for_every_adapter_or_says_why_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The parametrized tests are compared with the table, so that the outcome does not
    depend on which worker of pytest-xdist runs which test. Prints the counts.
    """
    rows = get_args(Row)
    tests = _conformance_tests()
    assert {name for name, _ in tests} == set(rows)
    for name, test in tests:
        expected = {case.name: case.skips.get(name) for case in CASES}
        assert _skip_reasons(test) == expected, test.__name__
    skipped = {
        (name, case.name): reason
        for case in CASES
        for name, reason in case.skips.items()
    }
    assert {name for name, _ in skipped} <= set(rows)
    assert all(len(reason) > 20 for reason in skipped.values())
    count = len(rows) * len(CASES)
    with capsys.disabled():
        print(
            f"\nadapters x rows: {count - len(skipped)} of {count} run,"
            f" {len(skipped)} skipped"
        )
        for (name, case_name), reason in sorted(skipped.items()):
            print(f"  {name} {case_name}: {reason}")


def test_adapters_have_no_state() -> None:
    for case in CASES:
        equal_adapter = replace(case.adapter)  # type: ignore[type-var]
        assert hash(case.adapter) == hash(equal_adapter), "compared by value"
        assert case.adapter.capabilities == case.adapter.capabilities
    assert len({case.name for case in CASES}) == len(CASES)
