"""Measure seconds per image on one CPU core: ``make bench-speed ARGS="--root
runs/demo"``, after ``pipelines/export.py demo``.

The student with its text encoder and without, by number of proposals, exported (in
float32 and in 8 bits) or not, compared with Grounding DINO's tiny architecture (random
weights: time does not depend on them) on the same images, with the cloud that taught it
and with the latency of the cloud's API.

Each method has one thread. All take turns image by image, in an order drawn anew for
each image, and are measured in processor time of the process, which other programs
hardly change; a ratio is the median over the rounds of both methods' times in the same
round, with its quartiles. Medians are printed as Markdown, the ratios with the required
ones, all figures as JSON last. The exit code is 1 if a ratio is less than required.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from PIL import Image

from coin_ray.commands.arguments import RunOptions
from coin_ray.commands.export import (
    ExportRequest,
    load_student,
    read_compared_images,
    read_int8_images,
)
from coin_ray.config import Cloud
from coin_ray.config.yaml_files import read_config
from coin_ray.export.int8 import int8_model
from coin_ray.export.onnx_model import onnx_model
from coin_ray.export.torchscript import torchscript
from coin_ray.predictors.onnx_student import OnnxStudent
from coin_ray.predictors.student import StudentPredictor
from coin_ray.runs.graph import build_steps

Predict = Callable[[Image.Image], object]
WARM_UP = 3
DINO = "Grounding DINO tiny architecture, random weights"
EAGER, ONNX, INT8 = (
    "student, cached embeddings",
    "student, ONNX",
    "student, ONNX in 8 bits",
)
REQUIRED_RATIOS = {DINO: 10.0, EAGER: 1.5}
"""How many times faster than each of these the exported float32 student must be."""
GDINO_SIDE = 800
GDINO_TOKENS = 24


def student_predictors(
    root: str, proposals: Sequence[int]
) -> tuple[dict[str, Predict], list[Image.Image]]:
    config = read_config(f"{root}/config.yaml")
    steps = build_steps(config)
    predictors: dict[str, Predict] = {}
    for count in proposals:
        request = ExportRequest(
            replace(config, detector=replace(config.detector, proposals_test=count)),
            RunOptions(root, None, False, False),
            "",
            (),
        )
        detector = load_student(request, steps, {}).detector
        eager = StudentPredictor(config.classes, detector, detector.config)
        with_text = f"student, text encoder for each image, {count} proposals"
        predictors[with_text] = encode_text_each_time(eager)
        predictors[f"{EAGER}, {count} proposals"] = eager
        predictors[f"student, TorchScript, {count} proposals"] = partial(
            _run_script, torchscript(detector)
        )
        model = onnx_model(detector, config.classes)
        exact = OnnxStudent(model.SerializeToString())
        predictors[f"{ONNX}, {count} proposals"] = exact
        calibration_images = read_int8_images(steps["images"], root).training
        int8 = OnnxStudent(int8_model(model, calibration_images))
        predictors[f"{INT8}, {count} proposals"] = int8
    return predictors, read_compared_images(steps["images"], root)


def _run_script(script: Callable[[torch.Tensor], object], image: Image.Image) -> object:
    return script(_tensor(image))


def encode_text_each_time(predictor: StudentPredictor) -> Predict:
    def predict(image: Image.Image) -> object:
        predictor.detector.cached_embeddings = None
        return predictor(image)

    return predict


def _tensor(image: Image.Image) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image))


def grounding_dino() -> Predict:
    """Return the tiny architecture with random weights, at the size to which its processor
    resizes a square image."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    model = GroundingDinoForObjectDetection(GroundingDinoConfig()).eval()
    words = torch.randint(2000, 20000, (1, GDINO_TOKENS))

    @torch.no_grad()
    def predict(image: Image.Image) -> object:
        resized = _tensor(image.resize((GDINO_SIDE, GDINO_SIDE)))
        pixels = resized.permute(2, 0, 1)[None].float() / 255
        return model(pixel_values=pixels, input_ids=words)

    return predict


@dataclass(frozen=True)
class Times:
    """Seconds of processor time of each method, by round."""

    seconds: dict[str, list[float]]

    def medians(self) -> dict[str, float]:
        return {
            name: statistics.median(method_seconds)
            for name, method_seconds in self.seconds.items()
        }

    def ratio(self, slow: str, fast: str) -> tuple[float, float, float]:
        """Return lower quartile, median and upper quartile of the time of ``slow`` over that
        of ``fast``, in the rounds that have both."""
        pairs = zip(self.seconds[slow], self.seconds[fast], strict=False)
        ratios = sorted(slow_time / fast_time for slow_time, fast_time in pairs)
        lower, upper = ratios[len(ratios) // 4], ratios[len(ratios) * 3 // 4]
        return lower, statistics.median(ratios), upper


def time_methods(
    predictors: dict[str, Predict],
    images: Sequence[Image.Image],
    rounds: int,
    rounds_of_few: dict[str, int] | None = None,
) -> Times:
    """Time all methods in turn after a few images to warm up (TorchScript and caches).
    ``rounds_of_few``: rounds of the methods that take part in the first rounds only."""
    rounds_by_name = dict.fromkeys(predictors, rounds) | (rounds_of_few or {})
    for name, predict in predictors.items():
        warm_up = WARM_UP if rounds_by_name[name] == rounds else 1
        for image in images[:warm_up]:
            predict(image)
    seconds: dict[str, list[float]] = {name: [] for name in predictors}
    order, names = random.Random(0), list(predictors)
    for number in range(rounds):
        order.shuffle(names)
        for name in names:
            if number < rounds_by_name[name]:
                start = time.process_time()
                predictors[name](images[number % len(images)])
                seconds[name].append(time.process_time() - start)
    return Times(seconds)


def time_cloud(
    images: Sequence[Image.Image], classes: Sequence[str], calls: int
) -> dict[str, float]:
    """Return the median seconds of the demo's cloud: of its detector alone, and of a call to
    its API with the emulated latency."""
    import base64
    import io

    import httpx

    from coin_ray.serving.launch import local_cloud
    from coin_ray.serving.local_cloud import DemoDetector

    config = Cloud(serve="demo", serve_faults=0.0)
    teacher = DemoDetector()
    seconds: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        local_cloud(config, folder) as url,
        httpx.Client(timeout=60) as client,
    ):
        for image in images[:calls]:
            jpeg = io.BytesIO()
            image.save(jpeg, "JPEG", quality=95)
            body = {
                "image": {"b64": base64.b64encode(jpeg.getvalue()).decode()},
                "classes": list(classes),
                "threshold": 0.05,
            }
            start = time.perf_counter()
            client.post(f"{url}/v1/detect", json=body).raise_for_status()
            seconds.append(time.perf_counter() - start)
    detect: dict[str, Predict] = {
        "teacher": lambda image: teacher.detect(image, classes, 0.05)
    }
    detector_seconds = time_methods(detect, images, calls).medians()["teacher"]
    name = f"one call to its API (emulated latency {config.serve_latency} s, loopback)"
    return {
        "the demo's cloud detector alone": detector_seconds,
        name: statistics.median(seconds),
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default="runs/demo", help="a finished run")
    parser.add_argument(
        "--proposals",
        type=int,
        nargs="+",
        help="default: what the run's student has, and 10 and 100",
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--gdino-rounds", type=int, default=3, help="0: without Grounding DINO"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    config = read_config(f"{options.root}/config.yaml")
    run_proposals = config.detector.proposals_test
    proposals = options.proposals or sorted({10, run_proposals, 100})
    predictors, images = student_predictors(options.root, proposals)
    rounds_of_few = {}
    if options.gdino_rounds:
        predictors[DINO] = grounding_dino()
        rounds_of_few[DINO] = options.gdino_rounds
    times = time_methods(predictors, images, options.rounds, rounds_of_few)
    medians = times.medians()
    _print_milliseconds("one core, one image", medians)
    ratios = {
        count: print_ratios(times, count)
        for count in options.proposals or [run_proposals]
    }
    if config.cloud.serve == "demo":
        cloud_medians = time_cloud(images, config.classes, min(options.rounds, 20))
        medians |= cloud_medians
        _print_milliseconds("the cloud, one image", cloud_medians)
    rounded = {name: round(seconds, 5) for name, seconds in medians.items()}
    is_fast_enough = all(map(_is_fast_enough, ratios.values()))
    figures = {"seconds": rounded, "times_faster": ratios, "enough": is_fast_enough}
    print(json.dumps(figures))
    return 0 if is_fast_enough else 1


def _print_milliseconds(title: str, medians: dict[str, float]) -> None:
    print(f"| {title} | ms |\n|---|---|")
    for name, seconds in medians.items():
        print(f"| {name} | {1000 * seconds:.1f} |", flush=True)


def _is_fast_enough(ratios: dict[str, tuple[float, float, float]]) -> bool:
    """Whether the median of each required ratio that was measured is large enough."""
    return all(
        ratios[name][1] >= required
        for name, required in REQUIRED_RATIOS.items()
        if name in ratios
    )


def print_ratios(times: Times, proposals: int) -> dict[str, tuple[float, float, float]]:
    """Print and return how many times faster the exported student is, and its 8-bit file
    (``INT8``) compared with the float32 one."""
    exact, int8 = (f"{name}, {proposals} proposals" for name in (ONNX, INT8))
    ratios = {}
    for name, required in REQUIRED_RATIOS.items():
        slow = name if name == DINO else f"{name}, {proposals} proposals"
        if slow in times.seconds:
            low, median, high = ratios[name] = times.ratio(slow, exact)
            print(
                f"exported, {proposals} proposals: {median:.2f} times faster than"
                f" {slow} (quartiles {low:.2f} to {high:.2f}; required {required:g})"
            )
    low, median, high = ratios[INT8] = times.ratio(exact, int8)
    print(
        f"in 8 bits, {proposals} proposals: {median:.2f} times faster than {exact}"
        f" (quartiles {low:.2f} to {high:.2f})"
    )
    return ratios


if __name__ == "__main__":
    sys.exit(main())
