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

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from coin_ray.data.canonical import PIXELS_MAX
from coin_ray.predictors.onnx_detectors import Detector
from coin_ray.serving.batching import BATCH_WAIT
from coin_ray.serving.champion import Champion
from coin_ray.serving.fault_injection import Manners
from coin_ray.serving.metrics import Measured
from coin_ray.serving.service import LocalCloud
from coin_ray.serving.teacher_proxy import CloudBeside
from coin_ray.serving.wire import DetectAnswer, DetectCall, Health, Problem, documented

QUEUE_MAX = 256
PAGE_RULES = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src"
    " blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)

QUESTION = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {"schema": DetectCall.model_json_schema(by_alias=True)}
        },
    }
}


def create_app(
    detector: Detector,
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
    champion: Champion | None = None,
    beside: CloudBeside | None = None,
) -> FastAPI:
    """The service as an ASGI application; its ``state.cloud`` is the ``LocalCloud``.

    ``latency``, ``rate``, ``faults``, ``seed``: ``Manners``; ``call_log``: file that
    gets one JSON line per received call; ``queue_max``: calls that may wait for the
    detector before 503; ``batch_wait``: seconds that several waiting calls, fewer than
    a batch, wait for others; ``pixels_max``: of an image; ``champion``: the registry to
    follow; ``beside``: the cloud that the page asks too.
    """
    manners = Manners(latency, rate, faults, seed)
    cloud = LocalCloud(
        detector, manners, token, call_log, queue_max, batch_wait, pixels_max, beside
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        following = (
            asyncio.create_task(
                champion.follow(cloud.swap, cloud.metrics.registry_errors.inc)
            )
            if champion is not None
            else None
        )
        yield
        if following is not None:
            following.cancel()
        if beside is not None:
            await beside.aclose()

    app = FastAPI(
        title="coin_ray", version="1", lifespan=lifespan, docs_url=None, redoc_url=None
    )
    app.state.cloud = cloud
    app.add_middleware(Measured, metrics=cloud.metrics)
    _add_routes(app, cloud)
    return app


def _add_routes(app: FastAPI, cloud: LocalCloud) -> None:
    async def detect(request: Request) -> Response:
        """Objects in one image."""
        return await cloud.detect(request)

    async def ask_cloud(request: Request) -> Response:
        """What the configured cloud says of the image, about the classes it is
        configured for; a paid call, if it is new.
        """
        return await cloud.ask_cloud(request)

    refusals = documented(400, 401, 403, 404, 408, 413, 415, 422, 429, 500, 503)
    app.post(
        "/v1/detect",
        response_model=DetectAnswer,
        responses=refusals,
        openapi_extra=QUESTION,
    )(detect)
    app.post(
        "/v1/cloud",
        response_model=DetectAnswer,
        responses=refusals,
        openapi_extra=QUESTION,
    )(ask_cloud)
    _add_health(app, cloud)
    page = (files("coin_ray.serving") / "page.html").read_text(encoding="utf-8")

    @app.get("/", response_class=HTMLResponse)
    async def drop_page() -> HTMLResponse:
        """A page to drop an image on."""
        return HTMLResponse(
            page,
            headers={
                "Content-Security-Policy": PAGE_RULES,
                "X-Content-Type-Options": "nosniff",
            },
        )

    async def problem(_: Request, error: Exception) -> Response:
        if isinstance(error, Problem):
            return error.response
        assert isinstance(error, HTTPException)
        headers = {
            name.replace("-", "_"): value
            for name, value in (error.headers or {}).items()
        }
        return Problem(error.status_code, str(error.detail), **headers).response

    app.add_exception_handler(Problem, problem)
    app.add_exception_handler(HTTPException, problem)


def _add_health(app: FastAPI, cloud: LocalCloud) -> None:
    @app.get("/health", response_model=Health, responses=documented(401))
    async def health(request: Request) -> Response:
        """Whether it lives and is ready, its model and classes, and how many calls
        wait.
        """
        cloud.check_token(request)
        return JSONResponse(cloud.health())

    @app.get("/health/live", response_class=PlainTextResponse)
    async def live() -> PlainTextResponse:
        """200 while the server answers at all."""
        return PlainTextResponse("live")

    @app.get(
        "/health/ready", response_class=PlainTextResponse, responses=documented(503)
    )
    async def ready() -> PlainTextResponse:
        """200 unless the detector has failed in each of the last images."""
        if not cloud.queue.healthy:
            raise Problem(
                503,
                "not ready",
                "the detector has failed in each of the last images",
                Retry_After="5",
            )
        return PlainTextResponse("ready")

    @app.get("/stats")
    async def statistics() -> dict[str, int]:
        """Calls since the start."""
        return asdict(cloud.stats)

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(cloud.metrics.text(), media_type=CONTENT_TYPE_LATEST)
