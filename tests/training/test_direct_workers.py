"""A step with targets on two workers is the step on one: the same losses and weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from builders import CLASSES, examples, tiny_config, tiny_fit
from clusters import free_port

from coin_ray.config import Distill, Separate
from coin_ray.data.examples import iterate_batches
from coin_ray.models.students.yolox import YoloxStudent
from coin_ray.parallel import all_sum, worker_count, worker_rank
from coin_ray.training.ckg_targets import CkgTargetTraining
from coin_ray.training.direct import (
    StudentTraining,
    TargetTraining,
    separation_targets,
)

pytestmark = pytest.mark.slow

FIT = tiny_fit(steps=2, batch=3, optimizer="sgd", lr=0.01, warmup=0)
"""Three images on two workers: their shares differ."""


def _make_task(fusion: str) -> StudentTraining:
    torch.manual_seed(0)
    student = YoloxStudent("yolox-nano", len(CLASSES), 64)
    if fusion == "ckg":
        config = Distill(
            student="yolox-nano", fit=FIT, prototypes_from=0, teacher_rate=0.25
        )
        rules = Separate(iou_min=0.2, clip_score_min=0.0)
        return CkgTargetTraining(student, config, rules, tiny_config())
    return TargetTraining(
        student,
        separation_targets(Distill(student="yolox-nano", fusion="average"), Separate()),
        FIT,
        average_rate=0.25,
        frozen_norms=True,
    )


def _train(folder: Path, fusion: str) -> dict[str, Any]:
    torch.set_num_threads(1)
    task = _make_task(fusion)
    losses = []
    batches = iterate_batches(
        examples(folder),
        FIT,
        tiny_config(),
        seed=2,
        first=0,
        rank=worker_rank(),
        workers=worker_count(),
    )
    for step, batch in enumerate(batches):
        parts = task.train_step(batch, step)
        losses.append(
            {name: float(all_sum(v.detach().double())) for name, v in parts.items()}
        )
    return {"losses": losses, "state": task.state_dict()}


def _worker(rank: int, port: int, folder: str, fusion: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    images = Path(folder) / f"images{rank}"
    images.mkdir()
    torch.save(_train(images, fusion), Path(folder) / f"worker{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("fusion", ["average", "ckg"])
def test_two_workers_equal_one_for_yolox(tmp_path: Path, fusion: str) -> None:
    arguments = (free_port(), str(tmp_path), fusion)
    multiprocessing.spawn(_worker, arguments, nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (
        torch.load(tmp_path / f"worker{rank}.pt", weights_only=True)
        for rank in range(2)
    )
    alone = _train(tmp_path, fusion)
    assert first["losses"] == second["losses"]
    for parts, expected in zip(first["losses"], alone["losses"], strict=True):
        # a difference of nearly equal numbers: CKG's weights hardly depend on the box
        spreads = parts.pop("ckg_spread", 0), expected.pop("ckg_spread", 0)
        assert spreads[0] == pytest.approx(spreads[1], abs=1e-8)
        assert parts == pytest.approx(expected, rel=1e-4)
    for part in ("student", "average", *({"ckg", "region_head"} & set(first["state"]))):
        for name, tensor in alone["state"][part].items():
            assert torch.equal(first["state"][part][name], second["state"][part][name])
            torch.testing.assert_close(
                first["state"][part][name], tensor, rtol=1e-4, atol=1e-5
            )
