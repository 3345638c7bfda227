"""What two phrases and one negative for each class change: mAP50 of the demo's served
cloud on the test scenes.

The demo's cloud knows eight names. Here they are phrases of three wider classes, and the
two that are left are negatives: things that the cloud takes for a class.

    python tests/benchmarks/bench_class_prompts.py [--scenes 300]
"""

from __future__ import annotations

import argparse
import asyncio
import io
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

import torch

from coin_ray.cloud.detections import AnswerConverter
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.question_client import create_cloud_client
from coin_ray.config import ClassPrompt, Cloud, PipelineConfig
from coin_ray.config.presets import demo
from coin_ray.data.canonical import canonical_image
from coin_ray.demo.drawings import CLASSES, load_drawings
from coin_ray.demo.scenes import Artwork, Scene, compose
from coin_ray.evaluation.fusion_baselines import expand_to_all_classes
from coin_ray.evaluation.voc import average_precision
from coin_ray.serving.launch import start_services
from coin_ray.stages.collecting.governors import governors_for
from coin_ray.stages.images import SPLIT_SEEDS
from coin_ray.structures import Detections
from coin_ray.tables import Truth

PHRASES = {
    "animal": ("bird", "cat"),
    "plant": ("flower", "fruit"),
    "street": ("car", "person"),
}
NEGATIVES = {"animal": ("bug",), "plant": ("bug",), "street": ("house",)}
FIRST_NAMES = tuple(phrases[0] for phrases in PHRASES.values())


def _config(phrases: int, negatives: bool) -> PipelineConfig:
    prompts = tuple(
        ClassPrompt(
            name, asked[:phrases], negatives=NEGATIVES[name] if negatives else ()
        )
        for name, asked in PHRASES.items()
    )
    cloud = Cloud(
        serve="demo", serve_latency=0.0, serve_faults=0.0, serve_rate=1e5, rate=1e5
    )
    return replace(demo(), classes=tuple(PHRASES), class_prompts=prompts, cloud=cloud)


async def _detect(
    config: PipelineConfig, url: str, scenes: Sequence[Scene], folder: str
) -> tuple[dict[str, Detections], int]:
    journal = open_journal(folder)
    (governor,) = governors_for(config, [url], journal)
    client = create_cloud_client(config, config.cloud, url, journal, governor)
    images = []
    for scene in scenes:
        file = io.BytesIO()
        scene.image.save(file, "JPEG", quality=95)
        images.append(canonical_image(file.getvalue(), client.max_side))
    answers = await asyncio.gather(*(client.answer(image) for image in images))
    await client.aclose()
    converter = AnswerConverter(config)
    detections = {}
    for number, answer in enumerate(answers):
        converted = converter.convert(answer)
        detections[str(number)] = expand_to_all_classes(
            Detections(
                torch.from_numpy(converted.boxes),
                torch.from_numpy(converted.scores),
                torch.from_numpy(converted.labels),
                torch.from_numpy(converted.probs),
            )
        )
    return detections, sum(answer.calls for answer in answers)


def _truth(scenes: Sequence[Scene]) -> dict[str, Truth]:
    class_of_name = {
        name: k for k, phrases in enumerate(PHRASES.values()) for name in phrases
    }
    truth = {}
    for number, scene in enumerate(scenes):
        rows = [
            (box, class_of_name[CLASSES[label]])
            for box, label in zip(scene.boxes, scene.labels, strict=True)
            if CLASSES[label] in class_of_name
        ]
        boxes = torch.tensor([box.tolist() for box, _ in rows]).reshape(-1, 4)
        labels = torch.tensor([k for _, k in rows], dtype=torch.int64)
        truth[str(number)] = Truth(
            boxes, labels, torch.zeros(len(rows), dtype=torch.bool)
        )
    return truth


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenes", type=int, default=300)
    count = parser.parse_args().scenes
    drawings = [drawing for drawing in load_drawings() if drawing.share == "target"]
    artwork = Artwork.from_drawings(drawings)
    scenes = [
        compose(artwork, "target", SPLIT_SEEDS["test"] + number)
        for number in range(count)
    ]
    truth = _truth(scenes)
    with ExitStack() as services, tempfile.TemporaryDirectory() as folder:
        config = _config(2, negatives=True)
        (url,) = start_services(config.clouds, folder, services)
        for name, phrases, negatives in (
            ("one phrase", 1, False),
            ("two phrases", 2, False),
            ("two phrases, one negative", 2, True),
        ):
            config = _config(phrases, negatives)
            detections, calls = asyncio.run(
                _detect(config, url, scenes, f"{folder}/journal")
            )
            boxes = sum(len(found) for found in detections.values()) / count
            result = average_precision(detections, truth, len(PHRASES))
            print(
                f"{name:28} mAP50 {100 * (result.map or 0):5.1f}"
                f"  boxes/image {boxes:5.2f}  new calls {calls}"
            )


if __name__ == "__main__":
    main()
