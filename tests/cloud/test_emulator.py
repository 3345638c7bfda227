"""The emulator must notice what the real services would: wrong pixels, wrong
signatures, wrong limits."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Mapping
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from coin_ray.cloud.adapters.dds import DdsAdapter
from coin_ray.cloud.adapters.rekognition import RekognitionAdapter
from coin_ray.cloud.http.signing import AwsSigner
from coin_ray.cloud.protocol import Pending, PreparedRequest
from coin_ray.data.canonical import canonical_image
from coin_ray.errors import ImageRejected, ProtocolError, Transient

from .cases import CASES, GOLDEN_BASE64, GOLDEN_IMAGE
from .emulator import PROVIDERS, Emulator, Fault, scene
from .emulator.app import (
    AWS_KEY_ID,
    AWS_SECRET,
    AWS_SESSION,
    TOKEN,
    Call,
    Reply,
    SceneError,
    read_scene,
    score_of,
)
from .test_adapters import FRAME

REKOGNITION = next(c for c in CASES if c.name == "rekognition")
AZURE = next(c for c in CASES if c.name == "azure-vision")
DDS = next(c for c in CASES if c.name == "dino-x")
PICTURE = canonical_image(
    scene([0, 2], [(20, 30, 120, 90), (150, 40, 300, 200)], (320, 240)), 4096
)
BODY = json.dumps(
    {
        "Image": {"Bytes": base64.b64encode(PICTURE.data).decode()},
        "MinConfidence": 5,
        "Features": ["GENERAL_LABELS"],
    }
).encode()
TARGET = {
    "X-Amz-Target": "RekognitionService.DetectLabels",
    "Content-Type": "application/x-amz-json-1.1",
}


def _send_requests(
    emulator: Emulator, *requests: tuple[str, str, Mapping[str, str], bytes]
) -> list[httpx.Response]:
    """Send requests in order; each is method, address, headers and body."""

    async def run() -> list[httpx.Response]:
        responses = []
        async with httpx.AsyncClient(transport=emulator.transport()) as http:
            for method, url, headers, body in requests:
                response = await http.request(
                    method, url, headers=headers, content=body
                )
                responses.append(response)
        return responses

    return asyncio.run(run())


def _azure_request(
    emulator: Emulator,
    body: bytes = PICTURE.data,
    headers: Mapping[str, str] | None = None,
) -> tuple[str, str, Mapping[str, str], bytes]:
    all_headers = {
        "Ocp-Apim-Subscription-Key": TOKEN,
        "Content-Type": "application/octet-stream",
        **(headers or {}),
    }
    return "POST", emulator.url("azure-vision") + AZURE.golden.path, all_headers, body


@st.composite
def _random_scenes(
    draw: st.DrawFn, unit: int = 1
) -> tuple[tuple[int, int], list[int], list[tuple[int, int, int, int]]]:
    """Draw a grid of cells of 60 * ``unit`` pixels, with a rectangle in each."""
    columns, rows = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    starts, sides = st.integers(10 * unit, 20 * unit), st.integers(20 * unit, 30 * unit)
    boxes = []
    for y in range(rows):
        for x in range(columns):
            x0, y0 = 60 * unit * x + draw(starts), 60 * unit * y + draw(starts)
            boxes.append((x0, y0, x0 + draw(sides), y0 + draw(sides)))
    classes = draw(
        st.lists(st.integers(0, 15), min_size=len(boxes), max_size=len(boxes))
    )
    return (60 * unit * columns + 7, 60 * unit * rows + 3), classes, boxes


@given(_random_scenes())
def test_a_scene_is_read_back(given_scene: Any) -> None:
    size, classes, boxes = given_scene
    image = canonical_image(scene(classes, boxes, size), 4096)
    objects = sorted(read_scene(image.data).objects, key=lambda o: o.object_id)
    assert [o.class_index for o in objects] == classes
    assert np.abs(np.array([o.box for o in objects]) - boxes).max() <= 0.1


@given(_random_scenes(unit=2), st.floats(0.55, 0.95))
def test_a_smaller_scene_is_read_to_parts_of_a_pixel(
    given_scene: Any, scale: float
) -> None:
    size, classes, boxes = given_scene
    image = canonical_image(scene(classes, boxes, size), round(max(size) * scale))
    objects = sorted(read_scene(image.data).objects, key=lambda o: o.object_id)
    assert [o.class_index for o in objects] == classes
    factors = np.array([image.width, image.height] * 2) / np.array(size * 2)
    errors = np.array([o.box for o in objects]) - np.array(boxes) * factors
    assert np.abs(errors).max() <= 0.25


def test_turned_and_mirrored_images_give_other_answers() -> None:
    with Image.open(io.BytesIO(PICTURE.data)) as image:
        for turn in (Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_90):
            sink = io.BytesIO()
            image.transpose(turn).save(sink, "PNG")
            turned_object = read_scene(sink.getvalue()).objects[0]
            assert turned_object.box != read_scene(PICTURE.data).objects[0].box


def test_what_is_no_scene() -> None:
    with Image.open(io.BytesIO(PICTURE.data)) as image:
        exif = Image.Exif()
        exif[0x0112] = 6
        sink = io.BytesIO()
        image.save(sink, "JPEG", exif=exif)
    for image_file in (
        b"",
        b"text",
        PICTURE.data[: len(PICTURE.data) // 2],
        sink.getvalue(),
    ):
        with pytest.raises(SceneError):
            read_scene(image_file)


@pytest.mark.parametrize(
    "boxes",
    [
        [(0, 0, 19, 50)],
        [(10, 10, 50, 50), (54, 10, 90, 50)],
        [(50, 50, 101, 90)],
        [(-1, 0, 30, 30)],
        [(0, 0, 50, 50)] * 2,
    ],
)
def test_scenes_that_could_not_be_read(boxes: list[tuple[int, int, int, int]]) -> None:
    with pytest.raises(ValueError, match="box"):
        scene([0] * len(boxes), boxes, (100, 100))


def test_a_script() -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    emulator = Emulator(PROVIDERS, sleep=sleep)
    emulator.script(
        [
            Fault(429, {"retry-after": "2"}, {"error": 1}),
            None,
            Fault(edit=lambda b: b[:-5]),
            Fault(delay=9, headers={"x-a": "b"}),
        ]
    )
    replies = _send_requests(emulator, *[_azure_request(emulator)] * 5)
    assert [r.status_code for r in replies] == [429, 200, 200, 200, 200]
    assert (replies[0].headers["retry-after"], replies[0].json()) == ("2", {"error": 1})
    assert replies[2].content == replies[1].content[:-5]
    assert replies[3].headers["x-a"] == "b"
    assert replies[4].content == replies[3].content == replies[1].content
    assert slept == [9]
    assert emulator.billed == {"azure-vision": 4}
    assert len(emulator.calls) == 5
    assert emulator.calls[0].body == PICTURE.data
    assert TOKEN not in repr(emulator.calls[0].body)


def test_nothing_on_the_wire_makes_a_fault() -> None:
    emulator = Emulator(PROVIDERS)
    (reply,) = _send_requests(
        emulator, _azure_request(emulator, headers={"X-Fault": "500"})
    )
    assert reply.status_code == 200


def test_unknown_provider() -> None:
    emulator = Emulator(PROVIDERS)
    (reply,) = _send_requests(
        emulator, ("POST", emulator.url("nobody") + "/x", {}, b"")
    )
    assert reply.status_code == 404
    assert not emulator.calls


def test_a_provider_is_one_function() -> None:
    def count_calls(call: Call) -> Reply:
        count = call.state.get("count", 0) + 1
        call.state["count"] = count
        payload = {"path": call.path, "query": call.params, "count": count}
        return Reply(200, payload)

    emulator = Emulator({"new": count_calls})
    request = ("GET", emulator.url("new") + "/a/b?c=d%20e", {}, b"")
    replies = _send_requests(emulator, request, request)
    assert replies[1].json() == {"path": "/a/b", "query": {"c": "d e"}, "count": 2}
    assert emulator.state("new") == {"count": 2}
    assert emulator.billed == {"new": 2}


LIMITS = [
    ({"Content-Type": "image/jpeg"}, None, 415),
    ({"Ocp-Apim-Subscription-Key": "other"}, None, 401),
    ({}, b"no image", 400),
    ({}, bytes(20_971_521), 400),
    ({}, canonical_image(scene([], [], (300, 49)), 4096).data, 400),
]


@pytest.mark.parametrize(("headers", "body", "status"), LIMITS)
def test_limits_of_azure(
    headers: Mapping[str, str], body: bytes | None, status: int
) -> None:
    emulator = Emulator(PROVIDERS)
    (reply,) = _send_requests(
        emulator, _azure_request(emulator, body or PICTURE.data, headers)
    )
    assert reply.status_code == status
    assert not emulator.billed["azure-vision"]
    error = AZURE.adapter.classify_error(status, reply.headers, reply.content)
    assert isinstance(error, ImageRejected) == (status != 401)


def _signed_aws_request(
    monkeypatch: pytest.MonkeyPatch,
    session: str = "",
    clock: float = 0.0,
    url: str = "",
) -> tuple[str, dict[str, str]]:
    """Return address and headers of a request signed with a clock that is ``clock`` seconds
    ahead.
    """
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", AWS_KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", AWS_SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", session)
    address = url or Emulator(PROVIDERS).url("rekognition") + "/"
    signer = AwsSigner("rekognition", "us-east-1", lambda: time.time() + clock)
    return address, {**TARGET, **signer.sign("POST", address, TARGET, BODY).headers}


@pytest.mark.parametrize("session", ["", AWS_SESSION])
def test_an_aws_signature_is_computed_anew(
    monkeypatch: pytest.MonkeyPatch, session: str
) -> None:
    pytest.importorskip("botocore")
    emulator = Emulator(PROVIDERS)
    url, headers = _signed_aws_request(monkeypatch, session)
    with_query, signed_query = _signed_aws_request(
        monkeypatch, session, url=f"{url}a%20b?z=1&a=x%2Fy"
    )
    replies = _send_requests(
        emulator, ("POST", url, headers, BODY), ("POST", with_query, signed_query, BODY)
    )
    assert replies[0].status_code == 200
    assert [label["Name"] for label in replies[0].json()["Labels"]][:2] == [
        "Car",
        "Vehicle",
    ]
    assert replies[1].json()["__type"] == "UnknownOperationException"


TAMPERED: list[tuple[dict[str, str], bytes]] = [
    ({}, BODY + b" "),
    ({"X-Amz-Target": "RekognitionService.DetectFaces"}, BODY),
    ({"X-Amz-Security-Token": "other"}, BODY),
    ({"X-Amz-Security-Token": AWS_SESSION}, BODY),
    ({"X-Amz-Date": "20200101T000000Z"}, BODY),
    ({"X-Amz-Extra": "1"}, BODY),
    ({"Authorization": "Bearer x"}, BODY),
    (
        {
            "Authorization": (
                "AWS4-HMAC-SHA256 Credential=x, SignedHeaders=host, Signature=0"
            )
        },
        BODY,
    ),
    ({"Authorization": ""}, BODY),
]


@pytest.mark.parametrize(("changes", "body"), TAMPERED)
def test_a_tampered_aws_request_is_refused(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, str], body: bytes
) -> None:
    pytest.importorskip("botocore")
    emulator = Emulator(PROVIDERS)
    url, headers = _signed_aws_request(monkeypatch)
    (reply,) = _send_requests(emulator, ("POST", url, {**headers, **changes}, body))
    assert reply.status_code == 400
    assert reply.json()["__type"] in (
        "InvalidSignatureException",
        "UnrecognizedClientException",
    )
    assert not emulator.billed["rekognition"]


def test_a_wrong_clock_is_refused_with_the_right_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("botocore")
    emulator = Emulator(PROVIDERS)
    url, headers = _signed_aws_request(monkeypatch, clock=3600)
    (reply,) = _send_requests(emulator, ("POST", url, headers, BODY))
    assert reply.status_code == 400
    assert "Signature not yet current" in reply.text
    assert reply.headers["date"].endswith("GMT")


def test_botocore_writes_the_same_request() -> None:
    """The vendor's own serializer as an oracle for the golden request."""
    session = pytest.importorskip("botocore.session").Session()
    model = session.get_service_model("rekognition")
    serializer = pytest.importorskip("botocore.serialize").create_serializer(
        model.metadata["protocol"]
    )
    parameters = {
        "Image": {"Bytes": GOLDEN_IMAGE.data},
        "MaxLabels": 1000,
        "MinConfidence": 5.0,
        "Features": ["GENERAL_LABELS"],
    }
    written = serializer.serialize_to_request(
        parameters, model.operation_model("DetectLabels")
    )
    golden = REKOGNITION.golden
    assert (written["method"], written["url_path"]) == (golden.method, golden.path)
    assert written["headers"] == {**golden.headers, "Content-Type": golden.content_type}
    assert json.loads(written["body"]) == json.loads(golden.body)
    assert GOLDEN_BASE64.encode() in golden.body


def test_botocore_reads_the_emulators_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("botocore")
    from botocore.parsers import create_parser
    from botocore.session import Session

    emulator = Emulator(PROVIDERS)
    url, headers = _signed_aws_request(monkeypatch)
    (reply,) = _send_requests(emulator, ("POST", url, headers, BODY))
    shape = (
        Session()
        .get_service_model("rekognition")
        .operation_model("DetectLabels")
        .output_shape
    )
    parsed = create_parser("json").parse(
        {"status_code": 200, "headers": dict(reply.headers), "body": reply.content},
        shape,
    )
    (car,) = (label for label in parsed["Labels"] if label["Name"] == "Car")
    assert car["Instances"][0]["Confidence"] == pytest.approx(100 * score_of(0))
    assert [p["Name"] for p in car["Parents"]] == ["Vehicle", "Transportation"]


def _dds_request(
    emulator: Emulator, request: PreparedRequest, key: str = "key-1"
) -> tuple[str, str, Mapping[str, str], bytes]:
    headers = {
        "Token": TOKEN,
        "Idempotency-Key": key,
        "Content-Type": "application/json",
    }
    return request.method, emulator.url("dds") + request.path, headers, request.body


def test_a_task_and_its_states() -> None:
    emulator = Emulator(PROVIDERS)
    query = DDS.query()
    adapter = DdsAdapter("dino-x")
    encoded = adapter.encode(PICTURE, query)
    keys = ("key-1", "key-1", "key-2")
    requests = [_dds_request(emulator, encoded, key) for key in keys]
    submitted, resubmitted, other = _send_requests(emulator, *requests)
    assert submitted.json() == resubmitted.json() != other.json()
    assert emulator.billed["dds"] == 2
    pending = adapter.decode(submitted.headers, submitted.content, query, FRAME)
    assert isinstance(pending, Pending)
    assert pending.request == PreparedRequest(
        f"/v2/task_status/{submitted.json()['data']['task_uuid']}", method="GET"
    )
    assert pending.seconds == 1
    polls = _send_requests(emulator, *[_dds_request(emulator, pending.request)] * 4)
    assert [p.json()["data"]["status"] for p in polls] == [
        "waiting",
        "running",
        "success",
        "success",
    ]
    first, second, third = (
        adapter.decode(poll.headers, poll.content, query, FRAME) for poll in polls[:3]
    )
    assert first == second == Pending(None, 1)
    assert not isinstance(third, Pending)
    assert emulator.billed["dds"] == 2


def test_a_task_in_a_poll_is_asked_again_by_its_name() -> None:
    task = {"code": 0, "data": {"task_uuid": "abc-1", "status": "running"}}
    pending = DdsAdapter("dino-x").decode(
        {}, json.dumps(task).encode(), DDS.query(), FRAME
    )
    assert pending == Pending(PreparedRequest("/v2/task_status/abc-1", method="GET"), 1)


def test_a_task_that_fails() -> None:
    emulator = Emulator(PROVIDERS)
    headers = {"Token": TOKEN, "Content-Type": "application/json"}
    url = emulator.url("dds")
    (submitted,) = _send_requests(
        emulator, ("POST", url + DDS.golden.path, headers, DDS.golden.body)
    )
    status = f"{url}/v2/task_status/{submitted.json()['data']['task_uuid']}"
    last = _send_requests(emulator, *[("GET", status, headers, b"")] * 3)[-1]
    with pytest.raises(ImageRejected) as caught:
        DDS.adapter.decode(last.headers, last.content, DDS.query(), FRAME)
    assert caught.value.may_have_billed


FAILED = [
    ("failed to decode image", ImageRejected),
    ("GPU worker died", Transient),
    (None, Transient),
    (7, Transient),
]


@pytest.mark.parametrize(("text", "kind"), FAILED)
def test_why_a_task_failed(text: Any, kind: type[Exception]) -> None:
    body = json.dumps({"code": 0, "data": {"status": "failed", "error": text}}).encode()
    with pytest.raises(kind):
        DDS.adapter.decode({}, body, DDS.query(), FRAME)


@pytest.mark.parametrize(
    "task", ["../../secret", "a/b", "a?b=c", "a b", "", "é", "x" * 65, None, 7, "a\n"]
)
def test_a_task_name_leads_nowhere_else(task: Any) -> None:
    body = json.dumps({"code": 0, "data": {"task_uuid": task}}).encode()
    with pytest.raises(ProtocolError):
        DDS.adapter.decode({}, body, DDS.query(), FRAME)


def test_models() -> None:
    request = DdsAdapter("grounding-dino").encode(GOLDEN_IMAGE, DDS.query())
    assert json.loads(request.body)["model"] == "GroundingDino-1.6-Pro"
    rekognition_url = RekognitionAdapter().capabilities.url
    assert rekognition_url == "https://rekognition.{region}.amazonaws.com"
