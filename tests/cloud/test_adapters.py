"""One table for all adapters: rows of tests x ``CASES``. A row that can't apply to a
service is skipped with a written reason."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import wraps
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
from coin_ray.cloud.services import fitted
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

from .cases import CASES, CLASSES, GOLDEN_IMAGE, SIZE, Case, Failure, Labels, Row, Truth
from .conftest import same_detections
from .emulator import PROVIDERS, Emulator, scene
from .emulator.app import AWS_KEY_ID, AWS_SECRET, TOKEN, score_of
from .json_mutations import ANY_JSON, json_paths, node_at, remove_node, replace_node

FRAME = Frame(SIZE, SIZE)
REGION = "us-east-1"
POLLS_MAX = 5
Box = tuple[int, int, int, int]
Test = TypeVar("Test", bound=Callable[..., None])

TABLE: dict[tuple[Row, str], str | None] = {}
"""(row, case) -> why it is skipped, None if it runs."""
RAN: set[tuple[Row, str]] = set()
TESTS: list[str] = []
"""Names of the tests of rows; a row may have several."""


def row(name: Row) -> Callable[[Test], Test]:
    """The test is run for every case that doesn't skip the row."""

    def decorate(test: Test) -> Test:
        @wraps(test)
        def recorded(case: Case, **others: Any) -> None:
            RAN.add((name, case.name))
            test(case, **others)

        TESTS.append(test.__name__)
        TABLE.update({(name, c.name): c.skips.get(name) for c in CASES})
        cases = [
            pytest.param(
                c,
                id=c.name,
                marks=[pytest.mark.skip(c.skips[name])] if name in c.skips else [],
            )
            for c in CASES
        ]
        return pytest.mark.parametrize("case", cases)(recorded)  # type: ignore[no-any-return]

    return decorate


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The emulator's secrets in the environment."""
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
    """The adapter in front of the emulator, which looks at the image that it really
    receives."""

    async def run() -> RawDetections:
        async with httpx.AsyncClient(
            transport=(emulator or Emulator(PROVIDERS)).transport()
        ) as http:
            return await _poll_until_answered(case, http, image, query or case.query())

    return asyncio.run(run())


async def _poll_until_answered(
    case: Case, http: httpx.AsyncClient, image: CanonicalImage, query: Query
) -> RawDetections:
    request = case.adapter.encode(image, query)
    frame = Frame((image.width, image.height), image.original)
    for _ in range(POLLS_MAX):
        reply = await _send(case, http, request)
        if reply.status_code != 200:
            raise case.adapter.classify_error(
                reply.status_code, reply.headers, reply.content
            )
        decoded = case.adapter.decode(
            {"content-type": reply.headers["content-type"]}, reply.content, query, frame
        )
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
    headers = {**request.headers, "Idempotency-Key": "key-0"} | (
        {"Content-Type": request.content_type} if request.body else {}
    )
    signer = signer_for(
        auth,
        "EMULATED_TOKEN" if isinstance(auth, Auth) and auth.sigv4 is None else None,
        REGION,
    )
    signed = (
        signer.sign(request.method, url, headers, request.body).headers
        if auth is not None
        else {}
    )
    return await http.request(
        request.method, url, content=request.body, headers={**headers, **signed}
    )


def _decode_detections(
    case: Case, response: Any, frame: Frame = FRAME, query: Query | None = None
) -> RawDetections:
    raw = _decode(case, response, frame, query)
    assert isinstance(raw, RawDetections)
    return raw


def _decode(
    case: Case, response: Any, frame: Frame = FRAME, query: Query | None = None
) -> RawDetections | Pending:
    body = response if isinstance(response, bytes) else json.dumps(response).encode()
    return case.adapter.decode(
        {"content-type": case.content_type}, body, query or case.query(), frame
    )


def _three_objects(case: Case) -> Any:
    """A valid answer: a car, a bus and a dog."""
    boxes = ((10, 20, 110, 170), (200, 30, 330, 90), (400, 200, 599, 399))
    return case.answer(
        [
            Truth(case.names[c], b, s)
            for c, b, s in zip(CLASSES, boxes, (0.9, 0.8, 0.7), strict=True)
        ],
        SIZE,
    )


def _check_detections(
    case: Case,
    raw: RawDetections,
    class_indices: Sequence[int],
    boxes: Sequence[Box],
    image: CanonicalImage,
    tolerances: float = 0.01,
) -> None:
    """Each object is found once, under its class; its edges are within ``slack``
    original pixels and the service's own rounding."""
    assert raw.boxes.dtype == raw.class_scores.dtype == np.float32
    assert len(raw) == len(boxes)
    assert not raw.unmapped
    truth = np.array(boxes, np.float64).reshape(-1, 4)
    tolerances = (
        np.array(case.rounding((image.width, image.height)))
        * image.original
        / (image.width, image.height)
        + tolerances
    )
    for box, index in zip(raw.boxes, raw.class_scores.argmax(1), strict=True):
        nearest = int(np.abs(truth - box).max(1).argmin())
        assert (np.abs(truth[nearest] - box).reshape(2, 2) <= tolerances).all()
        assert index == class_indices[nearest]
    assert (np.diff(raw.class_scores.max(1)) <= 0).all()
    if case.scored:
        assert np.allclose(
            raw.class_scores.max(1), [score_of(i) for i in range(len(boxes))], atol=1e-5
        )


def _scene_image(
    classes: Sequence[int],
    boxes: Sequence[Box],
    size: tuple[int, int],
    max_side: int = 4096,
) -> CanonicalImage:
    return canonical_image(scene(classes, boxes, size), max_side)


@row("A1")
def test_a1_no_objects(case: Case, secrets: pytest.MonkeyPatch) -> None:
    raw = _query_emulator(case, _scene_image([], [], (320, 240)))
    assert raw.boxes.shape == (0, 4)
    assert raw.class_scores.shape == (0, 3)


@row("A2")
def test_a2_one_object(case: Case, secrets: pytest.MonkeyPatch) -> None:
    image = _scene_image([1], [(40, 30, 271, 188)], (320, 240))
    raw = _query_emulator(case, image)
    _check_detections(case, raw, [1], [(40, 30, 271, 188)], image)
    if not any(case.rounding(SIZE)):
        assert _iou(raw.boxes[0], (40, 30, 271, 188)) >= 0.999


@row("A3")
def test_a3_300_objects(case: Case, secrets: pytest.MonkeyPatch) -> None:
    boxes = [
        (x * 40 + 8, y * 40 + 8, x * 40 + 32, y * 40 + 32 - x % 5)
        for y in range(15)
        for x in range(20)
    ]
    classes = [i % 3 for i in range(300)]
    image = _scene_image(classes, boxes, (808, 608))
    _check_detections(case, _query_emulator(case, image), classes, boxes, image)


@row("A4")
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


@row("A5")
def test_a5_class_lists(case: Case) -> None:
    for classes in (*CLASS_LISTS, *case.refused_classes):
        query = Query("default", classes, 0.05)
        try:
            case.adapter.encode(GOLDEN_IMAGE, query)
        except BadRequest:
            continue
        assert classes not in case.refused_classes
        boxes = [(float(3 * i), 10.0, 3.0 * i + 20, 60.0) for i in range(len(classes))]
        raw = _decode_detections(
            case,
            case.answer(
                [Truth(c, b) for c, b in zip(classes, boxes, strict=True)], SIZE
            ),
            query=query,
        )
        assert len(raw) == len(classes)
        for box, index in zip(
            raw.boxes, raw.class_scores.argmax(1) if classes else (), strict=True
        ):
            asked = classes[int(np.abs(np.array(boxes) - box).max(1).argmin())]
            assert normalize_class_name(classes[index]) == normalize_class_name(asked)


@row("A6")
def test_a6_names(case: Case) -> None:
    assert case.label_rows
    for labels in case.label_rows:
        _check_labels(case, labels)


def _check_labels(case: Case, labels: Labels) -> None:
    raw = _decode_detections(case, labels.answer)
    assert tuple(CLASSES[k] for k in raw.class_scores.argmax(1)) == labels.classes, (
        labels.what
    )
    assert raw.unmapped == labels.unmapped, labels.what
    if labels.scores is not None:
        assert np.allclose(raw.class_scores.max(1), labels.scores), labels.what


@row("A6")
def test_a6_weights_and_ignored_names(case: Case) -> None:
    found = [
        Truth(case.names["car"], (10, 20, 110, 170), 0.8),
        Truth(case.names["dog"], (10, 20, 110, 170), 0.6),
    ]
    labels = LabelMap(
        {normalize_class_name(case.names["car"]): (1, 0.5)},
        frozenset({normalize_class_name(case.names["dog"])}),
    )
    raw = _decode_detections(
        case, case.answer(found, SIZE), query=replace(case.query(), labels=labels)
    )
    assert raw.class_scores.argmax(1).tolist() == [1]
    assert not raw.unmapped
    if case.scored:
        assert np.allclose(raw.class_scores, [[0, 0.4, 0]])


@row("A7")
def test_a7_scores_become_distributions(case: Case) -> None:
    from coin_ray.cloud.probabilities import to_detections

    for classes in (CLASSES, CLASSES[:2], CLASSES[:1]):
        names = [case.names[c] for c in classes]
        query = Query("default", classes, 0.05, LabelMap.of_classes(names))
        scores = [round(0.95 - 0.06 * i, 2) for i in range(15)]
        found = [
            Truth(names[i % len(names)], (10.0 * i, 20, 10.0 * i + 60, 170), s)
            for i, s in enumerate(scores)
        ]
        raw = _decode_detections(case, case.answer(found, SIZE), query=query)
        _check_scores(case, raw, len(found))
        detections, sources = to_detections(raw, score_min=0.05)
        probs = detections.probs.numpy()
        assert np.allclose(probs.sum(1), 1, atol=1e-5)
        assert (probs[:, :-1].argmax(1) == detections.labels.numpy()).all()
        assert len(sources) == len(probs) == len(found)
        if case.scored:
            assert (np.diff(probs[:, :-1].max(1)) <= 1e-6).all()


def _check_scores(case: Case, raw: RawDetections, count: int) -> None:
    assert len(raw) == count
    assert raw.score_kind == case.score_kind
    assert not (
        raw.score_kind == "per_class" and not case.adapter.capabilities.per_class_scores
    )
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


@row("A8")
def test_a8_scores(case: Case) -> None:
    for given_score, expected in SCORES:
        raw = _decode_detections(
            case,
            case.answer(
                [Truth(case.names["bus"], (10, 20, 110, 170), given_score)], SIZE
            ),
        )
        assert np.allclose(raw.class_scores, [[0, expected, 0]], atol=1e-6), given_score
    for bad in BAD_SCORES:
        with pytest.raises(ProtocolError):
            _decode(
                case,
                case.answer([Truth(case.names["bus"], (10, 20, 110, 170), bad)], SIZE),
            )


@row("B1")
def test_b1_golden_request(case: Case) -> None:
    request = case.adapter.encode(GOLDEN_IMAGE, case.query())
    assert request == case.golden
    again = case.adapter.encode(GOLDEN_IMAGE, case.query())
    assert again == request
    assert case.golden.body[:20].decode("latin-1") not in repr(request)


def _check_failures(case: Case, failures: Sequence[Failure]) -> None:
    assert failures
    for failure in failures:
        body = (
            failure.body
            if isinstance(failure.body, bytes)
            else json.dumps(failure.body).encode()
        )
        error = _failure_error(
            case,
            failure.status,
            {"content-type": case.content_type, **failure.headers},
            body,
        )
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


@row("B4")
def test_b4_a_wrong_secret(case: Case, secrets: pytest.MonkeyPatch) -> None:
    if case.adapter.capabilities.auth is None:
        return
    emulator = Emulator(PROVIDERS)
    secrets.setenv("EMULATED_TOKEN", "another-token-9876543210")
    secrets.setenv("AWS_SECRET_ACCESS_KEY", "another/secret")
    with pytest.raises(AuthError):
        _query_emulator(case, _scene_image([0], [(40, 30, 271, 188)], (320, 240)), emulator)
    assert len(emulator.calls) == 1
    assert not emulator.billed[case.provider]


@row("B4")
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


@row("B4")
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
    ({"retry-after": "99999"}, 120),
    ({"retry-after": "abc"}, None),
]


@row("C1")
def test_c1_throttled(case: Case) -> None:
    for headers, seconds in HINTS:
        for body in JUNK:
            error = case.adapter.classify_error(429, headers, body)
            assert isinstance(error, Throttled)
            assert error.retry_after == seconds
    particular = [f for f in case.failures if f.row == "C1"]
    if particular:
        _check_failures(case, particular)


@row("C4")
def test_c4_quota_used_up(case: Case) -> None:
    _check_failures(case, [f for f in case.failures if f.row == "C4"])


@row("E1")
def test_e1_truncated_at_every_byte(case: Case) -> None:
    for answer in (_three_objects(case), case.answer([], SIZE), *case.further):
        whole = json.dumps(answer).encode()
        _decode(case, whole)
        for length in range(len(whole)):
            with pytest.raises(ProtocolError) as caught:
                _decode(case, whole[:length])
            assert caught.value.may_have_billed


@row("E1")
def test_e1_indented_answers_too(case: Case) -> None:
    whole = json.dumps(_three_objects(case), indent=2, ensure_ascii=False).encode() + b"\n"
    expected = _decode_detections(case, _three_objects(case))
    for length in range(len(whole) + 1):
        try:
            assert same_detections(_decode_detections(case, whole[:length]), expected)
        except ProtocolError:
            assert len(whole[:length].rstrip()) < len(whole.rstrip())


@row("E2")
def test_e2_missing_and_extra_keys(case: Case) -> None:
    answer = _three_objects(case)
    expected = _decode_detections(case, answer)
    for path in json_paths(answer):
        if isinstance(node_at(answer, path), dict):
            assert same_detections(
                _decode_detections(
                    case,
                    replace_node(answer, path, {**node_at(answer, path), "new_field": [None]}),
                ),
                expected,
            )
        if not path or not isinstance(path[-1], str) or path[-1] in case.optional:
            continue
        with contextlib.suppress(ProtocolError):
            assert same_detections(_decode_detections(case, remove_node(answer, path)), expected), path


WRONG_TYPES: list[Any] = [None, True, 7, "text", [], {}]


@row("E2")
def test_e2_wrong_types(case: Case) -> None:
    """A value of another JSON type is a ``ProtocolError``, or of no importance."""
    answer = _three_objects(case)
    expected = _decode_detections(case, answer)
    wrong = 0
    for path in json_paths(answer):
        old = node_at(answer, path)
        for new in WRONG_TYPES:
            number = (
                isinstance(old, (int, float))
                and isinstance(new, int)
                and not isinstance(new, bool)
            )
            if type(new) is type(old) or number:
                continue
            try:
                assert same_detections(_decode_detections(case, replace_node(answer, path, new)), expected), (
                    path,
                    new,
                )
            except ProtocolError:
                wrong += 1
    assert wrong >= 30


@row("E2")
def test_e2_broken_answers(case: Case) -> None:
    for what, answer in case.broken.items():
        with pytest.raises(ProtocolError):
            print(what, _decode(case, answer))


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


@row("E2")
def test_e2_odd_boxes(case: Case) -> None:
    """Clipped to the image; what is left of less than a pixel is dropped. A service
    that gives corners in any order is read either way."""
    for box, kept in ODD_BOXES:
        try:
            raw = _decode_detections(case, case.answer([Truth(case.names["car"], box)], SIZE))
        except ProtocolError:
            assert box != (10, 20, 110, 170)
            continue
        assert (raw.boxes >= 0).all()
        assert (raw.boxes <= [*SIZE, *SIZE]).all()
        assert ((raw.boxes[:, 2:] - raw.boxes[:, :2]) >= 1).all()
        if box[0] <= box[2] and box[1] <= box[3]:
            assert len(raw) == kept, box
            error = np.clip(box, 0, [*SIZE, *SIZE]) - raw.boxes
            assert (
                np.abs(error).reshape(-1, 2, 2) <= np.array(case.rounding(SIZE)) + 0.01
            ).all()


@row("E3")
def test_e3_not_an_answer(case: Case) -> None:
    whole = json.dumps(_three_objects(case)).encode()
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
        whole + b"x",
        whole + whole,
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'[{"a":' * 50_000,
        b"\x1f\x8b" + whole,
        whole[:-1] + b"\0",
    ]
    bodies += [
        whole.replace(b"{", b'{"twice": 1, "twice": 2, ', 1),
        whole.replace(b"{", '{"é": 1, '.encode("latin-1"), 1),
    ]
    for body in bodies:
        if body in (
            json.dumps(case.answer([], SIZE)).encode(),
            b"[]" if isinstance(case.answer([], SIZE), list) else None,
        ):
            continue
        with pytest.raises(ProtocolError):
            _decode(case, body)


@row("E3")
def test_e3_other_encodings_and_types(case: Case) -> None:
    whole = json.dumps(_three_objects(case)).encode()
    for body in (
        b"\xef\xbb\xbf" + whole,
        whole.decode().encode("utf-16"),
        whole.decode().encode("utf-32"),
    ):
        with contextlib.suppress(ProtocolError):
            assert same_detections(_decode_detections(case, body), _decode_detections(case, whole))
    for content_type in (
        "text/html",
        "application/zip",
        "text/html; charset=application/json",
    ):
        with pytest.raises(ProtocolError):
            case.adapter.decode(
                {"content-type": content_type}, whole, case.query(), FRAME
            )
    with_charset = {"content-type": f"{case.content_type}; charset=UTF-8"}
    assert isinstance(
        case.adapter.decode(with_charset, whole, case.query(), FRAME), RawDetections
    )


@row("E4")
def test_e4_errors_inside_an_answer(case: Case) -> None:
    assert case.embedded
    for answer, kind in case.embedded:
        with pytest.raises(CloudError) as caught:
            _decode(case, answer)
        assert type(caught.value) is kind, answer


@row("E5")
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


@row("F5")
def test_f5_boxes_of_a_smaller_image(case: Case, secrets: pytest.MonkeyPatch) -> None:
    for max_side in (1201, 640):
        image = _scene_image([0, 1, 2, 0], LARGE, (1601, 901), max_side)
        assert max(image.width, image.height) == max_side
        _check_detections(case, _query_emulator(case, image), [0, 1, 2, 0], LARGE, image, slack=0.5)


@row("F5")
def test_f5_boxes_of_an_odd_sized_jpeg(case: Case, secrets: pytest.MonkeyPatch) -> None:
    """A JPEG is decoded at half its size; an odd side then ends within the last pixel.
    Made smaller as it is read, or as it is sent."""
    photograph = scene([0, 1, 2, 0], LARGE, (1601, 901), "JPEG")
    whole = canonical_image(photograph, 4096)
    assert whole.data == photograph
    for image in (
        canonical_image(photograph, 640),
        fitted(whole, case.adapter.capabilities, 640),
    ):
        assert (image.width, image.height, image.original) == (640, 360, (1601, 901))
        _check_detections(case, _query_emulator(case, image), [0, 1, 2, 0], LARGE, image, slack=0.5)


@row("F5")
def test_f5_an_image_file_that_is_too_large(
    case: Case, secrets: pytest.MonkeyPatch
) -> None:
    boxes = [(0, 0, 403, 377), (501, 155, 867, 522), (1200, 600, 1600, 896)]
    image = _scene_image([0, 1, 2], boxes, (1600, 896))
    capabilities = replace(
        case.adapter.capabilities, max_bytes=len(image.data) * 2 // 3
    )
    smaller = fitted(image, capabilities, min(1500, capabilities.max_side))
    assert len(smaller.data) <= capabilities.max_bytes
    assert smaller.width < 1500
    _check_detections(case, _query_emulator(case, smaller), [0, 1, 2], boxes, smaller, slack=0.5)


@row("F5")
def test_f5_each_axis_by_its_own_factor(case: Case) -> None:
    boxes = ((10.0, 20.0, 110.0, 170.0), (400.0, 200.0, 599.0, 399.0))
    answer = case.answer(
        [
            Truth(case.names["car"], b, s)
            for b, s in zip(boxes, (0.9, 0.8), strict=True)
        ],
        SIZE,
    )
    original = (4001, 2251)
    expected = np.array(boxes) * (np.array(original * 2) / (SIZE * 2))
    tolerance = (np.array(case.rounding(SIZE)) * original / SIZE + 0.01).tolist() * 2
    assert (
        np.abs(_decode_detections(case, answer, Frame(SIZE, original)).boxes - expected)
        <= tolerance
    ).all()


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@given(draws=st.data())
def test_mutated_answers_give_valid_detections_or_cloud_errors(
    case: Case, data: st.DataObject
) -> None:
    answer = data.draw(
        st.sampled_from(
            [_three_objects(case), *case.further, *(labels.answer for labels in case.label_rows)]
        )
    )
    for _ in range(data.draw(st.integers(1, 3))):
        paths = list(json_paths(answer))
        path = data.draw(st.sampled_from(paths))
        other = node_at(answer, data.draw(st.sampled_from(paths)))
        answer = replace_node(answer, path, data.draw(ANY_JSON | st.just(other)))
    try:
        raw = _decode(case, answer)
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
    case: Case, status: int, error: Any, data: st.DataObject
) -> None:
    bodies = [f.body for f in case.failures if not isinstance(f.body, bytes)]
    body = data.draw(st.sampled_from(bodies)) if bodies else {}
    body = replace_node(body, data.draw(st.sampled_from(list(json_paths(body)))), error)
    assert isinstance(
        case.adapter.classify_error(status, {}, json.dumps(body).encode()), CloudError
    )


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
@given(body=st.binary(max_size=60))
def test_any_bytes_give_cloud_errors(case: Case, body: bytes) -> None:
    with pytest.raises(CloudError):
        _decode(case, b"\x01" + body)


def _iou(one: NDArray[np.float32], other: Sequence[float]) -> float:
    second = np.array(other, np.float64)
    overlap = np.clip(
        np.minimum(one[2:], second[2:]) - np.maximum(one[:2], second[:2]), 0, None
    ).prod()
    return float(
        overlap
        / ((one[2:] - one[:2]).prod() + (second[2:] - second[:2]).prod() - overlap)
    )


def test_the_table(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row meets every adapter, or says why not. Prints the counts."""
    assert {name for name, _ in TABLE} == set(get_args(Row))
    assert len(TABLE) == len(get_args(Row)) * len(CASES)
    skipped = {place: reason for place, reason in TABLE.items() if reason is not None}
    assert all(len(reason) > 20 for reason in skipped.values())
    collected = [
        item
        for item in request.session.items
        if getattr(item, "originalname", "") in TESTS and item.path == request.node.path
    ]
    if len(collected) == len(TESTS) * len(CASES):
        assert set(TABLE) - RAN == set(skipped)
    with capsys.disabled():
        print(
            f"\nadapters x rows: {len(RAN)} of {len(TABLE)} run, {len(skipped)} skipped"
        )
        for (name, case), reason in sorted(skipped.items()):
            print(f"  {name} {case}: {reason}")


def test_adapters_keep_nothing() -> None:
    for case in CASES:
        assert hash(case.adapter) == hash(replace(case.adapter))  # type: ignore[type-var]  # frozen, compared by value
        assert case.adapter.capabilities == case.adapter.capabilities
    assert len({c.name for c in CASES}) == len(CASES)
