"""Training of transformers students with targets of a separation."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from builders import CLASSES, tiny_fit, training_batches

from coin_ray.config import Distill, Separate
from coin_ray.models.students.base import InputFormat
from coin_ray.models.students.transformers_student import TransformersStudent
from coin_ray.training.direct import TargetTraining, separation_targets
from tests.models.students.tiny_networks import SIDE, tiny_network

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()

FIT = tiny_fit(optimizer="adamw", lr=1e-3, warmup=0)


def _make_task(model_type: str) -> TargetTraining:
    network = tiny_network(model_type, len(CLASSES))
    input_format = InputFormat(
        SIDE, keep_ratio=False, multiple=1, std=(255.0, 255.0, 255.0)
    )
    return TargetTraining(
        TransformersStudent(network, input_format),
        separation_targets(Distill(student="d-fine-n", fusion="average"), Separate()),
        FIT,
        average_rate=0.25,
        frozen_norms=True,
    )


@pytest.mark.parametrize("model_type", ["d_fine", "lw_detr"])
def test_it_learns_and_the_average_follows_once_per_step(
    model_type: str, tmp_path: Path
) -> None:
    """Heads with several names are averaged once."""
    task = _make_task(model_type)
    start = copy.deepcopy(task.student.state_dict())
    states = []
    for step, batch in enumerate(training_batches(tmp_path, FIT)[:2]):
        losses = task.train_step(batch, step)
        assert {"class", "l1", "giou", "count_consistent"} <= set(losses)
        assert all(torch.isfinite(loss) for loss in losses.values())
        states.append(copy.deepcopy(task.student.state_dict()))
    average = task.average.state_dict()
    changed = 0
    for name, tensor in average.items():
        if "running_" in name:
            assert torch.equal(tensor, start[name])
        elif tensor.is_floating_point():
            expected = (states[0][name] + states[1][name]) / 2
            torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-6)
            changed += not torch.equal(states[1][name], start[name])
    assert changed > 100


def test_a_resumed_query_training_is_the_same(tmp_path: Path) -> None:
    batches = training_batches(tmp_path, FIT)[:2]
    task, resumed = _make_task("rt_detr_v2"), _make_task("rt_detr_v2")
    task.train_step(batches[0], 0)
    resumed.load_state_dict(copy.deepcopy(task.state_dict()))
    losses = []
    for each in (task, resumed):
        torch.manual_seed(7)  # noise of denoising queries
        losses.append(each.train_step(batches[1], 1))
    for name, loss in losses[0].items():
        assert torch.equal(loss, losses[1][name]), name
    expected = task.state_dict()["average"]
    for name, tensor in resumed.state_dict()["average"].items():
        assert torch.equal(tensor, expected[name])
