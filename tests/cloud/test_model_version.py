"""A service whose answers name another model version than before."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from coin_ray.cloud.journal.base import AnswerRecord
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.model_version import reported_version
from coin_ray.errors import BadRequest

from .cases import CASES, CLASSES, Truth
from .conftest import ClientHarness, HarnessBuilder, response_json, solid_image
from .emulator.openai_vlm import completion

VERSIONS = {
    "openai-vlm-xyxy_1000": "sees",
    "anthropic": "claude-sonnet-5-5",
    "gemini": "gemini-3.8-flash",
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_versions_in_the_answers_of_services(case: Any) -> None:
    answer = case.respond([Truth(case.names["car"], (1, 2, 90, 80))], CLASSES)
    if isinstance(answer, dict) and "Labels" in answer:
        answer["LabelModelVersion"] = "3.0"
    if isinstance(answer, dict) and "objectsResult" in answer:
        answer["modelVersion"] = "2023-10-01"
    expected = VERSIONS | {
        "reference": "m",
        "rekognition": "3.0",
        "azure-vision": "2023-10-01",
    }
    version = reported_version(json.dumps(answer).encode())
    if case.name in expected:
        assert version == expected[case.name]
    elif not case.name.startswith("openai-vlm"):
        assert version == ""


def test_what_a_model_writes_is_no_version() -> None:
    text = json.dumps([{"model": "T-34", "label": "tank", "bbox_2d": [1, 2, 3, 4]}])
    body = completion(text)
    del body["model"]
    assert reported_version(json.dumps(body).encode()) == ""
    assert reported_version(b"") == ""


def _server(*versions: str) -> Any:
    remaining = list(versions)

    def reply(_: httpx.Request) -> httpx.Response:
        version = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        return httpx.Response(200, json={"model": version, **response_json()})

    return reply


def _ask(harness: ClientHarness, *seeds: int) -> list[str]:
    async def run() -> list[str]:
        statuses = []
        for seed in seeds:
            answer = await harness.client.answer(solid_image(seed))
            statuses.append(answer.status)
        return statuses

    return asyncio.run(run())


def test_a_change_during_a_run_is_told(
    build_harness: HarnessBuilder, caplog: pytest.LogCaptureFixture
) -> None:
    harness = build_harness(_server("v1", "v1", "v2", "v2", "v1"))
    assert _ask(harness, 0, 1) == ["empty", "empty"]
    assert caplog.text == ""
    assert _ask(harness, 2, 3, 4) == ["empty"] * 3
    messages = [record.message for record in caplog.records]
    assert len(messages) == 2
    assert "answers with another model: 'v2', before it was 'v1'" in messages[0]
    record = harness.journal.get(harness.client.key(solid_image(2)))
    assert record is not None
    assert record.version == "v2"


def test_a_change_can_stop_the_run_and_loses_nothing(
    build_harness: HarnessBuilder,
) -> None:
    harness = build_harness(_server("v1", "v2"), on_version_change="stop")
    assert _ask(harness, 0, 1) == ["empty", "empty"]
    with pytest.raises(BadRequest, match=r"before it was .v1..*on-version-change warn"):
        _ask(harness, 2)
    assert _ask(harness, 0, 1) == ["cached", "cached"]
    assert len(harness.service.requests) == 2
    assert harness.journal.spent()[0] == 2


def test_a_change_between_runs_is_told(
    tmp_path: Path, build_harness: HarnessBuilder, caplog: pytest.LogCaptureFixture
) -> None:
    harness = build_harness(_server("v1"))
    _ask(harness, 0)
    harness.journal.close()
    again = build_harness(_server("v2"))
    _ask(again, 0)
    assert caplog.text == ""
    _ask(again, 1)
    assert "before it was 'v1'" in caplog.text


def test_versions_stay_in_a_compacted_journal(tmp_path: Path) -> None:
    journal = open_journal(str(tmp_path))
    for number, version in enumerate(("a", "b", "")):
        record = AnswerRecord(
            b"{}%d" % number, time=number + 1, service="s", model="m", version=version
        )
        journal.put(f"key {number}", record)
    assert journal.latest_version("s", "m") == "b"
    assert journal.latest_version("s", "other") == ""
    journal.compact()  # type: ignore[attr-defined]
    journal.close()
    again = open_journal(str(tmp_path))
    assert again.latest_version("s", "m") == "b"
    answer = again.get("key 1")
    assert answer is not None
    assert answer.version == "b"
