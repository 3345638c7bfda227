"""A step on two workers is the step on one: same global batch, same losses, same
weights."""

from __future__ import annotations

import socket
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

from coin_ray.config import TrainingConfig
from coin_ray.data.examples import iterate_batches
from coin_ray.parallel import all_sum, worker_count, worker_rank
from coin_ray.training import diagnosis
from coin_ray.training.distill import Distillation

EVEN = tiny_fit(steps=3, batch=4, optimizer="sgd", lr=0.01, warmup=0)
"""Plain SGD: Adam divides small gradients by themselves, so that rounding would decide
their sign."""
UNEVEN = replace(EVEN, batch=3)
"""The first worker has two images of three: as many workers train as there is room for.
"""


MEETINGS = {"faster-rcnn": 8, "surest share": 10, "co-detr": 11}
"""Messages of a step: workers wait for each other at each. Size of the images, counts,
trusted rows, gradients to be aligned, CKG's spread, its gradients, the student's,
prototypes; queries are counted by group; what is surest is found twice, before and
after CKG's step.
"""

MAKERS: dict[str, Callable[..., Distillation]] = {
    "faster-rcnn": distillation,
    "surest share": partial(distillation, fusion_share=0.5),
    "co-detr": detr_distillation,
}


def watched(message: str) -> Any:
    return mock.patch.object(dist, message, wraps=getattr(dist, message))


def train(folder: str, student: str, fit: TrainingConfig) -> dict[str, Any]:
    """Three steps of this worker's share; global losses and the final state."""
    torch.set_num_threads(1)
    task = MAKERS[student](fit, burn_up=1)
    losses, met = [], []
    source = iterate_batches(
        examples(Path(folder)),
        fit,
        tiny_config(),
        seed=2,
        first=0,
        rank=worker_rank(),
        workers=worker_count(),
    )
    for step, batch in enumerate(source):
        with watched("all_reduce") as sums, watched("all_gather_object") as gathers:
            parts = task.train_step(batch, step)
        met.append(sums.call_count + gathers.call_count)
        losses.append(
            {n: float(all_sum(v.detach().double())) for n, v in sorted(parts.items())}
        )
    return {"losses": losses, "state": task.state_dict(), "met": met}


CASES = [
    ("co-detr", EVEN),
    ("faster-rcnn", EVEN),
    ("faster-rcnn", UNEVEN),
    ("surest share", UNEVEN),
]


def worker(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    own = Path(folder) / f"images{rank}"
    own.mkdir()
    torch.save(
        [train(str(own), *case) for case in CASES], Path(folder) / f"worker{rank}.pt"
    )
    dist.barrier()
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def trained_by_two(
    tmp_path_factory: pytest.TempPathFactory,
) -> list[tuple[dict[str, Any], ...]]:
    """Of each case what either worker came to."""
    folder = tmp_path_factory.mktemp("two")
    multiprocessing.spawn(worker, (free_port(), str(folder)), nprocs=2)  # type: ignore[no-untyped-call]
    return list(
        zip(
            *(
                torch.load(folder / f"worker{rank}.pt", weights_only=True)
                for rank in range(2)
            ),
            strict=True,
        )
    )


@pytest.mark.parametrize(
    "case",
    range(len(CASES)),
    ids=[f"{student}, {fit.batch} images" for student, fit in CASES],
)
def test_two_workers_equal_one(
    case: int, trained_by_two: list[tuple[dict[str, Any], ...]], tmp_path: Path
) -> None:
    student, fit = CASES[case]
    both, alone = trained_by_two[case], train(str(tmp_path), student, fit)
    assert both[0]["losses"] == both[1]["losses"]
    assert both[0]["met"] == both[1]["met"]
    assert max(both[0]["met"]) <= MEETINGS[student]
    for step, (parts, wanted) in enumerate(
        zip(both[0]["losses"], alone["losses"], strict=True)
    ):
        assert parts == pytest.approx(wanted, abs=1e-5, rel=1e-5), f"step {step}"
    losses = {
        name: value
        for name, value in alone["losses"][-1].items()
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
        for key, wanted in alone["state"][name].items():
            for found in both:
                torch.testing.assert_close(
                    found["state"][name][key],
                    wanted,
                    atol=1e-5,
                    rtol=1e-5,
                    msg=lambda m, n=name, k=key: f"{n}.{k}: {m}",
                )
