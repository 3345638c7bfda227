"""Services that are asked in other ways than by a list of names: Moondream, T-Rex2 by
exemplars, and Roboflow's two places of the key."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image

from coin_ray.cloud.adapters.moondream import MoondreamAdapter
from coin_ray.cloud.adapters.t_rex import TRexAdapter
from coin_ray.cloud.exemplars import BOXES_MAX, read_exemplars
from coin_ray.cloud.http.connections import Connections, parse_service_url
from coin_ray.cloud.http.signing import signer_for
from coin_ray.cloud.protocol import Frame, Query
from coin_ray.cloud.services import adapter_for
from coin_ray.config import Cloud
from coin_ray.data.canonical import canonical_image
from coin_ray.errors import (
    AuthError,
    BadRequest,
    CloudError,
    ConfigError,
    ImageRejected,
    ProtocolError,
    QuotaExhausted,
    Throttled,
    Transient,
    UnusableBoxes,
)

from .cases import CLASSES, GOLDEN_BASE64, GOLDEN_IMAGE, SIZE
from .conftest import labelled_folder
from .emulator import PROVIDERS, Emulator, scene
from .emulator.app import TOKEN

CAR_QUERY = Query("default", ("car",), 0.05)
FRAME = Frame(SIZE, SIZE)


def _moondream_answer(*boxes: tuple[float, float, float, float]) -> bytes:
    objects = [
        dict(zip(("x_min", "y_min", "x_max", "y_max"), box, strict=True))
        for box in boxes
    ]
    return json.dumps({"request_id": "2026_detect_1", "objects": objects}).encode()


def test_moondream_is_asked_about_one_class() -> None:
    adapter = MoondreamAdapter()
    request = adapter.encode(GOLDEN_IMAGE, CAR_QUERY)
    assert (request.path, request.method) == ("/detect", "POST")
    assert json.loads(request.body) == {
        "image_url": f"data:image/jpeg;base64,{GOLDEN_BASE64}",
        "object": "car",
    }
    assert adapter.capabilities.url == "https://api.moondream.ai/v1"
    assert adapter.capabilities.auth is not None
    assert adapter.capabilities.auth.header == "X-Moondream-Auth"
    query = Query("moondream3.1-9B-A2B", ("car",), 0.05)
    model = json.loads(adapter.encode(GOLDEN_IMAGE, query).body)["model"]
    assert model == "moondream3.1-9B-A2B"
    with pytest.raises(BadRequest, match="one class a call, got 3"):
        adapter.encode(GOLDEN_IMAGE, Query("default", CLASSES, 0.05))


def test_boxes_of_moondream() -> None:
    body = _moondream_answer((0.2, 0.3, 0.6, 0.8), (0.0, 0.0, 1.0, 1.0))
    raw = MoondreamAdapter().decode({}, body, CAR_QUERY, FRAME)
    assert raw.score_kind == "none"
    assert np.allclose(raw.boxes, [[120, 120, 360, 320], [0, 0, 600, 400]])
    assert raw.class_scores.tolist() == [[1], [1]]
    empty = MoondreamAdapter().decode({}, _moondream_answer(), CAR_QUERY, FRAME)
    assert len(empty) == 0


def test_answers_of_moondream_that_are_not_whole() -> None:
    adapter = MoondreamAdapter()
    body = _moondream_answer((0.2, 0.3, 0.6, 0.8), (0.1, 0.1, 0.9, 0.9))
    for length in range(len(body)):
        with pytest.raises(ProtocolError):
            adapter.decode({}, body[:length], CAR_QUERY, FRAME)
    for broken in ({}, {"objects": None}, {"objects": [{"x_min": 0.5}]}):
        with pytest.raises(ProtocolError):
            adapter.decode({}, json.dumps(broken).encode(), CAR_QUERY, FRAME)
    with pytest.raises(UnusableBoxes, match="another unit"):
        adapter.decode({}, _moondream_answer((20, 30, 60, 80)), CAR_QUERY, FRAME)


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (401, {"error": "Invalid API key"}, AuthError),
        (402, {"error": {"message": "Insufficient credits"}}, QuotaExhausted),
        (400, {"error": "Invalid image_url"}, ImageRejected),
        (400, {"error": "object is required"}, BadRequest),
        (429, {}, Throttled),
        (502, {}, Transient),
    ],
)
def test_errors_of_moondream(status: int, body: Any, kind: type[CloudError]) -> None:
    error = MoondreamAdapter().classify_error(status, {}, json.dumps(body).encode())
    assert type(error) is kind


@pytest.mark.parametrize("service", ["roboflow", "roboflow-sam3"])
@pytest.mark.parametrize("place", ["header", "body"])
def test_both_places_of_roboflows_key(
    service: Any, place: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ROBOFLOW_API_KEY", TOKEN)
    adapter = adapter_for(Cloud(service=service, secret_in=place))
    seen: list[httpx.Request] = []

    def reply(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(200, json={"echo": request.content.decode()})

    signer = signer_for(adapter.capabilities.auth, "ROBOFLOW_API_KEY", "")
    url = parse_service_url("https://serverless.example.com", True)
    connections = Connections(url, signer, 5.0, httpx.MockTransport(reply))
    request = adapter.encode(GOLDEN_IMAGE, Query("default", CLASSES, 0.05))
    answer = asyncio.run(connections.send(request))
    sent = json.loads(seen[0].content)
    assert ("authorization" in seen[0].headers) == (place == "header")
    assert sent.pop("api_key", None) == (TOKEN if place == "body" else None)
    assert sent == json.loads(request.body)
    assert TOKEN.encode() not in answer.body
    assert TOKEN not in str(seen[0].url)


def test_an_older_server_reads_the_key_in_the_body(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ROBOFLOW_API_KEY", TOKEN)
    image = scene([0], [(10, 10, 60, 60)], (100, 80), "JPEG")
    emulator = Emulator(PROVIDERS)
    emulator.state("roboflow-sam3")["reads_key_in"] = "body"
    statuses = []
    for place in ("header", "body"):
        adapter = adapter_for(Cloud(service="roboflow-sam3", secret_in=place))
        signer = signer_for(adapter.capabilities.auth, "ROBOFLOW_API_KEY", "")
        url = parse_service_url(emulator.url("roboflow-sam3"), True)
        connections = Connections(url, signer, 5.0, emulator.transport())
        request = adapter.encode(
            canonical_image(image, 4096), Query("default", CLASSES, 0.05)
        )
        reply = asyncio.run(connections.send(request))
        statuses.append(reply.status)
        if reply.status == 401:
            error = adapter.classify_error(reply.status, reply.headers, reply.body)
            assert "--cloud.secret-in body" in str(error)
    assert statuses == [401, 200]


def test_the_key_goes_into_the_body_for_roboflow_only() -> None:
    with pytest.raises(ConfigError, match=r"cloud\.secret_in body is for roboflow"):
        Cloud(service="gemini", secret_in="body")


def test_exemplars_of_people(tmp_path: Path) -> None:
    labels = {f"a{i}": [("car", "0.5 0.5 0.2 0.5")] * 3 for i in range(12)}
    labels["z"] = [("bus", "0.25 0.5 0.1 0.5"), ("car", "0.75 0.5 0.1 0.25")]
    read_exemplars.cache_clear()
    exemplars = read_exemplars((labelled_folder(tmp_path, labels),))
    assert len(exemplars) <= 10
    names = [label for exemplar in exemplars for label, _ in exemplar.boxes]
    assert names.count("car") == BOXES_MAX
    assert names.count("bus") == 1
    boxes = {box for e in exemplars for label, box in e.boxes if label == "bus"}
    (box,) = boxes
    # the image is sent with 1333 pixels, half its size
    assert np.allclose(box, [266.6, 50, 399.9, 150], atol=0.6)
    cloud = Cloud(service="t-rex", exemplars=(str(tmp_path),))
    adapter = adapter_for(cloud)
    body = json.loads(
        adapter.encode(GOLDEN_IMAGE, Query("default", ("bus", "car"), 0.1)).body
    )
    visual = body["prompt"]["visual_images"]
    categories = {i["category_id"] for image in visual for i in image["interactions"]}
    assert categories == {1, 2}
    with pytest.raises(BadRequest, match="no box of the class dog"):
        adapter.encode(GOLDEN_IMAGE, Query("default", CLASSES, 0.1))


def test_other_exemplars_are_another_question(tmp_path: Path) -> None:
    keys = set()
    for name, box in (("a", "0.5 0.5 0.2 0.5"), ("b", "0.5 0.5 0.3 0.5")):
        folder = labelled_folder(tmp_path / name, {"one": [("car", box)]})
        adapter = TRexAdapter(read_exemplars((folder,)))
        keys.add(adapter.capabilities.key_settings)
    assert len(keys) == 2


def test_exemplars_of_deep_grey_are_refused(tmp_path: Path) -> None:
    """Each would be stretched by its own values, the run's images by one range."""
    folder = labelled_folder(tmp_path, {"one": [("car", "0.5 0.5 0.2 0.5")]})
    (path,) = tmp_path.rglob("one.*g")
    values = np.linspace(0, 60_000, 200 * 100).reshape(100, 200).astype(np.uint16)
    path.unlink()
    Image.fromarray(values).save(path.with_suffix(".png"))
    read_exemplars.cache_clear()
    with pytest.raises(ConfigError, match="expected images with 8 bits, but one"):
        read_exemplars((folder,))


def test_exemplars_that_can_not_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"give --cloud\.exemplars"):
        adapter_for(Cloud(service="t-rex"))
    with pytest.raises(ConfigError, match=r"cloud\.exemplars are for"):
        Cloud(service="dino-x", exemplars=("x",))
    with pytest.raises(ConfigError, match=r"cloud\.exemplars can't be used"):
        adapter_for(Cloud(service="t-rex", exemplars=(str(tmp_path / "none"),)))
