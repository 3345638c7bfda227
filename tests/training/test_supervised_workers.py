"""A step on two workers is the step on one, where images are equally large (group norms
see the padding) and nothing is drawn at random."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from builders import CLASSES, detections
from clusters import free_port
from PIL import Image

from coin_ray.config import Detector
from coin_ray.config.co_detr import Backbone, tiny
from coin_ray.config.detector_presets import small
from coin_ray.data.examples import Example, iterate_batches
from coin_ray.parallel import all_sum, worker_count, worker_rank
from coin_ray.stages.train_detector import build_supervised_task
from coin_ray.structures import Detections

pytestmark = pytest.mark.slow

FIT = replace(
    small().fit,
    steps=3,
    batch=4,
    optimizer="sgd",
    lr=1e-3,
    warmup=0,
    clip_gradient=None,
)
CONFIG = replace(
    small(),
    classes=CLASSES,
    backbone=Backbone("tiny"),
    fit=FIT,
    average=0.9,
    co_detr=tiny(auxiliary=("atss",), max_positives=300),
)


def _examples(folder: Path) -> list[Example]:
    draw = np.random.default_rng(3)
    labelled_examples = []
    for number in range(6):
        uri = folder / f"{number}.png"
        Image.fromarray(draw.integers(0, 255, (64, 64, 3), np.uint8)).save(uri)
        labels = (
            detections(((4, 4, 40, 44), number % 3, 1.0), ((30, 20, 60, 60), 1, 1.0))
            if number
            else Detections.empty(3)
        )
        labelled_examples.append(
            Example(
                str(number),
                str(uri),
                {"labels": labels, "ignored": Detections.empty(3)},
            )
        )
    return labelled_examples


def _train(folder: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    task = build_supervised_task(CONFIG, FIT, epoch=2)
    losses = []
    views = Detector(short_side=64, long_side=64)
    source = iterate_batches(
        _examples(Path(folder)),
        FIT,
        views,
        seed=2,
        first=0,
        rank=worker_rank(),
        workers=worker_count(),
    )
    for step, batch in enumerate(source):
        parts = task.train_step(batch, step)
        losses.append({n: float(all_sum(v.double())) for n, v in sorted(parts.items())})
    return {"losses": losses, "weights": task.final_model.state_dict()}


def _worker(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    image_folder = Path(folder) / f"images{rank}"
    image_folder.mkdir()
    torch.save(_train(str(image_folder)), Path(folder) / f"worker{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_supervised_workers_equal_one(tmp_path: Path) -> None:
    arguments = (free_port(), str(tmp_path))
    multiprocessing.spawn(_worker, arguments, nprocs=2)  # type: ignore[no-untyped-call]
    alone = _train(str(tmp_path))
    for rank in range(2):
        by_worker = torch.load(tmp_path / f"worker{rank}.pt", weights_only=True)
        for step, (parts, expected) in enumerate(
            zip(by_worker["losses"], alone["losses"], strict=True)
        ):
            assert parts == pytest.approx(expected, abs=1e-4, rel=1e-4), f"step {step}"
        for name, tensor in alone["weights"].items():
            torch.testing.assert_close(
                by_worker["weights"][name],
                tensor,
                atol=1e-4,
                rtol=1e-4,
                msg=lambda m, n=name: f"{n}: {m}",
            )
