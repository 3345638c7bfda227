"""A detection API on this machine, in the reference wire format, with the manners and
the faults of a real one.

``python -m coin_ray.serving.local_cloud --serve demo --port 8080`` serves the demo's
detector, ``--serve onnx --models a.onnx b.onnx`` fused ONNX detectors, ``--serve
transformers --models NAME`` Grounding DINO or OWLv2, ``--serve checkpoint --models
FOLDER`` an exported student, or a Co-DETR's file. Faults are drawn from (seed, image,
how often it was asked), so a run repeats exactly.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import signal
from collections.abc import Sequence
from dataclasses import asdict
from types import FrameType
from typing import Literal, NoReturn, get_args

import psutil
import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

from coin_ray import storage
from coin_ray.data.canonical import PIXELS_MAX
from coin_ray.demo import detector as demo_detector
from coin_ray.demo.drawings import CLASSES
from coin_ray.errors import ConfigError
from coin_ray.predictors.onnx_detectors import Detector, Floats, load_detector
from coin_ray.serving.batching import BATCH_WAIT
from coin_ray.serving.fault_injection import Stats
from coin_ray.serving.launch import EMULATED
from coin_ray.serving.server import QUEUE_MAX, create_app
from coin_ray.serving.student import load_student

Serve = Literal["demo", "onnx", "transformers", "checkpoint"]


class DemoDetector:
    """The demo's stand-in for a cloud."""

    name = "demo"
    classes: Sequence[str] = CLASSES

    def __init__(self) -> None:
        self._model = demo_detector.load()

    def detect(
        self, image: Image.Image, classes: Sequence[str], score_min: float
    ) -> tuple[Floats, Floats]:
        """Boxes [N, 4] xyxy pixels and scores [N, len(classes)], best first."""
        boxes, scores = demo_detector.detect(self._model, image, score_min)
        scores = scores[:, [CLASSES.index(name) for name in classes]]
        kept = scores.amax(1) >= score_min
        return boxes[kept].numpy(), scores[kept].numpy()


def load(serve: Serve, models: Sequence[str]) -> Detector:
    """The detector to serve; ``models`` are ONNX files, or one name or folder. Raises
    ConfigError and InputError.
    """
    if serve == "demo":
        return DemoDetector()
    if serve == "onnx":
        return load_detector(models)
    if len(models) != 1:
        raise ConfigError(
            f"serve {serve} needs one model, a name or a folder; got {len(models)}"
        )
    if serve == "checkpoint":
        return load_student(models[0])
    from coin_ray.predictors.transformers_detectors import load_transformers

    return load_transformers(models[0])


class _Watch:
    """Tells the outside where the server is, and ends it with its parent."""

    def __init__(
        self, server: uvicorn.Server, stats: Stats, arguments: argparse.Namespace
    ) -> None:
        self._server = server
        self._stats = stats
        self._arguments = arguments
        self._parent = (
            psutil.Process(arguments.parent_pid) if arguments.parent_pid else None
        )

    async def run(self, url: str) -> None:
        while not self._server.started:
            await asyncio.sleep(0.02)
        if self._arguments.ready_file:
            storage.write_bytes(self._arguments.ready_file, url.encode())
        written = None
        while not self._server.should_exit:
            current = asdict(self._stats)
            if self._arguments.stats_file and current != written:
                storage.write_json(self._arguments.stats_file, current)
                written = current
            if self._parent is not None and _is_dead(self._parent):
                self._server.should_exit = True
            await asyncio.sleep(1)


def _is_dead(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def _serve(app: FastAPI, arguments: argparse.Namespace) -> None:
    config = uvicorn.Config(
        app,
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=2,
    )
    socket = config.bind_socket()
    server = uvicorn.Server(config)
    stats = app.state.cloud.stats
    watch = asyncio.create_task(
        _Watch(server, stats, arguments).run(
            f"http://{arguments.host}:{socket.getsockname()[1]}"
        )
    )
    signal.signal(signal.SIGTERM, _exit)
    try:
        await server.serve(sockets=[socket])
    finally:
        watch.cancel()
        if arguments.stats_file:
            storage.write_json(arguments.stats_file, asdict(stats))


def _exit(number: int, _: FrameType | None) -> NoReturn:
    """Where uvicorn hands a signal on after its orderly end; the default handler would
    skip the last statistics.
    """
    raise SystemExit(0 if number == signal.SIGTERM else 128 + number)


def _arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="coin_ray.serving.local_cloud", description=__doc__
    )
    parser.add_argument("--serve", choices=get_args(Serve), default="demo")
    parser.add_argument(
        "--models",
        nargs="*",
        default=[],
        help="ONNX files, a model on the hub, or a folder",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument(
        "--latency", type=float, default=0.0, help="seconds before each answer"
    )
    parser.add_argument(
        "--rate", type=float, default=math.inf, help="calls per second before 429"
    )
    parser.add_argument(
        "--faults", type=float, default=0.0, help="share of calls that fail"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--queue-max",
        type=int,
        default=QUEUE_MAX,
        help="calls that may wait for the detector before 503",
    )
    parser.add_argument(
        "--pixels-max",
        type=int,
        default=PIXELS_MAX,
        help="of an image, beyond which the answer is 413",
    )
    parser.add_argument(
        "--batch-wait",
        type=float,
        default=BATCH_WAIT,
        help="seconds that several waiting calls wait for a full batch",
    )
    parser.add_argument(
        "--token-env", help="name of the environment variable with the token to demand"
    )
    parser.add_argument("--ready-file", help="gets the URL once the server listens")
    parser.add_argument("--stats-file", help="gets the statistics every second")
    parser.add_argument(
        "--call-log", default="", help="gets one JSON line per received call"
    )
    parser.add_argument("--parent-pid", type=int, help="exit when this process does")
    return parser.parse_args(words)


def main() -> None:
    arguments = _arguments()
    if arguments.serve in EMULATED:
        torch.set_num_threads(1)
    detector = load(arguments.serve, arguments.models)
    token = os.environ[arguments.token_env] if arguments.token_env else None
    app = create_app(
        detector,
        latency=arguments.latency,
        rate=arguments.rate,
        faults=arguments.faults,
        token=token,
        seed=arguments.seed,
        call_log=arguments.call_log,
        queue_max=arguments.queue_max,
        batch_wait=arguments.batch_wait,
        pixels_max=arguments.pixels_max,
    )
    asyncio.run(_serve(app, arguments))


if __name__ == "__main__":
    main()
