from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.ops import roi_align

from coin_ray.models.faster_rcnn_clip import pooling

STRIDE = 16


def _box(draw: st.DrawFn, width: int, height: int) -> list[float]:
    """Anywhere in and around a map of this many cells; also empty and inside out."""
    x = st.floats(-3 * STRIDE, (width + 3) * STRIDE, width=32)
    y = st.floats(-3 * STRIDE, (height + 3) * STRIDE, width=32)
    return [draw(x), draw(y), draw(x), draw(y)]


@st.composite
def _case(draw: st.DrawFn) -> tuple[Tensor, list[Tensor], int, int]:
    width, height = draw(st.integers(1, 9)), draw(st.integers(1, 9))
    boxes = [
        torch.tensor(
            [_box(draw, width, height) for _ in range(draw(st.integers(0, 3)))]
        ).reshape(-1, 4)
        for _ in range(2)
    ]
    features = torch.randn(
        2,
        3,
        height,
        width,
        generator=torch.Generator().manual_seed(draw(st.integers(0, 99))),
    )
    return features, boxes, draw(st.integers(1, 5)), draw(st.integers(1, 3))


def _on_the_edge(boxes: Tensor, shape: torch.Size, count: int) -> bool:
    """Whether a sample lies where roi_align jumps to zero, a cell outside the map:
    there the last bit of its place decides."""
    steps = (torch.arange(count) + 0.5) / count
    jumps = [(-1.0, float(size)) for size in shape]
    for axis, ends in zip((1, 0), jumps, strict=True):
        start, end = (boxes[:, axis + side] / STRIDE - 0.5 for side in (0, 2))
        places = start[:, None] + (end - start)[:, None] * steps
        if any(bool(((places - edge).abs() < 1e-4).any()) for edge in ends):
            return True
    return False


def test_on_the_edge_itself_either_side_is_right() -> None:
    """A box from 80 to 0 on a map of two cells: its middle sample lies at 2 or a bit
    beyond."""
    features, boxes = torch.ones(1, 1, 1, 2), torch.tensor([[80.0, 0, 0, 0]])
    assert _on_the_edge(boxes, features.shape[2:], 3)
    pooled = pooling.pool_regions(features, [boxes], 3, STRIDE, 1)[0, 0, 0]
    assert pooled[[0, 2]].tolist() == [0, 1]
    assert float(pooled[1]) in (0.0, 1.0)


@given(_case())
def test_the_product_is_roi_align(
    given_case: tuple[Tensor, list[Tensor], int, int],
) -> None:
    features, boxes, side, samples = given_case
    assume(
        not any(
            _on_the_edge(image_boxes, features.shape[2:], side * samples)
            for image_boxes in boxes
        )
    )
    expected = roi_align(features, boxes, side, 1 / STRIDE, samples, aligned=True)
    torch.testing.assert_close(
        pooling.pool_regions(features, boxes, side, STRIDE, samples),
        expected,
        atol=1e-4,
        rtol=1e-4,
    )


def test_gradients_are_those_of_roi_align() -> None:
    boxes = [
        torch.tensor([[3.0, 5, 90, 70], [0, 0, 16, 16]]),
        torch.tensor([[20.0, 8, 128, 128]]),
    ]
    gradients = []
    for pool in (
        lambda f: pooling.pool_regions(f, boxes, 4, STRIDE, 2),
        lambda f: roi_align(f, boxes, 4, 1 / STRIDE, 2, aligned=True),
    ):
        features = torch.randn(
            2, 5, 8, 8, generator=torch.Generator().manual_seed(0)
        ).requires_grad_()
        (pool(features) ** 2).sum().backward()
        gradients.append(features.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-4, rtol=1e-4)


def test_large_maps_and_adaptive_sampling_use_the_operator() -> None:
    features, boxes = torch.randn(1, 2, 40, 40), [torch.tensor([[10.0, 10, 600, 500]])]
    for samples in (0, 2):
        expected = roi_align(features, boxes, 3, 1 / STRIDE, samples, aligned=True)
        assert torch.equal(
            pooling.pool_regions(features, boxes, 3, STRIDE, samples), expected
        )
