"""Seconds per image on one CPU core: ``make bench-speed ARGS="--root runs/demo"``,
after ``pipelines/export.py demo``.

The student with its text encoder and without, by number of proposals, exported (in
float32 and in 8 bits) or not, beside Grounding DINO's tiny architecture (random
weights: time does not depend on them) on the same images, the cloud that taught it and
the latency of its API.

Each method has one thread. All take turns image by image, in an order drawn anew for
each, and what counts is the processor time of the process, so that what else runs on
the machine hardly matters; a ratio is the median over the rounds of both methods' times
in the same round, with its quartiles. Medians are printed as Markdown, the ratios with
what is asked of them, all figures as JSON last. The exit code is 1 if a ratio is less
than asked.
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

Work = Callable[[Image.Image], object]
WARM_UP = 3
DINO = "Grounding DINO tiny architecture, random weights"
EAGER, ONNX, INT8 = (
    "student, cached embeddings",
    "student, ONNX",
    "student, ONNX in 8 bits",
)
ASKED = {DINO: 10.0, EAGER: 1.5}
"""How many times faster than these the exported student, in float32, must be."""
GDINO_SIDE = 800
GDINO_TOKENS = 24


def student_works(
    root: str, proposals: Sequence[int]
) -> tuple[dict[str, Work], list[Image.Image]]:
    config = read_config(f"{root}/config.yaml")
    steps = build_steps(config)
    works: dict[str, Work] = {}
    for count in proposals:
        asked = ExportRequest(
            replace(config, detector=replace(config.detector, proposals_test=count)),
            RunOptions(root, None, False, False),
            "",
            (),
        )
        detector = load_student(asked, steps, {}).detector
        eager = StudentPredictor(config.classes, detector, detector.config)
        works[f"student, text encoder for each image, {count} proposals"] = with_text(
            eager
        )
        works[f"{EAGER}, {count} proposals"] = eager
        script = torchscript(detector)
        works[f"student, TorchScript, {count} proposals"] = (
            lambda image, script=script: script(_tensor(image))
        )
        model = onnx_model(detector, config.classes)
        works[f"{ONNX}, {count} proposals"] = OnnxStudent(model.SerializeToString())
        works[f"{INT8}, {count} proposals"] = OnnxStudent(
            int8_model(model, read_int8_images(steps["images"], root).training)
        )
    return works, read_compared_images(steps["images"], root)


def with_text(predictor: StudentPredictor) -> Work:
    def work(image: Image.Image) -> object:
        predictor.detector.cached_embeddings = None
        return predictor(image)

    return work


def _tensor(image: Image.Image) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image))


def grounding_dino() -> Work:
    """The tiny architecture with random weights, at the size its processor makes of a
    square image."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    model = GroundingDinoForObjectDetection(GroundingDinoConfig()).eval()
    words = torch.randint(2000, 20000, (1, GDINO_TOKENS))

    @torch.no_grad()
    def work(image: Image.Image) -> object:
        pixels = (
            _tensor(image.resize((GDINO_SIDE, GDINO_SIDE)))
            .permute(2, 0, 1)[None]
            .float()
            / 255
        )
        return model(pixel_values=pixels, input_ids=words)

    return work


@dataclass(frozen=True)
class Times:
    """Seconds of processor time of each method, by round."""

    seconds: dict[str, list[float]]

    def medians(self) -> dict[str, float]:
        return {
            name: statistics.median(values) for name, values in self.seconds.items()
        }

    def ratio(self, slow: str, fast: str) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of how many times ``fast`` is
        faster, in the rounds that have both."""
        found = sorted(
            a / b for a, b in zip(self.seconds[slow], self.seconds[fast], strict=False)
        )
        return (
            found[len(found) // 4],
            statistics.median(found),
            found[len(found) * 3 // 4],
        )


def measured(
    works: dict[str, Work],
    images: Sequence[Image.Image],
    rounds: int,
    rare: dict[str, int] | None = None,
) -> Times:
    """After a few images to warm up (TorchScript and caches); ``rare``: methods that
    take part in the first rounds only."""
    rounds_of = dict.fromkeys(works, rounds) | (rare or {})
    for name, work in works.items():
        for image in images[: WARM_UP if rounds_of[name] == rounds else 1]:
            work(image)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    order, names = random.Random(0), list(works)
    for number in range(rounds):
        order.shuffle(names)
        for name in names:
            if number < rounds_of[name]:
                start = time.process_time()
                works[name](images[number % len(images)])
                seconds[name].append(time.process_time() - start)
    return Times(seconds)


def cloud_seconds(
    images: Sequence[Image.Image], classes: Sequence[str], calls: int
) -> dict[str, float]:
    """The demo's cloud: its detector alone, and a call to its API with the latency that
    the demo pretends."""
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
            data = io.BytesIO()
            image.save(data, "JPEG", quality=95)
            body = {
                "image": {"b64": base64.b64encode(data.getvalue()).decode()},
                "classes": list(classes),
                "threshold": 0.05,
            }
            start = time.perf_counter()
            client.post(f"{url}/v1/detect", json=body).raise_for_status()
            seconds.append(time.perf_counter() - start)
    alone = measured(
        {"teacher": lambda image: teacher.detect(image, classes, 0.05)}, images, calls
    ).medians()["teacher"]
    name = f"one call to its API (emulated latency {config.serve_latency} s, loopback)"
    return {"the demo's cloud detector alone": alone, name: statistics.median(seconds)}


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
    asked = parser.parse_args()
    torch.set_num_threads(1)
    config = read_config(f"{asked.root}/config.yaml")
    own = config.detector.proposals_test
    works, images = student_works(asked.root, asked.proposals or sorted({10, own, 100}))
    if asked.gdino_rounds:
        works[DINO] = grounding_dino()
    times = measured(
        works,
        images,
        asked.rounds,
        {DINO: asked.gdino_rounds} if asked.gdino_rounds else None,
    )
    found = times.medians()
    print("| one core, one image | ms |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {1000 * value:.1f} |", flush=True)
    ratios = {count: compared(times, count) for count in asked.proposals or [own]}
    enough = all(
        by_name[name][1] >= least
        for by_name in ratios.values()
        for name, least in ASKED.items()
        if name in by_name
    )
    if config.cloud.serve == "demo":
        clouds = cloud_seconds(images, config.classes, min(asked.rounds, 20))
        found |= clouds
        print("| the cloud, one image | ms |\n|---|---|")
        for name, value in clouds.items():
            print(f"| {name} | {1000 * value:.1f} |")
    rounded = {name: round(value, 5) for name, value in found.items()}
    print(json.dumps({"seconds": rounded, "times_faster": ratios, "enough": enough}))
    return 0 if enough else 1


def compared(times: Times, proposals: int) -> dict[str, tuple[float, float, float]]:
    """How many times faster the exported student is, and how much its 8-bit file gains
    on it (``INT8``), printed and returned."""
    ratios = {}
    for name, least in ASKED.items():
        slow = name if name == DINO else f"{name}, {proposals} proposals"
        if slow in times.seconds:
            low, median, high = ratios[name] = times.ratio(
                slow, f"{ONNX}, {proposals} proposals"
            )
            print(
                f"exported, {proposals} proposals: {median:.2f} times faster than"
                f" {slow} (quartiles {low:.2f} to {high:.2f}; asked {least:g})"
            )
    exact, int8 = (f"{name}, {proposals} proposals" for name in (ONNX, INT8))
    low, median, high = ratios[INT8] = times.ratio(exact, int8)
    print(
        f"in 8 bits, {proposals} proposals: {median:.2f} times faster than {exact}"
        f" (quartiles {low:.2f} to {high:.2f})"
    )
    return ratios


if __name__ == "__main__":
    sys.exit(main())
