"""Properties that all services with free class names share, and those that the table of
``test_adapters.py`` does not cover."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coin_ray.cloud.adapters.gemini import GeminiAdapter
from coin_ray.cloud.adapters.hf_endpoint import HfEndpointAdapter
from coin_ray.cloud.adapters.openai_vlm import BOX_NOTATIONS, OpenAiVlmAdapter
from coin_ray.cloud.adapters.prompts import (
    XYXY_1000,
    XYXY_PIXELS,
    YXYX_1000,
    BoxNotation,
)
from coin_ray.cloud.adapters.roboflow import RoboflowAdapter
from coin_ray.cloud.protocol import Adapter, Frame, Query
from coin_ray.errors import (
    BadRequest,
    CloudError,
    ImageRejected,
    ProtocolError,
    Refused,
)

from .cases import CASES, CLASSES, GOLDEN_IMAGE, REFUSALS
from .json_mutations import ANY_JSON, json_paths, node_at, replace_node
from .test_adapters import FRAME

NOTATIONS = [XYXY_1000, YXYX_1000, XYXY_PIXELS]
QUERY = Query("default", CLASSES, 0.05)
ORIGINAL = Frame((600, 400), (1200, 1200))


@pytest.mark.parametrize(
    ("notation", "box", "expected"),
    [
        (XYXY_1000, [100, 250, 500, 750], [120, 300, 600, 900]),
        (YXYX_1000, [250, 100, 750, 500], [120, 300, 600, 900]),
        (XYXY_PIXELS, [60, 100, 300, 300], [120, 300, 600, 900]),
        (XYXY_1000, [-30, 0, 1040, 1012.5], [0, 0, 1200, 1200]),
        (XYXY_PIXELS, [-30, 0, 640, 401.5], [0, 0, 1200, 1200]),
    ],
)
def test_boxes_in_a_text(
    notation: BoxNotation, box: list[float], expected: list[float]
) -> None:
    raw = notation.parse_detections(
        json.dumps([{notation.key: box, "label": "dog"}]), QUERY, ORIGINAL
    )
    assert np.allclose(raw.boxes, [expected])
    assert raw.class_scores.tolist() == [[0, 0, 1]]
    assert raw.score_kind == "none"


@pytest.mark.parametrize(
    "box",
    [[0, 0, 721, 100], [0, 0, 100, 481], [-121, 0, 100, 100], [0, -81, 100, 100]],
)
def test_pixels_far_outside_are_in_another_unit(box: list[int]) -> None:
    with pytest.raises(
        ProtocolError, match="are these coordinates pixels of the image"
    ):
        XYXY_PIXELS.parse_detections(
            json.dumps([{"bbox_2d": box, "label": "dog"}]), QUERY, FRAME
        )


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text: str) -> None:
    with pytest.raises(Refused) as caught:
        XYXY_1000.parse_detections(text, QUERY, FRAME)
    assert caught.value.may_have_billed


@pytest.mark.parametrize("notation", NOTATIONS, ids=lambda b: b.key + b.box_format)
@given(draws=st.data())
def test_mutated_lists_give_valid_boxes_or_errors(
    notation: BoxNotation, draws: st.DataObject
) -> None:
    response: Any = [
        {notation.key: [1, 2, 300, 350], "label": "car"},
        {notation.key: [9, 20, 400, 200], "label": "truck"},
    ]
    for _ in range(draws.draw(st.integers(1, 3))):
        path = draws.draw(st.sampled_from(list(json_paths(response))))
        response = replace_node(
            response, path, draws.draw(ANY_JSON | st.just(node_at(response, path)))
        )
    try:
        raw = notation.parse_detections(json.dumps(response), QUERY, ORIGINAL)
    except CloudError:
        return
    assert isinstance(response, list)
    assert len(raw) + len(raw.unmapped) <= len(response)
    assert ((raw.boxes >= 0) & (raw.boxes <= 1200)).all()
    assert set(raw.class_scores.ravel()) <= {0.0, 1.0}


@given(
    text=st.text(max_size=30) | st.text(alphabet=' \n[]`{}json\\"\ufeff\0', max_size=12)
)
def test_any_text_is_no_boxes_only_if_it_says_so(text: str) -> None:
    try:
        raw = XYXY_1000.parse_detections(text, QUERY, FRAME)
    except (ProtocolError, Refused):
        return
    bare = text.replace("```", "").replace("json", "").replace("JSON", "")
    assert "".join(bare.split()) == "[]"
    assert len(raw) == 0


OPEN_VOCABULARY: list[Adapter] = [
    HfEndpointAdapter(),
    RoboflowAdapter(),
    GeminiAdapter(),
    *(OpenAiVlmAdapter(c) for c in BOX_NOTATIONS),
]


@pytest.mark.parametrize("adapter", OPEN_VOCABULARY, ids=lambda a: a.capabilities.name)
def test_names_are_sent_as_they_are(adapter: Adapter) -> None:
    names = ("feu rouge", "犬", 'say "dog"', "back\\slash", "{}", "car, red")
    body = adapter.encode(GOLDEN_IMAGE, Query("default", names, 0.05)).body.decode()
    for name in names:
        quoted = json.dumps(name, ensure_ascii=False)
        assert json.dumps(quoted)[1:-1] in body or json.dumps(name) in body


def _hf_body(*rows: tuple[str, float, tuple[int, int, int, int]]) -> bytes:
    sides = ("xmin", "ymin", "xmax", "ymax")
    detections = []
    for label, score, box in rows:
        sides_of_box = dict(zip(sides, box, strict=True))
        detections.append({"label": label, "score": score, "box": sides_of_box})
    return json.dumps(detections).encode()


def test_a_box_under_several_labels_has_a_score_for_each() -> None:
    from tests.cloud.tensors import to_detections

    first_box, second_box = (10, 20, 110, 170), (300, 20, 400, 170)
    body = _hf_body(
        ("car", 0.8, first_box),
        ("dog", 0.9, second_box),
        ("bus", 0.2, first_box),
        ("truck", 0.3, second_box),
        ("bus", 0.1, first_box),
    )
    raw = HfEndpointAdapter().decode({}, body, QUERY, FRAME)
    assert np.allclose(raw.boxes, [second_box, first_box])
    assert np.allclose(raw.class_scores, [[0, 0, 0.9], [0.8, 0.2, 0]])
    assert raw.unmapped == ("truck",)
    assert HfEndpointAdapter().capabilities.per_class_scores
    detections, sources = to_detections(raw, score_min=0.05, each_class_asked=True)
    assert sources == ["grouped", "grouped"]
    assert np.allclose(
        detections.probs[1, :3].sum(), 1 - 0.2 * 0.8 * (1 - 0.05 / 4), atol=1e-6
    )


@pytest.mark.parametrize(
    "adapter",
    [a for a in OPEN_VOCABULARY if not isinstance(a, HfEndpointAdapter)],
    ids=lambda a: a.capabilities.name,
)
def test_another_model(adapter: Adapter) -> None:
    request = adapter.encode(GOLDEN_IMAGE, Query("v2-x", CLASSES, 0.05))
    body = json.loads(request.body)
    models = (body.get("model"), body.get("yolo_world_version_id"))
    assert "v2-x" in models or "v2-x" in request.path


def test_an_endpoint_has_one_model() -> None:
    with pytest.raises(BadRequest, match=r"cloud\.model"):
        HfEndpointAdapter().encode(GOLDEN_IMAGE, Query("owlv2", CLASSES, 0.05))


FAMILIES = [
    (
        "gemini-2.5-flash-lite",
        {"temperature": 0, "thinkingConfig": {"thinkingBudget": 0}},
    ),
    ("gemini-2.5-pro", {"temperature": 0}),
    ("gemini-2.0-flash", {"temperature": 0}),
    ("gemini-3.8-flash", {"thinkingConfig": {"thinkingLevel": "low"}}),
    ("gemma-9", {}),
]


@pytest.mark.parametrize(("model", "expected"), FAMILIES)
def test_generations_of_gemini(model: str, expected: dict[str, Any]) -> None:
    request = GeminiAdapter().encode(GOLDEN_IMAGE, Query(model, CLASSES, 0.05))
    sent = json.loads(request.body)["generationConfig"]
    assert {k: v for k, v in sent.items() if not k.startswith("response")} == expected
    assert request.path == f"/v1beta/models/{model}:generateContent"


def test_a_models_name_leads_nowhere_else() -> None:
    adapter = GeminiAdapter()
    upwards = adapter.encode(GOLDEN_IMAGE, Query("../../v1/x?y#z", CLASSES, 0.05))
    assert "/../" not in upwards.path
    with_query = adapter.encode(GOLDEN_IMAGE, Query("x?y", CLASSES, 0.05))
    assert "?" not in with_query.path


def test_coordinates_are_part_of_the_question() -> None:
    """Otherwise a response on record would be parsed in another unit."""
    adapters = [OpenAiVlmAdapter(coordinates) for coordinates in BOX_NOTATIONS]
    assert len({adapter.capabilities.name for adapter in adapters}) == 5
    bodies = {adapter.encode(GOLDEN_IMAGE, QUERY).body for adapter in adapters}
    assert len(bodies) == 5


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_errors_quote_no_image(case: Any) -> None:
    """Some servers repeat the request's image in their errors."""
    encoded_image = "/9j/4AAQSkZJRg" * 50
    text = f"bad image: data:image/jpeg;base64,{encoded_image}"
    bodies: list[Any] = [
        {"error": text},
        {"error": {"message": text}},
        {"message": text},
        {"title": text},
        {"msg": text},
    ]
    for status in (400, 413, 422, 500):
        for body in bodies:
            encoded_body = json.dumps(body).encode()
            error = case.adapter.classify_error(status, {}, encoded_body)
            assert "4AAQ" not in str(error)


def test_what_to_do_about_an_answer_that_was_cut_off() -> None:
    body = {"choices": [{"message": {"content": "[]"}, "finish_reason": "length"}]}
    with pytest.raises(ProtocolError, match="limit of tokens"):
        OpenAiVlmAdapter("xyxy_1000").decode(
            {}, json.dumps(body).encode(), QUERY, FRAME
        )
    missing = OpenAiVlmAdapter("xyxy_1000").classify_error(404, {}, b"")
    assert "https://host/v1" in str(missing)


def test_lack_of_memory_may_have_been_paid() -> None:
    error = HfEndpointAdapter().classify_error(
        400, {}, b'{"error": "CUDA out of memory"}'
    )
    assert error.may_have_billed
    assert not isinstance(error, ImageRejected)
