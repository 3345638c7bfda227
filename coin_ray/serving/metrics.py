"""Figures for Prometheus at ``/metrics``: requests by route and status, batches, the
queue, the model, and the process itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

ROUTES = (
    "/",
    "/v1/detect",
    "/v1/cloud",
    "/health",
    "/health/live",
    "/health/ready",
    "/stats",
    "/metrics",
    "/openapi.json",
)
SECONDS_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
IMAGES_BUCKETS = (1, 2, 4, 8, 16, 32)


class ServerMetrics:
    """One server's figures, in a registry of its own: several servers of one process
    don't mix.
    """

    def __init__(
        self, waiting: Callable[[], float], queue_max: int, ready: Callable[[], float]
    ) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._add_request_metrics()
        self._add_detector_metrics()
        self._add_model_metrics()
        self._gauge(
            "coin_queue_waiting", "Calls that wait for the detector"
        ).set_function(waiting)
        self._gauge(
            "coin_queue_max", "Waiting calls beyond which the answer is 503"
        ).set(queue_max)
        self._gauge(
            "coin_ready", "Whether the detector has answered one of the last images"
        ).set_function(ready)

    def _add_request_metrics(self) -> None:
        self.requests = Counter(
            "coin_requests",
            "Requests answered",
            ("route", "status"),
            registry=self._registry,
        )
        self.request_seconds = Histogram(
            "coin_request_seconds",
            "From request to answer",
            ("route",),
            buckets=SECONDS_BUCKETS,
            registry=self._registry,
        )

    def _add_detector_metrics(self) -> None:
        self.batch_images = Histogram(
            "coin_batch_images",
            "Images in a batch",
            buckets=IMAGES_BUCKETS,
            registry=self._registry,
        )
        self.detector_seconds = Counter(
            "coin_detector_seconds",
            "Seconds the detector worked",
            registry=self._registry,
        )

    def _add_model_metrics(self) -> None:
        self.model = Gauge(
            "coin_model",
            "1 for the model that answers",
            ("model",),
            registry=self._registry,
        )
        self.model_swaps = Counter(
            "coin_model_swaps",
            "Models put in place of another",
            registry=self._registry,
        )
        self.registry_errors = Counter(
            "coin_registry_errors",
            "Failed requests to the model registry",
            registry=self._registry,
        )

    def _gauge(self, name: str, description: str) -> Gauge:
        return Gauge(name, description, registry=self._registry)

    def set_model(self, name: str) -> None:
        self.model.clear()
        self.model.labels(name).set(1)

    def record_batch(self, images: int, seconds: float) -> None:
        self.batch_images.observe(images)
        self.detector_seconds.inc(seconds)

    def exposition(self) -> bytes:
        """Return all figures in the exposition format, version 0.0.4."""
        return generate_latest(self._registry)


class RequestMetricsMiddleware:
    """ASGI middleware that counts and times requests. Paths that are no route count
    together.
    """

    def __init__(self, app: ASGIApp, metrics: ServerMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        route = path if path in ROUTES else "other"
        status, started = 500, time.perf_counter()

        async def send_and_note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_and_note_status)
        finally:
            seconds = time.perf_counter() - started
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
