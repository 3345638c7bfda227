from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from coin_ray.config import Cloud, Folder, PipelineConfig
from coin_ray.errors import AuthError, ConfigError
from coin_ray.serving.server import create_app
from coin_ray.serving.teacher_proxy import CloudBeside
from tests.serving.running import running
from tests.serving.test_local_cloud import Brightness, call, jpeg
from tests.serving.test_server import ask

SECRET = "s3cret-0123"


class Elsewhere(Brightness):
    name = "elsewhere"
    asked = 0

    def detect(self, image: Image.Image, classes: Any, score_min: float) -> Any:
        self.asked += 1
        return super().detect(image, classes, score_min)


@pytest.fixture
def cloud(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[Elsewhere, PipelineConfig]]:
    monkeypatch.setenv("DETECTOR_TOKEN", SECRET)
    detector = Elsewhere()
    with running(create_app(detector, token=SECRET)) as url:
        yield (
            detector,
            PipelineConfig(
                "folder",
                Brightness.classes,
                Folder("."),
                Cloud(url=url, token_env="DETECTOR_TOKEN"),
            ),
        )


def questions(app: Any, *images: bytes, **headers: str) -> list[httpx.Response]:
    return ask(
        app, *[("POST", "/v1/cloud", call(image)) for image in images], **headers
    )


def test_the_cloud_s_answer_comes_in_the_reference_format_and_is_paid_once(
    cloud: tuple[Elsewhere, PipelineConfig],
) -> None:
    detector, config = cloud
    app = create_app(Brightness(), beside=CloudBeside(config))
    first, again = questions(app, jpeg(), jpeg())
    assert (first.status_code, again.status_code, detector.asked) == (200, 200, 1)
    (element,) = first.json()["detections"]
    assert (element["label"], element["box"]) == ("bright", [10, 5, 30, 15])
    assert first.json()["image"] == {"w": 40, "h": 20}
    assert first.json()["detections"] == again.json()["detections"]
    assert ask(app, ("GET", "/health"))[0].json()["cloud"] == "http"


def test_no_more_calls_than_allowed_and_no_secret_in_any_answer(
    cloud: tuple[Elsewhere, PipelineConfig],
) -> None:
    detector, config = cloud
    app = create_app(Brightness(), beside=CloudBeside(config, calls_max=2))
    answers = questions(app, jpeg(10), jpeg(20), jpeg(30), jpeg(10), b"no image")
    assert [r.status_code for r in answers] == [200, 200, 503, 200, 415]
    assert answers[2].json()["detail"] == "BudgetExhausted"
    assert detector.asked == 2
    assert not [
        r
        for r in [
            *answers,
            *ask(app, ("GET", "/health"), ("GET", "/metrics"), ("GET", "/")),
        ]
        if SECRET in r.text
    ]


def test_another_site_s_page_can_not_spend_money(
    cloud: tuple[Elsewhere, PipelineConfig],
) -> None:
    detector, config = cloud
    app = create_app(Brightness(), beside=CloudBeside(config))
    (refused,) = questions(app, jpeg(), **{"Sec-Fetch-Site": "cross-site"})
    (fine,) = questions(app, jpeg(), **{"Sec-Fetch-Site": "same-origin"})
    assert (refused.status_code, fine.status_code, detector.asked) == (403, 200, 1)


def test_a_wrong_key_is_told_by_its_kind_alone(
    cloud: tuple[Elsewhere, PipelineConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, config = cloud
    monkeypatch.setenv("DETECTOR_TOKEN", "another")
    (answer,) = questions(create_app(Brightness(), beside=CloudBeside(config)), jpeg())
    assert (answer.status_code, answer.json()["detail"]) == (503, "AuthError")


def test_a_cloud_that_can_not_be_asked_is_an_error_at_the_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = PipelineConfig("folder", ("cat",), Folder("."), Cloud(service="dino-x"))
    monkeypatch.delenv("DDS_API_TOKEN", raising=False)
    with pytest.raises((AuthError, ConfigError)):
        CloudBeside(config)


def test_its_answers_end_with_it(
    cloud: tuple[Elsewhere, PipelineConfig],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    beside = CloudBeside(cloud[1])
    assert list(tmp_path.rglob("journal"))
    asyncio.run(beside.aclose())
    assert not list(tmp_path.iterdir())


def test_with_the_run_s_journal_no_server_pays_again(
    cloud: tuple[Elsewhere, PipelineConfig], tmp_path: Path
) -> None:
    """What the run or an earlier server has paid for costs nothing; each server may
    make its own number of calls beyond that."""
    detector, config = cloud
    for paid, statuses in ((1, (200, 503)), (2, (200, 200))):
        beside = CloudBeside(config, calls_max=1, journal=str(tmp_path / "journal"))
        answers = questions(create_app(Brightness(), beside=beside), jpeg(10), jpeg(20))
        assert tuple(r.status_code for r in answers) == statuses
        assert detector.asked == paid
