from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from coin_ray.predictors.scored_boxes import ScoredBoxes
from coin_ray.serving.batching import FAILURES_MAX
from coin_ray.serving.server import create_app
from tests.serving.helpers import (
    BrightnessDetector,
    Request,
    detect_request,
    post,
    send,
)


class FailingDetector(BrightnessDetector):
    def detect(self, image: Image.Image, classes: Any, score_min: float) -> ScoredBoxes:
        raise RuntimeError("no GPU")


def _samples(exposition: str) -> dict[tuple[str, ...], float]:
    """Return Prometheus's figures by name and label values."""
    samples = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            labels = [sample.labels[label] for label in sorted(sample.labels)]
            samples[(sample.name, *labels)] = sample.value
    return samples


def _statuses(responses: list[httpx.Response]) -> list[int]:
    return [response.status_code for response in responses]


def test_prometheus_reads_requests_batches_queue_and_model() -> None:
    detect: Request = ("POST", "/v1/detect", detect_request())
    *_, scraped = send(
        create_app(BrightnessDetector(), queue_max=7),
        detect,
        detect,
        ("POST", "/v1/detect", {}),
        ("GET", "/no/such"),
        ("GET", "/metrics"),
    )
    assert scraped.headers["content-type"].startswith("text/plain")
    samples = _samples(scraped.text)
    assert samples["coin_requests_total", "/v1/detect", "200"] == 2
    assert samples["coin_requests_total", "/v1/detect", "400"] == 1
    assert samples["coin_requests_total", "other", "404"] == 1
    assert samples["coin_request_seconds_count", "/v1/detect"] == 3
    assert samples["coin_batch_images_count",] == 2
    assert samples["coin_batch_images_sum",] == 2
    assert samples["coin_model", "brightness"] == 1
    assert samples["coin_queue_waiting",] == 0
    assert samples["coin_queue_max",] == 7
    assert samples["coin_ready",] == 1
    assert samples["process_resident_memory_bytes",] > 0


def test_paths_that_are_no_routes_count_together() -> None:
    app = create_app(BrightnessDetector())
    scrape: Request = ("GET", "/metrics")
    unknown: list[Request] = [("GET", f"/{number}") for number in range(30)]
    before = send(app, ("GET", "/a"), scrape, scrape)[-1].text
    after = send(app, *unknown, scrape)[-1].text
    assert len(_samples(before)) == len(_samples(after))


def test_live_and_ready_need_no_token_and_ready_follows_the_detector() -> None:
    app = create_app(FailingDetector(), token="right")
    probes: list[Request] = [("GET", "/health/live"), ("GET", "/health/ready")]
    assert _statuses(send(app, *probes, ("GET", "/health"))) == [200, 200, 401]
    requests = [detect_request()] * FAILURES_MAX
    failed = post(app, *requests, Authorization="Bearer right")
    assert set(_statuses(failed)) == {500}
    assert _statuses(send(app, *probes)) == [200, 503]
    (response,) = send(app, ("GET", "/health"), Authorization="Bearer right")
    health = response.json()
    assert health["live"]
    assert not health["ready"]
    assert health["cloud"] is None


@pytest.fixture(scope="module")
def openapi() -> dict[str, Any]:
    (response,) = send(create_app(BrightnessDetector()), ("GET", "/openapi.json"))
    document: dict[str, Any] = response.json()
    return document


def test_the_schema_names_routes_requests_and_problems(openapi: dict[str, Any]) -> None:
    assert set(openapi["paths"]) == {
        "/",
        "/v1/detect",
        "/v1/cloud",
        "/health",
        "/health/live",
        "/health/ready",
        "/stats",
        "/metrics",
    }
    detect = openapi["paths"]["/v1/detect"]["post"]
    assert set(detect["responses"]) >= {"200", "400", "401", "413", "415", "503"}
    body = detect["requestBody"]["content"]["application/json"]["schema"]
    assert body["required"] == ["image", "classes"]


def _references(schema: Any) -> Iterator[str]:
    """Yield every ``$ref`` below a part of a schema."""
    if isinstance(schema, dict):
        if "$ref" in schema:
            yield schema["$ref"]
        for part in schema.values():
            yield from _references(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from _references(part)


def test_references_in_the_schema_resolve(openapi: dict[str, Any]) -> None:
    references = set(_references(openapi))
    assert "#/components/schemas/EncodedImage" in references
    for reference in references:
        part: Any = openapi
        for name in reference.removeprefix("#/").split("/"):
            part = part[name]


def test_the_page_needs_nothing_from_elsewhere() -> None:
    (page,) = send(create_app(BrightnessDetector()), ("GET", "/"))
    assert "default-src 'none'" in page.headers["content-security-policy"]
    addresses = set(re.findall(r"https?://[^\"'\s<]+", page.text))
    assert addresses == {"http://www.w3.org/2000/svg"}
    assert not re.findall(r"(?:src|@import)\s*=?\s*[\"'](?!data:)", page.text)


def test_without_a_teacher_proxy_the_cloud_is_a_404_with_what_to_do() -> None:
    app = create_app(BrightnessDetector())
    (response,) = send(app, ("POST", "/v1/cloud", detect_request()))
    assert response.status_code == 404
    assert response.json()["title"] == "no cloud is configured"


def test_serve_run_s_import_path_is_the_package() -> None:
    pytest.importorskip("grpc_reflection", reason="needs the extra serve")
    import_attr = importlib.import_module("ray._common.utils").import_attr
    importlib.import_module("coin_ray.serving.application")
    assert import_attr("coin_ray.serving:app")._bound_deployment.name == "coin-detector"
    assert callable(import_attr("coin_ray.serving:build"))
    with pytest.raises(AttributeError, match="no attribute 'application_of_another'"):
        import_attr("coin_ray.serving:application_of_another")
