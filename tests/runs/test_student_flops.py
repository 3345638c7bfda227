"""The operations of students that were detectors before, as planning counts them."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from coin_ray.config import Distill
from coin_ray.errors import ConfigError
from coin_ray.models.students.yolox_network import YOLOX_SIZES, YoloxNetwork
from coin_ray.runs.capacity import YOLOX_FLOPS, detector_student_flops


def _student_settings(name: str, side: int = 0) -> Distill:
    return Distill(student=name, fusion="average", student_side=side)


@pytest.mark.parametrize("name", ["yolox-nano", "yolox-tiny", "yolox-s"])
def test_published_operations_are_those_of_the_network(name: str) -> None:
    side, flops = YOLOX_FLOPS[name]
    assert side == YOLOX_SIZES[name].side
    with torch.device("meta"):
        network = YoloxNetwork(80, YOLOX_SIZES[name]).eval()
        counter = FlopCounterMode(display=False)
        with counter:
            network(torch.zeros(1, 3, side, side))
    assert counter.get_total_flops() == pytest.approx(flops, rel=0.06)


def test_a_smaller_input_takes_fewer_operations() -> None:
    released = detector_student_flops(_student_settings("yolox-s"))
    assert detector_student_flops(_student_settings("yolox-s", 320)) == released / 4


def test_unknown_operations_are_told() -> None:
    with pytest.raises(ConfigError, match="not of d-fine-n"):
        detector_student_flops(_student_settings("d-fine-n"))
