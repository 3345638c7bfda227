from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from PIL import Image

from coin_ray.config import Cloud, Folder, PipelineConfig
from coin_ray.errors import AuthError, ConfigError
from coin_ray.predictors.scored_boxes import ScoredBoxes
from coin_ray.serving.server import create_app
from coin_ray.serving.teacher_proxy import TeacherProxy
from tests.images import jpeg
from tests.serving.helpers import BrightnessDetector, detect_request, run_server, send

SECRET = "s3cret-0123"


class CountingDetector(BrightnessDetector):
    name = "counting"
    calls = 0

    def detect(self, image: Image.Image, classes: Any, score_min: float) -> ScoredBoxes:
        self.calls += 1
        return super().detect(image, classes, score_min)


@pytest.fixture(scope="module")
def cloud_server() -> Iterator[tuple[CountingDetector, str]]:
    """A remote detector that demands a token, and its URL."""
    detector = CountingDetector()
    with run_server(create_app(detector, token=SECRET)) as url:
        yield detector, url


@pytest.fixture
def detector(cloud_server: tuple[CountingDetector, str]) -> CountingDetector:
    cloud_server[0].calls = 0
    return cloud_server[0]


@pytest.fixture
def config(
    cloud_server: tuple[CountingDetector, str], monkeypatch: pytest.MonkeyPatch
) -> PipelineConfig:
    """A run with this cloud, its token set."""
    monkeypatch.setenv("DETECTOR_TOKEN", SECRET)
    cloud = Cloud(url=cloud_server[1], token_env="DETECTOR_TOKEN")
    return PipelineConfig("folder", BrightnessDetector.classes, Folder("."), cloud)


def _app(config: PipelineConfig, **options: Any) -> FastAPI:
    proxy = TeacherProxy(config, **options)
    return create_app(BrightnessDetector(), teacher_proxy=proxy)


def _ask_cloud(app: FastAPI, *images: bytes, **headers: str) -> list[httpx.Response]:
    requests = (("POST", "/v1/cloud", detect_request(image)) for image in images)
    return send(app, *requests, **headers)


def _statuses(responses: list[httpx.Response]) -> list[int]:
    return [response.status_code for response in responses]


def test_the_cloud_s_answer_has_the_reference_format_and_is_paid_once(
    detector: CountingDetector, config: PipelineConfig
) -> None:
    app = _app(config)
    first, repeated = _ask_cloud(app, jpeg(), jpeg())
    assert _statuses([first, repeated]) == [200, 200]
    assert detector.calls == 1
    (detection,) = first.json()["detections"]
    assert (detection["label"], detection["box"]) == ("bright", [10, 5, 30, 15])
    assert first.json()["image"] == {"w": 40, "h": 20}
    assert first.json()["detections"] == repeated.json()["detections"]
    (health,) = send(app, ("GET", "/health"))
    assert health.json()["cloud"] == "http"


def test_no_more_calls_than_allowed_and_no_secret_in_any_answer(
    detector: CountingDetector, config: PipelineConfig
) -> None:
    app = _app(config, calls_max=2)
    images = jpeg(10), jpeg(20), jpeg(30), jpeg(10), b"no image"
    answers = _ask_cloud(app, *images)
    assert _statuses(answers) == [200, 200, 503, 200, 415]
    assert answers[2].json()["detail"] == "BudgetExhausted"
    assert detector.calls == 2
    pages = send(app, ("GET", "/health"), ("GET", "/metrics"), ("GET", "/"))
    assert not [page for page in [*answers, *pages] if SECRET in page.text]


def test_another_site_s_page_can_not_spend_money(
    detector: CountingDetector, config: PipelineConfig
) -> None:
    app = _app(config)
    (refused,) = _ask_cloud(app, jpeg(), **{"Sec-Fetch-Site": "cross-site"})
    (answered,) = _ask_cloud(app, jpeg(), **{"Sec-Fetch-Site": "same-origin"})
    assert _statuses([refused, answered]) == [403, 200]
    assert detector.calls == 1


def test_of_a_wrong_key_the_answer_names_only_the_kind_of_error(
    config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTOR_TOKEN", "another")
    (answer,) = _ask_cloud(_app(config), jpeg())
    assert (answer.status_code, answer.json()["detail"]) == (503, "AuthError")


def test_a_cloud_without_its_key_is_an_error_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = PipelineConfig("folder", ("cat",), Folder("."), Cloud(service="dino-x"))
    monkeypatch.delenv("DDS_API_TOKEN", raising=False)
    with pytest.raises((AuthError, ConfigError)):
        TeacherProxy(config)


def test_its_answers_are_deleted_when_it_is_closed(
    config: PipelineConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    proxy = TeacherProxy(config)
    assert list(tmp_path.rglob("journal"))
    asyncio.run(proxy.aclose())
    assert not list(tmp_path.iterdir())


def test_with_the_run_s_journal_no_server_pays_again(
    detector: CountingDetector, config: PipelineConfig, tmp_path: Path
) -> None:
    """Answers that the run or an earlier server has paid for cost nothing; each server
    may make its own number of calls beyond that."""
    journal = str(tmp_path / "journal")
    for calls, statuses in ((1, [200, 503]), (2, [200, 200])):
        app = _app(config, calls_max=1, journal=journal)
        assert _statuses(_ask_cloud(app, jpeg(10), jpeg(20))) == statuses
        assert detector.calls == calls
