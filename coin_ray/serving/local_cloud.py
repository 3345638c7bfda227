"""A detection API on this machine, in the reference wire format, with the latency, rate
limit and faults of a remote one.

``--serve demo --port 8080`` serves the demo's detector, ``--serve onnx --models a.onnx
b.onnx`` fused ONNX detectors, ``--serve transformers --models NAME`` Grounding DINO,
SAM 3 and others of transformers, ``--serve checkpoint --models FOLDER`` an exported
student, or a Co-DETR's file.
Faults are drawn from (seed, image, number of attempts), so a run repeats exactly.
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
from coin_ray.predictors.scored_boxes import ScoredBoxes
from coin_ray.serving.batching import BATCH_WAIT
from coin_ray.serving.detectors import ServedDetector
from coin_ray.serving.fault_injection import CallStatistics
from coin_ray.serving.launch import EMULATED_CLOUDS, SECRET_PATH_VARIABLE
from coin_ray.serving.secret_path import SecretPath
from coin_ray.serving.server import create_app
from coin_ray.serving.service import QUEUE_MAX

ServeKind = Literal["demo", "onnx", "transformers", "checkpoint"]
START_POLL_SECONDS = 0.02
STATISTICS_SECONDS = 1.0
SHUTDOWN_SECONDS = 2


class DemoDetector:
    """The demo's stand-in for a cloud."""

    name = "demo"
    classes: Sequence[str] = CLASSES

    def __init__(self) -> None:
        self._model = demo_detector.load_demo_cloud()

    def detect(
        self, image: Image.Image, classes: Sequence[str], score_min: float
    ) -> ScoredBoxes:
        """Return boxes [N, 4] xyxy pixels and scores [N, len(classes)], best first."""
        boxes, all_scores = demo_detector.run_demo_cloud(self._model, image, score_min)
        scores = all_scores[:, [CLASSES.index(name) for name in classes]]
        above = scores.amax(1) >= score_min
        return boxes[above].numpy(), scores[above].numpy()


def load_served_detector(serve: ServeKind, models: Sequence[str]) -> ServedDetector:
    """Load the detector to serve; ``models`` are ONNX files, or one name or folder.
    Raises ConfigError and InputError.
    """
    if serve == "demo":
        return DemoDetector()
    if serve == "onnx":
        from coin_ray.predictors.onnx_detectors import load_onnx_detector

        return load_onnx_detector(models)
    if len(models) != 1:
        raise ConfigError(
            f"serve {serve} needs one model, a name or a folder; got {len(models)}"
        )
    if serve == "checkpoint":
        from coin_ray.serving.student import load_served_predictor

        return load_served_predictor(models[0])
    from coin_ray.predictors.transformers_detectors import load_transformers

    return load_transformers(models[0])


class _Supervisor:
    """Writes the server's URL and statistics to files, and stops it with its parent."""

    def __init__(
        self,
        server: uvicorn.Server,
        stats: CallStatistics,
        arguments: argparse.Namespace,
    ) -> None:
        self._server = server
        self._stats = stats
        self._ready_file: str | None = arguments.ready_file
        self._stats_file: str | None = arguments.stats_file
        parent: int | None = arguments.parent_pid
        self._parent = psutil.Process(parent) if parent else None

    async def run(self, url: str) -> None:
        while not self._server.started:
            await asyncio.sleep(START_POLL_SECONDS)
        if self._ready_file:
            storage.write_bytes(self._ready_file, url.encode())
        written: dict[str, int] | None = None
        while not self._server.should_exit:
            counts = asdict(self._stats)
            if self._stats_file and counts != written:
                storage.write_json(self._stats_file, counts)
                written = counts
            if self._parent is not None and _is_dead(self._parent):
                self._server.should_exit = True
            await asyncio.sleep(STATISTICS_SECONDS)


def _is_dead(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


async def _serve(app: FastAPI, arguments: argparse.Namespace) -> None:
    secret = os.environ.get(SECRET_PATH_VARIABLE)
    config = uvicorn.Config(
        SecretPath(app, secret) if secret else app,
        host=arguments.host,
        port=arguments.port,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    socket = config.bind_socket()
    server = uvicorn.Server(config)
    stats = app.state.service.stats
    url = f"http://{arguments.host}:{socket.getsockname()[1]}"
    supervisor = asyncio.create_task(_Supervisor(server, stats, arguments).run(url))
    # uvicorn catches both, also if SIGINT was ignored, as shells start jobs with "&"
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _exit_on_signal)
    try:
        await server.serve(sockets=[socket])
    finally:
        supervisor.cancel()
        if arguments.stats_file:
            storage.write_json(arguments.stats_file, asdict(stats))


def _exit_on_signal(number: int, _: FrameType | None) -> NoReturn:
    """Exit when uvicorn re-raises a signal after its orderly shutdown; the default
    handlers would skip the last statistics, or ignore Ctrl-C.
    """
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(0)


def _argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="coin-ray serve", description=__doc__)
    parser.add_argument("--serve", choices=get_args(ServeKind), default="demo")
    parser.add_argument(
        "--models",
        nargs="*",
        default=[],
        help="ONNX files, a model on the hub, or a folder",
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument(
        "--token-env", help="name of the environment variable with the token to demand"
    )
    _add_fault_options(parser)
    _add_limit_options(parser)
    _add_process_options(parser)
    return parser


def _add_fault_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--latency", type=float, default=0.0, help="seconds before each answer"
    )
    parser.add_argument(
        "--rate", type=float, default=math.inf, help="calls per second before 429"
    )
    parser.add_argument(
        "--faults", type=float, default=0.0, help="share of calls that fail"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the faults")


def _add_limit_options(parser: argparse.ArgumentParser) -> None:
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
        help="pixels of an image above which the answer is 413",
    )
    parser.add_argument(
        "--batch-wait",
        type=float,
        default=BATCH_WAIT,
        help="seconds that a partial batch waits for more calls",
    )


def _add_process_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ready-file", help="file to write the URL to once the server listens"
    )
    parser.add_argument(
        "--stats-file", help="file to write the statistics to every second"
    )
    parser.add_argument(
        "--call-log", default="", help="file to write one JSON line per call to"
    )
    parser.add_argument("--parent-pid", type=int, help="exit when this process does")


def main(argv: Sequence[str] | None = None) -> None:
    """Serve as the command line says until the process is told to stop."""
    arguments = _argument_parser().parse_args(argv)
    if arguments.serve in EMULATED_CLOUDS:
        torch.set_num_threads(1)
    detector = load_served_detector(arguments.serve, arguments.models)
    app = create_app(
        detector,
        latency=arguments.latency,
        rate=arguments.rate,
        faults=arguments.faults,
        token=token_from_environment(arguments.token_env),
        seed=arguments.seed,
        call_log=arguments.call_log,
        queue_max=arguments.queue_max,
        batch_wait=arguments.batch_wait,
        pixels_max=arguments.pixels_max,
    )
    asyncio.run(_serve(app, arguments))


def token_from_environment(variable: str | None) -> str | None:
    """Return the token that callers must send, None if no variable is named. Raises
    ConfigError if the variable is not set.
    """
    if not variable:
        return None
    token = os.environ.get(variable)
    if not token:
        raise ConfigError(
            f"the environment variable {variable}, which holds the token that callers"
            " must send (token_env), is not set on this machine"
        )
    return token


if __name__ == "__main__":
    main()
