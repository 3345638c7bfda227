"""What Prometheus reads at ``/metrics``: requests by route and status, batches, the
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
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
IMAGES = (1, 2, 4, 8, 16, 32)


class Metrics:
    """One server's figures, in a registry of its own: several servers of one process
    don't mix.
    """

    def __init__(
        self, waiting: Callable[[], float], queue_max: int, ready: Callable[[], float]
    ) -> None:
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self.requests = Counter(
            "coin_requests",
            "Requests answered",
            ("route", "status"),
            registry=self._registry,
        )
        self.seconds = Histogram(
            "coin_request_seconds",
            "From request to answer",
            ("route",),
            buckets=SECONDS,
            registry=self._registry,
        )
        self.batches = Histogram(
            "coin_batch_images",
            "Images in a batch",
            buckets=IMAGES,
            registry=self._registry,
        )
        self.detecting = Counter(
            "coin_detector_seconds",
            "Seconds the detector worked",
            registry=self._registry,
        )
        self.model = Gauge(
            "coin_model",
            "1 for the model that answers",
            ("model",),
            registry=self._registry,
        )
        self.swaps = Counter(
            "coin_model_swaps",
            "Models put in place of another",
            registry=self._registry,
        )
        self.registry_errors = Counter(
            "coin_registry_errors",
            "Looks at the registry that failed",
            registry=self._registry,
        )
        Gauge(
            "coin_queue_waiting",
            "Calls that wait for the detector",
            registry=self._registry,
        ).set_function(waiting)
        Gauge(
            "coin_queue_max",
            "Waiting calls beyond which the answer is 503",
            registry=self._registry,
        ).set(queue_max)
        Gauge(
            "coin_ready",
            "Whether the detector has answered one of the last images",
            registry=self._registry,
        ).set_function(ready)

    def serves(self, model: str) -> None:
        self.model.clear()
        self.model.labels(model).set(1)

    def batch(self, images: int, seconds: float) -> None:
        self.batches.observe(images)
        self.detecting.inc(seconds)

    def text(self) -> bytes:
        """The exposition format, version 0.0.4."""
        return generate_latest(self._registry)


class Measured:
    """ASGI middleware that counts and times requests. Paths that are no route count
    together.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        route = path if path in ROUTES else "other"
        status, started = 500, time.perf_counter()

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.seconds.labels(route).observe(time.perf_counter() - started)
