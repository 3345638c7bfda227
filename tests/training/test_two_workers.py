"""A step on two workers is the step on one: same global batch, same losses, same
weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from builders import detr_distillation, distillation, examples, tiny_config, tiny_fit
from clusters import free_port

from coin_ray.config import TrainingConfig
from coin_ray.data.examples import iterate_batches
from coin_ray.parallel import all_sum, worker_count, worker_rank
from coin_ray.training import diagnosis
from coin_ray.training.distill import Distillation

pytestmark = pytest.mark.slow

EVEN = tiny_fit(steps=3, batch=4, optimizer="sgd", lr=0.01, warmup=0)
"""Plain SGD: Adam divides small gradients by themselves, so that rounding would decide
their sign."""
UNEVEN = replace(EVEN, batch=3)
"""The first worker has two images of three: as many workers train as there is room for.
"""


MESSAGES = {"faster-rcnn": 8, "surest share": 10, "co-detr": 11}
"""Messages of a step; workers wait for each other at each: size of the images, counts,
confident rows, gradients to be aligned, CKG's weight spread, its gradients, the
student's, prototypes; matched queries of each group; with ``fusion_share`` the threshold,
before and after CKG's step.
"""

MAKERS: dict[str, Callable[..., Distillation]] = {
    "faster-rcnn": distillation,
    "surest share": partial(distillation, fusion_share=0.5),
    "co-detr": detr_distillation,
}


def _count_calls(message: str) -> Any:
    return mock.patch.object(dist, message, wraps=getattr(dist, message))


def _train(folder: str, student: str, fit: TrainingConfig) -> dict[str, Any]:
    """Train three steps on this worker's share; returns global losses and the final
    state."""
    torch.set_num_threads(1)
    task = MAKERS[student](fit, burn_up=1)
    losses, message_counts = [], []
    batches = iterate_batches(
        examples(Path(folder)),
        fit,
        tiny_config(),
        seed=2,
        first=0,
        rank=worker_rank(),
        workers=worker_count(),
    )
    for step, batch in enumerate(batches):
        with (
            _count_calls("all_reduce") as sums,
            _count_calls("all_gather_object") as gathers,
        ):
            parts = task.train_step(batch, step)
        message_counts.append(sums.call_count + gathers.call_count)
        losses.append(
            {n: float(all_sum(v.detach().double())) for n, v in sorted(parts.items())}
        )
    return {"losses": losses, "state": task.state_dict(), "messages": message_counts}


CASES = [
    ("co-detr", EVEN),
    ("faster-rcnn", EVEN),
    ("faster-rcnn", UNEVEN),
    ("surest share", UNEVEN),
]


def _worker(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    image_folder = Path(folder) / f"images{rank}"
    image_folder.mkdir()
    outcomes = [_train(str(image_folder), *case) for case in CASES]
    torch.save(outcomes, Path(folder) / f"worker{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def trained_by_two(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[dict[str, Any], ...]]:
    """Train all cases on two workers; returns both workers' results of each case."""
    folder = tmp_path_factory.mktemp("two")
    arguments = (free_port(), str(folder))
    multiprocessing.spawn(_worker, arguments, nprocs=2)  # type: ignore[no-untyped-call]
    first, second = (
        torch.load(folder / f"worker{rank}.pt", weights_only=True) for rank in range(2)
    )
    return list(zip(first, second, strict=True))


@pytest.mark.parametrize(
    "case",
    range(len(CASES)),
    ids=[f"{student}, {fit.batch} images" for student, fit in CASES],
)
def test_two_workers_equal_one(
    case: int, trained_by_two: list[tuple[dict[str, Any], ...]], tmp_path: Path
) -> None:
    student, fit = CASES[case]
    by_two, by_one = trained_by_two[case], _train(str(tmp_path), student, fit)
    assert by_two[0]["losses"] == by_two[1]["losses"]
    assert by_two[0]["messages"] == by_two[1]["messages"]
    assert max(by_two[0]["messages"]) <= MESSAGES[student]
    for step, (parts, expected) in enumerate(
        zip(by_two[0]["losses"], by_one["losses"], strict=True)
    ):
        assert parts == pytest.approx(expected, abs=1e-5, rel=1e-5), f"step {step}"
    losses = {
        name: loss
        for name, loss in by_one["losses"][-1].items()
        if name not in diagnosis.NAMES
    }
    assert all(abs(v) > 1e-9 for v in losses.values()), "every loss is active"
    for name in (
        "student",
        "teacher",
        "ckg",
        "consistent_prototypes",
        "cloud_prototypes",
        "clip_prototypes",
    ):
        for key, expected in by_one["state"][name].items():
            for by_worker in by_two:
                torch.testing.assert_close(
                    by_worker["state"][name][key],
                    expected,
                    atol=1e-5,
                    rtol=1e-5,
                    msg=lambda m, n=name, k=key: f"{n}.{k}: {m}",
                )
