"""The starting student as the second teacher: views chosen by confidence, and fused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from coin_ray.models.students.base import STUDENT_RENDERINGS
from coin_ray.models.students.detection import make_pixels, render_pixels
from coin_ray.models.students.yolox import YoloxStudent
from coin_ray.training import own_opinion
from coin_ray.training.own_opinion import OwnOpinion, choose_rendering, choose_views

SIDE = 64


class BrightSquares(YoloxStudent):
    """Detects one square, the surer the darker its middle, and surest at 96 pixels."""

    def detect_tensors(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        count, _, height, width = pixels.shape
        darkness = 1 - pixels[:, :, height // 4, width // 4].mean(1) / 255
        at_best_size = 1 - abs(width - 96) / 960
        box = torch.tensor([0.0, 0.0, 0.5, 0.5]) * width
        scores = torch.zeros(count, 1, self.num_classes)
        scores[:, 0, 1] = darkness * at_best_size
        return box.expand(count, 1, 4), scores


@pytest.fixture
def bright_student() -> YoloxStudent:
    return BrightSquares("yolox-nano", 2, SIDE).eval()


def _grey_images(value: int) -> list[Tensor]:
    return [torch.full((3, 50, 50), value, dtype=torch.uint8) for _ in range(2)]


@pytest.mark.parametrize(("value", "expected"), [(230, "inverted"), (30, "plain")])
def test_the_rendering_with_the_most_confidence_is_chosen(
    bright_student: YoloxStudent, value: int, expected: str
) -> None:
    rendering, measured = choose_rendering(bright_student, _grey_images(value))
    assert rendering == expected
    assert {view.rendering for view in measured} == set(STUDENT_RENDERINGS)


def test_plain_wins_unless_another_is_clearly_ahead(
    bright_student: YoloxStudent,
) -> None:
    assert choose_rendering(bright_student, _grey_images(129))[0] == "plain"


def test_the_most_confident_sizes_are_used_as_they_are_and_mirrored(
    bright_student: YoloxStudent,
) -> None:
    opinion, measured = choose_views(bright_student, _grey_images(30))
    assert [view.side for view in measured] == [32, 64, 96]
    assert [view.side for view in opinion.views] == [96, 96, 64, 64, 32, 32]
    assert [view.mirrored for view in opinion.views[:2]] == [False, True]


def test_opinions_of_all_views_are_fused_in_the_frame_of_the_image(
    bright_student: YoloxStudent,
) -> None:
    opinion, _ = choose_views(bright_student, _grey_images(30))
    [detections, _] = opinion.predict(_grey_images(30))
    assert detections.labels.tolist() == [1, 1]  # the left one, and the mirrored one
    left, right = detections.boxes[detections.boxes[:, 0].argsort()]
    assert left.tolist() == pytest.approx([0, 0, 25, 25])
    assert right.tolist() == pytest.approx([25, 0, 50, 25])
    assert float(detections.scores.max()) < 0.5  # half of the views see either


def test_views_and_rendering_travel_with_the_weights(
    bright_student: YoloxStudent,
) -> None:
    bright_student.set_rendering("inverted")
    opinion, _ = choose_views(bright_student, _grey_images(230))
    other = OwnOpinion(YoloxStudent("yolox-nano", 2, SIDE))
    other.load_state_dict(opinion.state_dict())
    assert other.views == opinion.views
    assert other.student.input_format.rendering == "inverted"


def test_renderings() -> None:
    pixels = torch.tensor([100.0, 200.0, 50.0]).view(1, 3, 1, 1)
    brightness = 0.299 * 100 + 0.587 * 200 + 0.114 * 50
    assert render_pixels(pixels, "plain").flatten().tolist() == [100, 200, 50]
    grey = render_pixels(pixels, "grey").flatten().tolist()
    assert grey == pytest.approx([brightness] * 3)
    inverted = render_pixels(pixels, "inverted").flatten().tolist()
    assert inverted == pytest.approx([255 - brightness] * 3)


def test_a_student_renders_what_it_is_shown() -> None:
    bright_student = YoloxStudent("yolox-nano", 2, SIDE)
    bright_student.set_rendering("inverted")
    image = torch.full((3, SIDE, SIDE), 200, dtype=torch.uint8)
    pixels = make_pixels([image], (SIDE, SIDE), bright_student.input_format)
    assert pixels.unique().tolist() == pytest.approx([55.0])


def test_sides_are_multiples_of_the_stride() -> None:
    assert own_opinion._round_side(416 * 2 / 3) == 288
    assert own_opinion._round_side(10) == 32
