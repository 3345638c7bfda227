"""Seconds per image on one CPU core: ``make bench-speed ARGS="--root runs/demo"``, after ``pipelines/export.py demo``.

The student with its text encoder and without, by number of proposals, exported or not, beside Grounding DINO's tiny architecture (random
weights: time does not depend on them) on the same images, the cloud that taught it and the latency of its API. All methods take turns
image by image, so that what else runs on the machine meets all of them; the median of each is printed as Markdown, all figures as JSON last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from PIL import Image

from coin_ray.cli import Options
from coin_ray.config import Cloud
from coin_ray.configfile import from_yaml
from coin_ray.export.command import Request, compared_images, load_student
from coin_ray.export.onnx_model import onnx_model
from coin_ray.export.torchscript import torchscript
from coin_ray.pipeline import graph
from coin_ray.serving.exported import Predictor
from coin_ray.serving.onnx_student import OnnxStudent

Work = Callable[[Image.Image], object]
GDINO_SIDE = 800
GDINO_TOKENS = 24


def student_works(root: str, proposals: Sequence[int]) -> tuple[dict[str, Work], list[Image.Image]]:
    config = from_yaml(f"{root}/config.yaml")
    steps = graph(config)
    works: dict[str, Work] = {}
    for count in proposals:
        asked = Request(replace(config, detector=replace(config.detector, proposals_test=count)), Options(root, None, False, False), "", ())
        detector = load_student(asked, steps, {}).detector
        eager = Predictor(config.classes, detector, detector.config)
        works[f"student, text encoder for each image, {count} proposals"] = with_text(eager)
        works[f"student, cached embeddings, {count} proposals"] = eager
        script = torchscript(detector)
        works[f"student, TorchScript, {count} proposals"] = lambda image, script=script: script(_tensor(image))
        works[f"student, ONNX, {count} proposals"] = OnnxStudent(onnx_model(detector, config.classes).SerializeToString())
    return works, compared_images(steps["images"], root)


def with_text(predictor: Predictor) -> Work:
    def work(image: Image.Image) -> object:
        predictor.detector.cached_embeddings = None
        return predictor(image)

    return work


def _tensor(image: Image.Image) -> torch.Tensor:
    import numpy as np

    return torch.from_numpy(np.array(image))


def grounding_dino() -> Work:
    """The tiny architecture with random weights, at the size its processor makes of a square image."""
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection

    model = GroundingDinoForObjectDetection(GroundingDinoConfig()).eval()
    words = torch.randint(2000, 20000, (1, GDINO_TOKENS))

    @torch.no_grad()
    def work(image: Image.Image) -> object:
        pixels = _tensor(image.resize((GDINO_SIDE, GDINO_SIDE))).permute(2, 0, 1)[None].float() / 255
        return model(pixel_values=pixels, input_ids=words)

    return work


def measured(works: dict[str, Work], images: Sequence[Image.Image], rounds: int) -> dict[str, float]:
    """Median seconds of each, after two images to warm up (TorchScript and caches)."""
    for work in works.values():
        for image in images[:3]:
            work(image)
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name, work in works.items():
            start = time.perf_counter()
            work(images[number % len(images)])
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def cloud_seconds(images: Sequence[Image.Image], classes: Sequence[str], calls: int) -> dict[str, float]:
    """The demo's cloud: its detector alone, and a call to its API with the latency that the demo pretends."""
    import base64
    import io

    import httpx

    from coin_ray.serving.launch import local_cloud
    from coin_ray.serving.local_cloud import DemoDetector

    config = Cloud(serve="demo", serve_faults=0.0)
    teacher = DemoDetector()
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as folder, local_cloud(config, folder) as url, httpx.Client(timeout=60) as client:
        for image in images[:calls]:
            data = io.BytesIO()
            image.save(data, "JPEG", quality=95)
            body = {"image": {"b64": base64.b64encode(data.getvalue()).decode()}, "classes": list(classes), "threshold": 0.05}
            start = time.perf_counter()
            client.post(f"{url}/v1/detect", json=body).raise_for_status()
            seconds.append(time.perf_counter() - start)
    alone = measured({"teacher": lambda image: teacher.detect(image, classes, 0.05)}, images, calls)["teacher"]
    name = f"one call to its API (emulated latency {config.serve_latency} s, loopback)"
    return {"the demo's cloud detector alone": alone, name: statistics.median(seconds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="runs/demo", help="a finished run")
    parser.add_argument("--proposals", type=int, nargs="+", default=[10, 40, 100])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--gdino-rounds", type=int, default=3, help="0: without Grounding DINO")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    works, images = student_works(asked.root, asked.proposals)
    found = measured(works, images, asked.rounds)
    config = from_yaml(f"{asked.root}/config.yaml")
    if config.cloud.serve == "demo":
        found |= cloud_seconds(images, config.classes, min(asked.rounds, 20))
    if asked.gdino_rounds:
        dino = grounding_dino()
        seconds = []
        for image in images[: asked.gdino_rounds]:
            start = time.perf_counter()
            dino(image)
            seconds.append(time.perf_counter() - start)
        found["Grounding DINO tiny architecture, random weights"] = statistics.median(seconds)
    print("| one core, one image | ms |\n|---|---|")
    for name, value in found.items():
        print(f"| {name} | {1000 * value:.1f} |")
    print(json.dumps({name: round(value, 5) for name, value in found.items()}))


if __name__ == "__main__":
    main()
