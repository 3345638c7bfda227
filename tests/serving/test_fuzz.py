"""Requests made from the server's own OpenAPI schema, those that follow it and those
that break it, against the application itself."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from coin_ray.serving.server import create_app
from tests.images import jpeg
from tests.serving.helpers import BrightnessDetector, encoded_image

schemathesis = pytest.importorskip("schemathesis", reason="needs the extra test")

logging.getLogger("faker").setLevel(logging.WARNING)
APP = create_app(BrightnessDetector(), pixels_max=1_000_000)
SCHEMA = schemathesis.openapi.from_asgi("/openapi.json", APP)
REPEATABLE = settings(suppress_health_check=list(HealthCheck), derandomize=True)
RESPONSE_CHECKS = [
    schemathesis.checks.not_a_server_error,
    schemathesis.specs.openapi.checks.status_code_conformance,
    schemathesis.specs.openapi.checks.content_type_conformance,
    schemathesis.specs.openapi.checks.response_schema_conformance,
]
CHECKS = [
    *RESPONSE_CHECKS,
    schemathesis.specs.openapi.checks.negative_data_rejection,
    schemathesis.specs.openapi.checks.unsupported_method,
]


@SCHEMA.parametrize()
@REPEATABLE
def test_every_request_gets_an_answer_that_the_schema_names(case: Any) -> None:
    case.call_and_validate(checks=CHECKS)


@SCHEMA.include(path="/v1/detect").parametrize()
@REPEATABLE
def test_requests_with_a_real_image_are_answered_or_refused_for_their_classes(
    case: Any,
) -> None:
    if not (isinstance(case.body, dict) and isinstance(case.body.get("image"), dict)):
        return
    case.body["image"] |= encoded_image(jpeg())
    if len(str(case.body.get("classes"))) % 2:
        case.body["classes"] = ["dark"]
    response = case.call()
    case.validate_response(response, checks=RESPONSE_CHECKS)
    assert response.status_code in (200, 400, 405, 406, 415, 422)
    if response.status_code == 200:
        labels = {detection["label"] for detection in response.json()["detections"]}
        assert labels <= {"dark", "bright"}


def test_the_requests_reached_the_detector_and_its_refusals() -> None:
    stats = APP.state.service.stats
    if stats.received == 0:
        pytest.skip("the tests above did not run")
    assert stats.answered >= 5
    assert stats.rejected >= 40
