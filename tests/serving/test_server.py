from __future__ import annotations

import asyncio
import importlib
import re
from typing import Any

import httpx
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from coin_ray.serving.batching import FAILURES_MAX, Found
from coin_ray.serving.server import create_app
from tests.serving.test_local_cloud import Brightness, call

Asked = tuple[str, str] | tuple[str, str, dict[str, Any]]


class Broken(Brightness):
    def detect(self, image: Image.Image, classes: Any, score_min: float) -> Found:
        raise RuntimeError("no GPU")


def ask(app: Any, *requests: Asked, **headers: str) -> list[httpx.Response]:
    async def run() -> list[httpx.Response]:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(
            transport=transport, base_url="http://local", headers=headers
        ) as client:
            return [
                await client.request(r[0], r[1], json=r[2] if len(r) > 2 else None)
                for r in requests
            ]

    return asyncio.run(run())


def samples(text: str) -> dict[tuple[str, ...], float]:
    families = list(text_string_to_metric_families(text))
    return {
        (s.name, *(s.labels[k] for k in sorted(s.labels))): s.value
        for f in families
        for s in f.samples
    }


def test_prometheus_reads_requests_batches_queue_and_model() -> None:
    app = create_app(Brightness(), queue_max=7)
    detect = ("POST", "/v1/detect", call())
    *_, scraped = ask(
        app,
        detect,
        detect,
        ("POST", "/v1/detect", {}),
        ("GET", "/no/such"),
        ("GET", "/metrics"),
    )
    assert scraped.headers["content-type"].startswith("text/plain")
    found = samples(scraped.text)
    assert found["coin_requests_total", "/v1/detect", "200"] == 2
    assert found["coin_requests_total", "/v1/detect", "400"] == 1
    assert found["coin_requests_total", "other", "404"] == 1
    assert found["coin_request_seconds_count", "/v1/detect"] == 3
    assert found["coin_batch_images_count",] == found["coin_batch_images_sum",] == 2
    assert found["coin_model", "brightness"] == 1
    assert (
        found["coin_queue_waiting",],
        found["coin_queue_max",],
        found["coin_ready",],
    ) == (0, 7, 1)
    assert found["process_resident_memory_bytes",] > 0


def test_paths_that_are_no_routes_do_not_make_figures_of_their_own() -> None:
    app = create_app(Brightness())
    before = len(
        samples(
            ask(app, ("GET", "/a"), ("GET", "/metrics"), ("GET", "/metrics"))[-1].text
        )
    )
    after = len(
        samples(
            ask(app, *[("GET", f"/{i}") for i in range(30)], ("GET", "/metrics"))[
                -1
            ].text
        )
    )
    assert before == after


def test_live_and_ready_need_no_token_and_ready_follows_the_detector() -> None:
    app = create_app(Broken(), token="right")
    probes: list[Asked] = [("GET", "/health/live"), ("GET", "/health/ready")]
    assert [r.status_code for r in ask(app, *probes, ("GET", "/health"))] == [
        200,
        200,
        401,
    ]
    broken = ask(
        app,
        *[("POST", "/v1/detect", call())] * FAILURES_MAX,
        Authorization="Bearer right",
    )
    assert {r.status_code for r in broken} == {500}
    live, ready = ask(app, *probes)
    assert (live.status_code, ready.status_code) == (200, 503)
    (health,) = ask(app, ("GET", "/health"), Authorization="Bearer right")
    assert (health.json()["live"], health.json()["ready"], health.json()["cloud"]) == (
        True,
        False,
        None,
    )


def test_the_schema_names_routes_questions_and_problems() -> None:
    (answer,) = ask(create_app(Brightness()), ("GET", "/openapi.json"))
    paths = answer.json()["paths"]
    assert set(paths) == {
        "/",
        "/v1/detect",
        "/v1/cloud",
        "/health",
        "/health/live",
        "/health/ready",
        "/stats",
        "/metrics",
    }
    detect = paths["/v1/detect"]["post"]
    assert set(detect["responses"]) >= {"200", "400", "401", "413", "415", "503"}
    question = detect["requestBody"]["content"]["application/json"]["schema"]
    assert question["required"] == ["image", "classes"]


def test_the_page_needs_nothing_from_elsewhere() -> None:
    (page,) = ask(create_app(Brightness()), ("GET", "/"))
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert set(re.findall(r"https?://[^\"'\s<]+", page.text)) == {
        "http://www.w3.org/2000/svg"
    }
    assert not re.findall(r"(?:src|@import)\s*=?\s*[\"'](?!data:)", page.text)


def test_no_cloud_beside_is_a_404_with_what_to_do() -> None:
    (answer,) = ask(create_app(Brightness()), ("POST", "/v1/cloud", call()))
    assert (answer.status_code, answer.json()["title"]) == (
        404,
        "no cloud is configured",
    )


def test_serve_run_s_import_path_is_the_package() -> None:
    pytest.importorskip("grpc_reflection", reason="needs the extra serve")
    import_attr = importlib.import_module("ray._common.utils").import_attr
    importlib.import_module("coin_ray.serving.application")
    assert import_attr("coin_ray.serving:app")._bound_deployment.name == "coin-detector"
    assert callable(import_attr("coin_ray.serving:build"))
    with pytest.raises(AttributeError, match="no attribute 'application_of_another'"):
        import_attr("coin_ray.serving:application_of_another")
