"""Requests to language models by family and setting, and scores from their tokens."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import httpx
import numpy as np
import pytest

from coin_ray.cloud.adapters.anthropic import AnthropicAdapter
from coin_ray.cloud.adapters.gemini import GeminiAdapter
from coin_ray.cloud.adapters.model_families import find_family
from coin_ray.cloud.adapters.model_options import ModelOptions
from coin_ray.cloud.adapters.openai_vlm import OpenAiVlmAdapter
from coin_ray.cloud.adapters.token_scores import TokenChoice, score_label_tokens
from coin_ray.cloud.answer_fusion import fuse_answers, score_labels
from coin_ray.cloud.protocol import (
    Adapter,
    FieldRefused,
    Frame,
    Query,
    RawDetections,
)
from coin_ray.cloud.services import adapter_for, shrink_to_limits
from coin_ray.config import Cloud
from coin_ray.config.presets import folder
from coin_ray.errors import BadRequest, ConfigError, ProtocolError, UnusableBoxes

from .cases import CLASSES, GOLDEN_IMAGE, SIZE
from .conftest import HarnessBuilder, solid_image
from .emulator.app import TOKEN
from .emulator.gemini import generated
from .emulator.openai_vlm import completion

QUERY = Query("default", CLASSES, 0.05)
FRAME = Frame(SIZE, SIZE)
LOGPROBS = ModelOptions(label_scores="logprobs")

MODELS = [
    ("Qwen/Qwen2.5-VL-7B-Instruct", "xyxy_pixels"),
    ("qwen/qwen3-vl-235b-a22b-instruct", "xyxy_1000"),
    ("qwen3.8-27b", "xyxy_1000"),
    ("Qwen2-VL-2B", "xyxy_1000"),
    ("google/gemini-3.8-flash", "yyxx"),
    ("gpt-5", "xyxy_ratio"),
    ("gpt-5-mini", "xyxy_ratio"),
    ("gpt-5-2025-08-07", "xyxy_ratio"),
    ("openai/gpt-5.1", "xyxy_ratio"),
    ("gpt-5.2", "xyxy_pixels"),
    ("gpt-5.10", "xyxy_pixels"),
    ("gpt-6-astra", "xyxy_pixels"),
    ("anthropic/claude-opus-5-5", "xyxy_pixels"),
    ("x-ai/grok-4.6", "xyxy_percent"),
    ("zai-org/GLM-4.6V", "xyxy_1000"),
    ("gpt-4o", None),
    ("default", None),
    ("my-model", None),
]


@pytest.mark.parametrize(("model", "coordinates"), MODELS)
def test_coordinates_by_the_models_name(model: str, coordinates: str | None) -> None:
    expected = "yxyx_1000" if coordinates == "yyxx" else coordinates
    assert find_family(model).coordinates == expected
    cloud = Cloud(service="openai-vlm", url="https://x/v1", model=model)
    if expected is None:
        with pytest.raises(ConfigError, match=r"cloud\.coordinates xyxy_1000"):
            adapter_for(cloud)
    else:
        name = adapter_for(cloud).capabilities.name
        assert name == f"openai-vlm-{expected}"


def _body(adapter: Adapter, query: Query = QUERY) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(adapter.encode(GOLDEN_IMAGE, query).body)
    return body


def test_no_sampling_parameter_that_a_family_is_known_to_refuse() -> None:
    cloud = Cloud(service="openai-vlm", url="https://x/v1", max_tokens=900)
    body = _body(adapter_for(replace(cloud, model="gpt-6-astra")))
    assert body["max_completion_tokens"] == 900
    assert not {"temperature", "max_tokens"} & body.keys()
    body = _body(adapter_for(replace(cloud, model="qwen3-vl-8b")))
    assert (body["max_tokens"], body["temperature"]) == (900, 0)
    pixels = replace(cloud, model="gpt-5.2", coordinates="xyxy_1000")
    assert "temperature" not in _body(adapter_for(pixels))


def test_settings_of_a_request() -> None:
    options = ModelOptions(detail="high", reasoning_effort="low")
    body = _body(OpenAiVlmAdapter("xyxy_1000", options))
    assert body["messages"][0]["content"][0]["image_url"]["detail"] == "high"
    assert body["reasoning_effort"] == "low"
    config = _body(GeminiAdapter(options))["generationConfig"]
    assert config["mediaResolution"] == "MEDIA_RESOLUTION_HIGH"
    assert config["thinkingConfig"] == {"thinkingLevel": "low"}
    options = ModelOptions(reasoning_effort="max", json_schema=False)
    assert _body(AnthropicAdapter(options))["output_config"] == {"effort": "max"}
    for adapter in (OpenAiVlmAdapter("xyxy_1000", options), GeminiAdapter(options)):
        assert "chema" not in json.dumps(_body(adapter))


def test_settings_that_change_answers_are_part_of_the_key() -> None:
    cloud = Cloud(service="openai-vlm", url="https://x/v1", coordinates="xyxy_1000")
    changes: list[dict[str, Any]] = [
        {},
        {"detail": "low"},
        {"reasoning_effort": "low"},
        {"label_scores": "logprobs"},
    ]
    settings = [
        adapter_for(replace(cloud, **change)).capabilities.key_settings
        for change in changes
    ]
    assert len(set(settings)) == 4
    assert settings[0] == ()
    for change in ({"json_schema": False}, {"max_tokens": 9}):
        adapter = adapter_for(replace(cloud, **change))
        assert adapter.capabilities.key_settings == ()


@pytest.mark.parametrize(
    ("service", "setting", "text"),
    [
        ("gemini", "detail", "original"),
        ("anthropic", "detail", "low"),
        ("http", "reasoning_effort", "low"),
        ("anthropic", "label_scores", "logprobs"),
        ("dino-x", "label_scores", "agreement"),
    ],
)
def test_settings_of_other_services(service: Any, setting: str, text: str) -> None:
    with pytest.raises(ConfigError, match=rf"cloud\.{setting} {text} is not for"):
        Cloud(service=service, **{setting: text})


def test_images_are_no_larger_than_a_family_takes() -> None:
    image = solid_image(width=3000, height=1500)
    cloud = Cloud(service="openai-vlm", url="https://x/v1", model="gpt-6-astra")
    sizes = []
    for model in ("gpt-6-astra", "anthropic/claude-sonnet-5-5", "qwen3-vl-8b"):
        capabilities = adapter_for(replace(cloud, model=model)).capabilities
        sent = shrink_to_limits(image, capabilities, min(4096, capabilities.max_side))
        sizes.append((sent.width, sent.height))
    assert sizes[0] == (2048, 1024)
    assert sizes[1][0] * sizes[1][1] <= 1_150_000
    assert sizes[1][0] >= 1510
    assert sizes[2] == (3000, 1500)


def test_boxes_in_pixels_of_the_resized_image() -> None:
    """Qwen2.5-VL resizes both sides to multiples of 28: 600 x 400 to 588 x 392."""
    cloud = Cloud(service="openai-vlm", url="https://x/v1", model="qwen2.5-vl-7b")
    adapter = adapter_for(cloud)
    body = _body(adapter)
    text = body["messages"][0]["content"][1]["text"]
    assert text.endswith("The image is 588 pixels wide and 392 pixels high.")
    answer = completion('[{"bbox_2d": [147, 98, 588, 392], "label": "car"}]')
    raw = adapter.decode({}, json.dumps(answer).encode(), QUERY, FRAME)
    assert raw.boxes.tolist() == [[150, 100, 600, 400]]  # type: ignore[union-attr]
    padded = Frame(SIZE, (400, 200), visible_size=(400.0, 200.0))
    raw = adapter.decode({}, json.dumps(answer).encode(), QUERY, padded)
    assert raw.boxes.tolist() == [[150, 100, 400, 200]]  # type: ignore[union-attr]
    explicit = adapter_for(replace(cloud, coordinates="xyxy_pixels"))
    raw = explicit.decode({}, json.dumps(answer).encode(), QUERY, FRAME)
    assert raw.boxes.tolist() == [[147, 98, 588, 392]]  # type: ignore[union-attr]
    assert explicit.capabilities.key_settings != adapter.capabilities.key_settings
    assert find_family("qwen2.5-vl").resized((4000, 2000)) == (1400, 700)


WRONG_UNITS = [
    ("xyxy_1000", [0.1, 0.2, 0.5, 0.9], "within 0..0.9"),
    ("xyxy_1000", [10.5, 20.25, 50.5, 90.5], "like percent"),
    ("xyxy_1000", [10, 20, 1500, 390], "has 1500"),
    ("xyxy_pixels", [0.1, 0.2, 0.5, 0.9], "within 0..0.9"),
    ("xyxy_pixels", [100, 200, 900, 950], "has 900"),
    ("xyxy_ratio", [100, 200, 500, 900], "has 100"),
    ("xyxy_ratio", [10, 20, 50, 90], "has 10"),
    ("xyxy_percent", [0.1, 0.2, 0.5, 0.9], "within 0..0.9"),
    ("xyxy_percent", [100, 200, 500, 900], "has 200"),
]


@pytest.mark.parametrize(("coordinates", "box", "reason"), WRONG_UNITS)
def test_another_unit_is_an_error_and_never_no_objects(
    coordinates: Any, box: list[float], reason: str
) -> None:
    body = completion(json.dumps([{"bbox_2d": box, "label": "car"}]))
    with pytest.raises(UnusableBoxes, match=reason) as caught:
        OpenAiVlmAdapter(coordinates).decode(
            {}, json.dumps(body).encode(), QUERY, FRAME
        )
    assert "cloud.coordinates" in str(caught.value)


def _tokens(
    *choices: tuple[str, float, dict[str, float]] | str,
) -> list[TokenChoice]:
    """Return tokens: texts, and those with a probability and alternatives."""
    tokens = []
    for choice in choices:
        text, probability, others = (
            (choice, 1.0, {}) if isinstance(choice, str) else choice
        )
        alternatives = {text: probability, **others}
        tokens.append(
            TokenChoice(
                text.encode(),
                math.log(probability),
                tuple((t.encode(), math.log(p)) for t, p in alternatives.items()),
            )
        )
    return tokens


def test_scores_of_labels_by_their_tokens() -> None:
    names = ("traffic light", "traffic sign", "truck", "car")
    tokens = _tokens(
        '[{"bbox_2d": [1, 2, 3, 4], "label": "',
        ("traffic", 0.5, {"tru": 0.25, "trolley": 0.1, '"': 0.05}),
        (" light", 0.75, {" sign": 0.125, " si": 0.125}),
        ('"}, {"bbox_2d": [1, 2, 3, 4], "label":'),
        (' "car', 0.5, {' "truck': 0.25, "truck": 0.1}),
        '"}]',
    )
    scores = score_label_tokens(tokens, ["traffic light", "car"], names)
    assert scores is not None
    assert scores[0] == (
        pytest.approx(0.375),
        {"truck": pytest.approx(0.25), "traffic sign": pytest.approx(0.125)},
    )
    assert scores[1] == (pytest.approx(0.5), {"truck": pytest.approx(0.25)})


def test_tokens_that_do_not_show_the_labels_give_no_scores() -> None:
    tokens = _tokens('[{"label": "car"}]')
    assert score_label_tokens(tokens, ["bus"], CLASSES) is None
    assert score_label_tokens(tokens, ["car", "car"], CLASSES) is None
    assert score_label_tokens([], ["car"], CLASSES) is None
    assert score_label_tokens(_tokens("[]"), [], CLASSES) == []


def _openai_logprobs(tokens: Sequence[TokenChoice]) -> dict[str, Any]:
    def node(token: bytes, logprob: float) -> dict[str, Any]:
        text = token.decode(errors="replace")
        return {"token": text, "bytes": list(token), "logprob": logprob}

    content = [
        node(t.token, t.logprob) | {"top_logprobs": [node(*a) for a in t.alternatives]}
        for t in tokens
    ]
    return {"content": content}


def _gemini_logprobs(tokens: Sequence[TokenChoice]) -> dict[str, Any]:
    def node(token: bytes, logprob: float) -> dict[str, Any]:
        return {"token": token.decode(), "logProbability": logprob}

    return {
        "chosenCandidates": [node(t.token, t.logprob) for t in tokens],
        "topCandidates": [
            {"candidates": [node(*a) for a in t.alternatives]} for t in tokens
        ],
    }


ANSWER_TOKENS = _tokens(
    '[{"KEY": [100, 250, 500, 750], "label": "',
    ("car", 0.6, {"bus": 0.3}),
    '"}, {"KEY": [20, 30, 400, 200], "label": "',
    ("d", 0.9, {}),
    ("og", 0.8, {}),
    '"}]',
)


def _answer(adapter: Adapter, logprobs: bool = True) -> bytes:
    key = "box_2d" if isinstance(adapter, GeminiAdapter) else "bbox_2d"
    tokens = [
        replace(t, token=t.token.replace(b"KEY", key.encode())) for t in ANSWER_TOKENS
    ]
    text = b"".join(t.token for t in tokens).decode()
    if isinstance(adapter, GeminiAdapter):
        answer = generated(text)
        if logprobs:
            answer["candidates"][0]["logprobsResult"] = _gemini_logprobs(tokens)
    else:
        answer = completion(text)
        if logprobs:
            answer["choices"][0]["logprobs"] = _openai_logprobs(tokens)
    return json.dumps(answer).encode()


SCORING = [OpenAiVlmAdapter("xyxy_1000", LOGPROBS), GeminiAdapter(LOGPROBS)]


@pytest.mark.parametrize("adapter", SCORING, ids=lambda a: a.capabilities.name)
def test_scores_where_the_server_names_probabilities(adapter: Any) -> None:
    body = _body(adapter)
    config = body.get("generationConfig", body)
    assert config.get("top_logprobs", config.get("logprobs")) == 5
    raw = adapter.decode({}, _answer(adapter), QUERY, FRAME)
    assert raw.score_kind == "label"
    assert np.allclose(raw.class_scores, [[0, 0, 0.72], [0.6, 0.3, 0]])
    without = adapter.decode({}, _answer(adapter, logprobs=False), QUERY, FRAME)
    assert without.score_kind == "none"
    assert np.allclose(without.class_scores, [[1, 0, 0], [0, 0, 1]])


@pytest.mark.parametrize("adapter", SCORING, ids=lambda a: a.capabilities.name)
def test_an_answer_with_logprobs_cut_off_at_any_byte_is_an_error(adapter: Any) -> None:
    body = _answer(adapter)
    for length in range(len(body)):
        with pytest.raises(ProtocolError):
            adapter.decode({}, body[:length], QUERY, FRAME)


def test_logprobs_that_are_refused_are_left_out() -> None:
    adapter = OpenAiVlmAdapter("xyxy_1000", LOGPROBS)
    error = {"message": "logprobs are not supported with reasoning models."}
    refused = adapter.classify_error(400, {}, json.dumps({"error": error}).encode())
    assert isinstance(refused, FieldRefused)
    query = replace(QUERY, refused_fields=frozenset({refused.field}))
    assert not {"logprobs", "top_logprobs"} & _body(adapter, query).keys()


@pytest.mark.parametrize(
    ("param", "code", "message"),
    [
        ("response_format", "unsupported_value", "x"),
        ("response_format.json_schema.schema", "invalid_json_schema", "x"),
        (
            None,
            None,
            "Invalid parameter: 'response_format' of type 'json_schema' is not"
            " supported with this model.",
        ),
    ],
)
def test_a_schema_that_is_refused_is_left_out(
    param: str | None, code: str | None, message: str
) -> None:
    adapter = OpenAiVlmAdapter("xyxy_1000")
    error = {"error": {"message": message, "param": param, "code": code}}
    refused = adapter.classify_error(400, {}, json.dumps(error).encode())
    assert isinstance(refused, FieldRefused)
    query = replace(QUERY, refused_fields=frozenset({refused.field}))
    assert "response_format" not in _body(adapter, query)


def test_a_setting_that_the_user_gave_is_not_left_out() -> None:
    options = ModelOptions(reasoning_effort="xhigh")
    adapter = OpenAiVlmAdapter("xyxy_1000", options)
    error = {"param": "reasoning_effort", "code": "unsupported_value", "message": "x"}
    refused = adapter.classify_error(400, {}, json.dumps({"error": error}).encode())
    assert type(refused) is BadRequest


def test_gemini_leaves_out_what_a_model_refuses() -> None:
    adapter = GeminiAdapter(replace(LOGPROBS, detail="high"))
    for message, field in (
        ("Logprobs is not enabled for models/gemini-4", "responseLogprobs"),
        ("media_resolution is not supported", "mediaResolution"),
        ("The specified schema produces too many states", "responseSchema"),
    ):
        body = json.dumps({"error": {"code": 400, "message": message}}).encode()
        refused = adapter.classify_error(400, {}, body)
        assert isinstance(refused, FieldRefused)
        assert refused.field == field
        query = replace(QUERY, refused_fields=frozenset({field}))
        config = _body(adapter, query)["generationConfig"]
        assert field not in config


def test_scores_by_agreement_of_renderings(
    build_harness: HarnessBuilder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A box in two of two renderings scores 1, one in a single rendering 0.5."""
    monkeypatch.setenv("OPENAI_API_KEY", TOKEN)
    harness = build_harness(
        httpx.Response(200, json=completion("[]")),
        service="openai-vlm",
        coordinates="xyxy_1000",
        label_scores="agreement",
    )
    prior = harness.client.prior
    box = np.array([[0, 0, 9, 9]], np.float32)
    other = np.array([[40, 0, 49, 9]], np.float32)
    car = np.array([[1, 0, 0]], np.float32)
    both = RawDetections(np.concatenate([box, other]), np.tile(car, (2, 1)), "none")
    single = RawDetections(box, car, "none")
    answers = [score_labels(raw, prior) for raw in (both, single)]
    fused = fuse_answers(answers, (1.0, 1.0), 0.55)
    assert fused.class_scores[:, 0].tolist() == [1.0, 0.5]
    assert fused.score_kind == "self_reported"


def test_agreement_needs_several_renderings() -> None:
    cloud = Cloud(
        service="openai-vlm",
        url="https://x/v1",
        coordinates="xyxy_1000",
        label_scores="agreement",
    )
    with pytest.raises(ConfigError, match="needs several renderings"):
        replace(folder(), classes=CLASSES, cloud=cloud)
    views = replace(cloud, views=("plain", "mirrored"))
    config = replace(folder(), classes=CLASSES, cloud=views)
    assert [c.label_scores for c in config.clouds] == ["agreement"] * 2
