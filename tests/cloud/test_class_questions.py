"""Classes asked by several phrases, with negatives: what is asked, what is paid, and the
answer."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from coin_ray.cloud.answer import Answer
from coin_ray.cloud.class_questions import ClassQuestion, merge_answers, plan_questions
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import Governor, Limits, LocalGovernor
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.protocol import Capabilities, Query, RawDetections, ScoreKind
from coin_ray.cloud.question_client import QuestionClient, create_cloud_client
from coin_ray.cloud.services import adapter_for
from coin_ray.config import ClassPrompt, Cloud, Labels, PipelineConfig
from coin_ray.config.fingerprints import fingerprint
from coin_ray.config.presets import folder
from coin_ray.config.yaml_files import parse_config, to_yaml, with_class_file
from coin_ray.data.canonical import canonical_image
from coin_ray.errors import CloudError, ConfigError

from .emulator import PROVIDERS, Emulator, Fault, scene
from .emulator.app import SCENE_CLASSES

OPEN = Capabilities("open", True, False, False)
VEHICLE = ClassPrompt("vehicle", ("car", "bus"), negatives=("dog",))
PLAIN = folder()


def _config(
    *prompts: ClassPrompt, classes: tuple[str, ...] = ("vehicle", "cat")
) -> Any:
    cloud = Cloud(url="https://detector.example.com", rate=1e5)
    return replace(PLAIN, classes=classes, class_prompts=prompts, cloud=cloud)


def test_a_class_without_prompts_is_asked_by_its_name() -> None:
    plain = plan_questions(("car", "dog"), (), OPEN)
    assert plain == [ClassQuestion(("car", "dog"), ((0,), (1,)))]


def test_phrases_and_negatives_are_separate_questions() -> None:
    other = ClassPrompt("cat", negatives=("dog", "fox"))
    questions = plan_questions(("vehicle", "cat"), (VEHICLE, other), OPEN)
    assert questions == [
        ClassQuestion(("car", "bus", "cat"), ((0,), (0,), (1,))),
        ClassQuestion(("dog", "fox"), ((0, 1), (1,)), is_negative=True),
    ]


def test_as_many_phrases_a_call_as_the_service_takes() -> None:
    one = replace(OPEN, phrases_per_call=1)
    questions = plan_questions(("vehicle", "cat"), (VEHICLE,), one)
    phrases = [(question.phrases, question.is_negative) for question in questions]
    assert phrases == [
        (("car",), False),
        (("bus",), False),
        (("cat",), False),
        (("dog",), True),
    ]
    many = tuple(f"class {k}" for k in range(35))
    sam3 = replace(OPEN, phrases_per_call=16)
    sizes = [len(question.phrases) for question in plan_questions(many, (), sam3)]
    assert sizes == [16, 16, 3]


def test_services_that_read_no_phrases(caplog: pytest.LogCaptureFixture) -> None:
    closed = replace(OPEN, open_vocabulary=False)
    questions = plan_questions(("vehicle", "cat"), (VEHICLE,), closed)
    assert questions == [ClassQuestion(("vehicle", "cat"), ((0,), (1,)))]
    assert "phrases and negatives of vehicle are not asked for" in caplog.text
    with pytest.raises(ConfigError, match=r"both cloud\.label_map and phrases"):
        plan_questions(("vehicle",), (VEHICLE,), OPEN, has_label_map=True)


def test_descriptions_go_to_language_models() -> None:
    prompt = replace(VEHICLE, description="anything with wheels")
    adapter = adapter_for(
        Cloud(service="openai-vlm", url="https://x/v1", coordinates="xyxy_1000")
    )
    question = plan_questions(("vehicle",), (prompt,), adapter.capabilities)[0]
    assert question.descriptions == (
        ("car", "anything with wheels"),
        ("bus", "anything with wheels"),
    )
    query = Query("default", question.phrases, 0.05, descriptions=question.descriptions)
    image = canonical_image(scene([], [], (64, 64)), 4096)
    body = json.loads(adapter.encode(image, query).body)
    prompt_text = body["messages"][0]["content"][1]["text"]
    assert '"car" means: anything with wheels "bus" means: anything' in prompt_text
    assert plan_questions(("vehicle",), (prompt,), OPEN)[0].descriptions == ()


def _raw(
    *rows: tuple[tuple[float, float, float, float], tuple[float, ...]],
    kind: ScoreKind = "label",
) -> RawDetections:
    boxes = np.array([box for box, _ in rows], np.float32).reshape(-1, 4)
    width = len(rows[0][1]) if rows else 1
    scores = np.array([scores for _, scores in rows], np.float32).reshape(-1, width)
    return RawDetections(boxes, scores, kind)


QUESTIONS = plan_questions(("vehicle", "cat"), (VEHICLE,), OPEN)


def test_phrases_merge_to_one_object() -> None:
    raw = _raw(
        ((0, 0, 100, 100), (0.8, 0, 0)),
        ((0, 0, 110, 100), (0, 0.4, 0)),
        ((0, 0, 104, 100), (0, 0, 0.3)),
        ((200, 0, 300, 100), (0, 0.5, 0)),
    )
    merged = merge_answers(QUESTIONS[:1], [raw], 2)
    assert np.allclose(merged.class_scores, [[0.8, 0], [0.5, 0], [0, 0.3]])
    # the mean of both boxes of the vehicle, weighted by their scores
    assert np.allclose(merged.boxes[0], [0, 0, (80 * 1 + 44) / 1.2, 100], atol=0.01)
    assert np.allclose(merged.boxes[1], [200, 0, 300, 100])


@pytest.mark.parametrize(
    ("negative", "count"),
    [
        (((0, 0, 100, 100), (0.9,)), 1),
        (((0, 0, 100, 100), (0.8,)), 1),
        (((0, 0, 100, 100), (0.7,)), 2),
        (((0, 0, 100, 45), (0.9,)), 2),
    ],
)
def test_negatives_suppress_boxes_of_their_class(negative: Any, count: int) -> None:
    raw = _raw(((0, 0, 100, 100), (0.8, 0, 0)), ((0, 0, 100, 100), (0, 0, 0.9)))
    merged = merge_answers(QUESTIONS, [raw, _raw(negative)], 2)
    assert len(merged) == count
    assert merged.class_scores[0].tolist() == [0, np.float32(0.9)]
    assert merged.counts.suppressed == 2 - count
    if count == 1:
        assert "fit a negative of their class better" in merged.counts.describe()


def test_negatives_of_services_without_scores() -> None:
    raw = _raw(((0, 0, 9, 9), (1, 0, 0)), ((20, 0, 29, 9), (1, 0, 0)), kind="none")
    negative = _raw(((20, 0, 29, 9), (1,)), kind="none")
    merged = merge_answers(QUESTIONS, [raw, negative], 2)
    assert merged.boxes.tolist() == [[0, 0, 9, 9]]
    assert merged.score_kind == "none"


def test_an_answer_of_plain_classes_is_not_changed() -> None:
    raw = _raw(((0, 0, 100, 100), (0.8, 0.1)), ((1, 0, 100, 100), (0.7, 0)))
    merged = merge_answers(plan_questions(("a", "b"), (), OPEN), [raw], 2)
    assert np.array_equal(merged.boxes, raw.boxes)
    assert np.array_equal(merged.class_scores, raw.class_scores)


def _client(
    config: PipelineConfig, question_emulator: Emulator, folder: Path
) -> CloudClient | QuestionClient:
    governor = LocalGovernor(Governor(Limits(rate=1e5, in_flight=9)))
    return create_cloud_client(
        config,
        config.cloud,
        question_emulator.url("reference"),
        open_journal(str(folder)),
        governor,
        transport=question_emulator.transport(),
    )


SCENE = canonical_image(
    scene(
        [SCENE_CLASSES.index(name) for name in ("car", "bus", "dog")],
        [(10, 10, 60, 60), (80, 10, 130, 60), (150, 10, 200, 60)],
        (220, 80),
    ),
    4096,
)


def _ask(config: PipelineConfig, question_emulator: Emulator, folder: Path) -> Answer:
    async def run() -> Answer:
        client = _client(config, question_emulator, folder)
        answer = await client.answer(SCENE)
        recorded = await client.recorded_answer(SCENE)
        assert recorded is not None
        assert recorded.raw is not None
        assert answer.raw is not None
        assert np.array_equal(recorded.raw.boxes, answer.raw.boxes)
        await client.aclose()
        return answer

    return asyncio.run(run())


def _asked(question_emulator: Emulator) -> list[list[str]]:
    asked = [call.json()["classes"] for call in question_emulator.calls]
    question_emulator.calls.clear()
    return asked


@pytest.fixture
def question_emulator() -> Emulator:
    return Emulator(PROVIDERS)


def test_a_changed_negative_costs_only_its_question(
    question_emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .emulator.app import TOKEN

    monkeypatch.setenv("CLOUD_TOKEN", TOKEN)

    def config(*negatives: str) -> PipelineConfig:
        prompt = ClassPrompt("vehicle", ("car", "bus"), negatives=negatives)
        base: PipelineConfig = _config(prompt)
        return replace(base, cloud=replace(base.cloud, token_env="CLOUD_TOKEN"))

    first = _ask(config("dog"), question_emulator, tmp_path)
    assert _asked(question_emulator) == [["car", "bus", "cat"], ["dog"]]
    assert (first.status, first.calls) == ("ok", 2)
    assert first.raw is not None
    assert first.raw.class_scores.argmax(1).tolist() == [0, 0]
    again = _ask(config("dog"), question_emulator, tmp_path)
    assert (_asked(question_emulator), again.status) == ([], "cached")
    changed = _ask(config("truck"), question_emulator, tmp_path)
    assert (_asked(question_emulator), changed.calls) == ([["truck"]], 1)
    none = _ask(config(), question_emulator, tmp_path)
    assert (_asked(question_emulator), none.calls) == ([], 0)


def test_an_unanswered_negative_leaves_the_image_unanswered(
    question_emulator: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from .emulator.app import TOKEN

    monkeypatch.setenv("CLOUD_TOKEN", TOKEN)
    base: PipelineConfig = _config(VEHICLE)
    cloud = replace(base.cloud, token_env="CLOUD_TOKEN", attempts=1)
    config = replace(base, cloud=cloud)
    question_emulator.script([None, Fault(status=415, body={"title": "no"})])

    async def run() -> Answer:
        client = _client(config, question_emulator, tmp_path)
        answer = await client.answer(SCENE)
        await client.aclose()
        return answer

    answer = asyncio.run(run())
    assert (answer.status, answer.raw) == ("error", None)
    assert answer.error is not None
    assert "415" in answer.error


def test_plain_classes_keep_their_keys_and_fingerprints(tmp_path: Path) -> None:
    question_emulator = Emulator(PROVIDERS)
    plain: PipelineConfig = _config()
    client = _client(plain, question_emulator, tmp_path)
    assert isinstance(client, CloudClient)
    governor = LocalGovernor(Governor(Limits(rate=1e5, in_flight=9)))
    direct = CloudClient(
        plain.cloud,
        plain.classes,
        question_emulator.url("reference"),
        open_journal(str(tmp_path)),
        governor,
        transport=httpx.MockTransport(lambda _: httpx.Response(200)),
    )
    assert client.key(SCENE) == direct.key(SCENE)
    assert fingerprint(plain) == fingerprint(
        parse_config(_settings_without_prompts(plain), "x")
    )
    assert fingerprint(plain) != fingerprint(_config(VEHICLE))


def _settings_without_prompts(config: PipelineConfig) -> dict[str, Any]:
    import yaml

    settings: dict[str, Any] = yaml.safe_load(to_yaml(config))
    del settings["class_prompts"]
    del settings["labels"]["class_score_min"]
    return settings


FILE = """
e-scooter:
  ask: [electric scooter, kick scooter]
  description: a scooter to stand on, with a motor
  not: bicycle
  score_min: 0.4
car:
"""


def test_prompts_in_a_file_of_classes(tmp_path: Path) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(FILE)
    config = with_class_file(PLAIN, str(file))
    assert config.classes == ("e-scooter", "car")
    assert config.class_prompts == (
        ClassPrompt(
            "e-scooter",
            ("electric scooter", "kick scooter"),
            "a scooter to stand on, with a motor",
            ("bicycle",),
        ),
    )
    assert config.class_phrases == (("electric scooter", "kick scooter"), ("car",))
    assert config.labels.thresholds(2) == [0.4, 0.25]
    import yaml

    again = parse_config(yaml.safe_load(to_yaml(config)), "config.yaml")
    assert again == config


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("car: {ask: 3}", "class car: ask must be a list of phrases"),
        ("car: {asks: [a]}", "class car has the unknown key 'asks'"),
        ("car: 3", "class car: expected ask, description"),
        ("car: {score_min: high}", "score_min must be a number"),
        ("car: {score_min: 3}", "must lie in 0..1"),
        ("no: {ask: [a]}", "write it in quotes"),
        ("car: {ask: ['']}", "a phrase of class car"),
        ("car: {not: [Cars]}\ntruck: {ask: [car]}", "means both car and truck"),
        ("car: {not: [truck]}\ntruck:", "the negative 'truck' of class car is how"),
        ("car: {not: [Car]}", "the negative 'Car' of class car is how class car"),
        ("car: {ask: [auto], not: [Auto]}", "is how class car is asked for"),
        ("3", "expected classes as NAME"),
    ],
)
def test_files_of_classes_that_can_not_be_used(
    text: str, problem: str, tmp_path: Path
) -> None:
    file = tmp_path / "classes.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=problem):
        with_class_file(PLAIN, str(file))


def test_prompts_of_other_classes() -> None:
    with pytest.raises(ConfigError, match="are for vehicle, but the classes are car"):
        _config(VEHICLE, classes=("car",))
    with pytest.raises(ConfigError, match="a score for each of the 2 classes, got 1"):
        replace(_config(), labels=Labels(class_score_min=(0.4,)))


def test_errors_of_a_question_stop_the_run(tmp_path: Path) -> None:
    question_emulator = Emulator(PROVIDERS)  # no token: 401
    with pytest.raises(CloudError):
        _ask(_config(VEHICLE), question_emulator, tmp_path)
