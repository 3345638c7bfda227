"""``create_app``: the service's routes as an ASGI application, with its OpenAPI schema
at ``/openapi.json``.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from importlib.resources import files
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from coin_ray.data.canonical import PIXELS_MAX
from coin_ray.serving.batching import BATCH_WAIT
from coin_ray.serving.detectors import ServedDetector
from coin_ray.serving.fault_injection import FaultInjection
from coin_ray.serving.metrics import RequestMetricsMiddleware
from coin_ray.serving.service import QUEUE_MAX, DetectionService, ServiceLimits
from coin_ray.serving.teacher_proxy import TeacherProxy
from coin_ray.serving.wire import (
    DetectRequest,
    DetectResponse,
    Health,
    HttpProblem,
    openapi_responses,
)

if TYPE_CHECKING:
    from coin_ray.serving.champion import ChampionFollower

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src"
    " blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)
PAGE_HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
}
PROBLEM_STATUSES = (400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503)
REQUEST_SCHEMA = DetectRequest.model_json_schema(
    by_alias=True, ref_template="#/components/schemas/{model}"
)
REQUEST_DEFINITIONS = REQUEST_SCHEMA.pop("$defs")
REQUEST_BODY = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": REQUEST_SCHEMA}},
    }
}


def create_app(
    detector: ServedDetector,
    *,
    latency: float = 0.0,
    rate: float = math.inf,
    faults: float = 0.0,
    token: str | None = None,
    seed: int = 0,
    call_log: str = "",
    queue_max: int = QUEUE_MAX,
    batch_wait: float = BATCH_WAIT,
    pixels_max: int = PIXELS_MAX,
    champion: ChampionFollower | None = None,
    teacher_proxy: TeacherProxy | None = None,
) -> FastAPI:
    """Return the service as an ASGI application; its ``state.service`` is the
    ``DetectionService``.

    ``latency``, ``rate``, ``faults``, ``seed``: ``FaultInjection``; ``queue_max``,
    ``batch_wait``, ``pixels_max``: ``ServiceLimits``; ``token``, ``call_log``:
    ``DetectionService``; ``champion``: the registry to follow; ``teacher_proxy``: the
    cloud that the page asks too.
    """
    injection = FaultInjection(latency, rate, faults, seed)
    limits = ServiceLimits(queue_max, batch_wait, pixels_max)
    service = DetectionService(
        detector, injection, limits, token, call_log, teacher_proxy
    )

    app = FastAPI(
        title="coin_ray",
        version="1",
        lifespan=lambda _: _run_in_background(service, champion, teacher_proxy),
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(RequestMetricsMiddleware, metrics=service.metrics)
    _add_detection_routes(app, service)
    _add_health_routes(app, service)
    _add_page(app)
    # FastAPI keeps this document; references in REQUEST_SCHEMA must resolve in it
    app.openapi()["components"]["schemas"] |= REQUEST_DEFINITIONS
    app.add_exception_handler(HttpProblem, _problem_response)
    app.add_exception_handler(HTTPException, _problem_response)
    return app


@asynccontextmanager
async def _run_in_background(
    service: DetectionService,
    champion: ChampionFollower | None,
    teacher_proxy: TeacherProxy | None,
) -> AsyncIterator[None]:
    """Follow the champion while the server runs; close the teacher proxy at its end."""
    follower: asyncio.Task[None] | None = None
    if champion is not None:
        on_error = service.metrics.registry_errors.inc
        follower = asyncio.create_task(champion.follow(service.swap, on_error))
    yield
    if follower is not None:
        follower.cancel()
    if teacher_proxy is not None:
        await teacher_proxy.aclose()


def _add_detection_routes(app: FastAPI, service: DetectionService) -> None:
    problems = openapi_responses(*PROBLEM_STATUSES)

    @app.post(
        "/v1/detect",
        response_model=DetectResponse,
        responses=problems,
        openapi_extra=REQUEST_BODY,
    )
    async def detect(request: Request) -> Response:
        """Detect objects in one image."""
        return await service.detect(request)

    @app.post(
        "/v1/cloud",
        response_model=DetectResponse,
        responses=problems,
        openapi_extra=REQUEST_BODY,
    )
    async def ask_cloud(request: Request) -> Response:
        """Detect objects in one image with the configured cloud, for the classes it is
        configured for; a paid call, if it is new.
        """
        return await service.ask_cloud(request)


def _add_page(app: FastAPI) -> None:
    page = (files("coin_ray.serving") / "page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def drop_page() -> HTMLResponse:
        """Return the page on which images can be dropped."""
        return HTMLResponse(page, headers=PAGE_HEADERS)


async def _problem_response(_: Request, error: Exception) -> Response:
    if isinstance(error, HttpProblem):
        return error.response
    assert isinstance(error, HTTPException)
    headers = {
        name.replace("-", "_"): text for name, text in (error.headers or {}).items()
    }
    return HttpProblem(error.status_code, str(error.detail), **headers).response


def _add_health_routes(app: FastAPI, service: DetectionService) -> None:
    @app.get("/health", response_model=Health, responses=openapi_responses(401))
    async def health(request: Request) -> Response:
        """Return whether it is live and ready, its model and classes, and how many
        calls wait.
        """
        service.check_token(request)
        return JSONResponse(service.health())

    @app.get("/health/live", response_class=PlainTextResponse)
    async def live() -> PlainTextResponse:
        """Answer 200 while the server answers at all."""
        return PlainTextResponse("live")

    @app.get(
        "/health/ready",
        response_class=PlainTextResponse,
        responses=openapi_responses(503),
    )
    async def ready() -> PlainTextResponse:
        """Answer 200 unless the detector has failed on each of the last images."""
        if not service.queue.healthy:
            detail = "the detector has failed on each of the last images"
            raise HttpProblem(503, "not ready", detail, Retry_After="5")
        return PlainTextResponse("ready")

    @app.get("/stats")
    async def statistics() -> dict[str, int]:
        """Return counts of calls since the start."""
        return asdict(service.stats)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """Return all figures in Prometheus's format."""
        return Response(service.metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
