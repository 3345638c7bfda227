"""Boxes of several images, cut out and classified in batches of one size.

A box's probabilities do not depend on the boxes that share its batch: convolutions and
products of few rows take other paths on CPUs, with other rounding, so small batches are
filled up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ImageBoxes = tuple[Tensor, Tensor]
"""An image [3, H, W] uint8, and boxes [N, 4] in its pixels."""
PixelBox = Sequence[int]
"""Left, top, right and bottom."""
BATCH_MAX, BATCH_MIN = 64, 16
BATCH_PIXELS = 32 * 224**2
"""Pixels of a batch: memory does not grow with the boxes of an image."""
SIDE_MIN = 2
"""Pixels."""


def batch_size(crop_size: tuple[int, int]) -> int:
    """Return how many crops of this height and width are classified at once."""
    height, width = crop_size
    return max(1, min(BATCH_MAX, BATCH_PIXELS // (height * width)))


def classify_crops(
    images: Iterable[ImageBoxes],
    context: float,
    cut: Callable[[Tensor, PixelBox], Tensor],
    classify: Callable[[Tensor], Tensor],
    batch: int,
    num_columns: int,
) -> list[Tensor]:
    """Return the probabilities [N, C] of the boxes of each image.

    ``cut`` returns the crop [3, h, w] of a box, ``classify`` the probabilities [B, C] of
    at most ``batch`` crops [B, 3, h, w]. ``context``: side of a crop / side of its box.
    """
    counts, rows = [], []
    crops: list[Tensor] = []
    for image, boxes in images:
        counts.append(len(boxes))
        interleaved = _interleave(image)
        for box in pixel_boxes(image, boxes, context):
            crops.append(cut(interleaved, box))
            if len(crops) == batch:
                rows.append(classify(torch.stack(crops)))
                crops = []
    if crops:
        rows.append(_classify_filled(crops, classify, min(batch, BATCH_MIN)))
    probabilities = torch.cat(rows) if rows else torch.zeros(0, num_columns)
    return list(torch.split(probabilities, counts))


def _interleave(image: Tensor) -> Tensor:
    """Return the image [3, H, W] with the three numbers of a pixel beside each other in
    memory, as decoders give it: resizing is faster, and the same.
    """
    return image[None].contiguous(memory_format=torch.channels_last)[0]


def _classify_filled(
    crops: list[Tensor], classify: Callable[[Tensor], Tensor], smallest: int
) -> Tensor:
    """Classify crops, filled up to ``smallest`` with copies of the last one."""
    copies = [crops[-1]] * (smallest - len(crops))
    return classify(torch.stack([*crops, *copies]))[: len(crops)]


def pixel_boxes(image: Tensor, boxes: Tensor, context: float) -> list[list[int]]:
    """Return the boxes as whole pixels inside the image, at least 2 a side, with sides
    ``context`` times as long.
    """
    if not len(boxes):
        return []
    height, width = image.shape[1:]
    enlarged = enlarge_boxes(boxes, context, height, width).round().int().tolist()
    rows = []
    for x1, y1, x2, y2 in enlarged:
        left = min(max(x1, 0), width - SIDE_MIN)
        top = min(max(y1, 0), height - SIDE_MIN)
        rows.append([left, top, max(x2, left + SIDE_MIN), max(y2, top + SIDE_MIN)])
    return rows


def enlarge_boxes(boxes: Tensor, factor: float, height: int, width: int) -> Tensor:
    """Make the sides of ``boxes`` [N, 4] xyxy pixels ``factor`` times as long, around
    the same centres, and clip them to the image.
    """
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    half_size = (boxes[:, 2:] - boxes[:, :2]) * factor / 2
    top_left = (centre - half_size).clamp(min=0)
    image_size = boxes.new_tensor([width, height])
    bottom_right = torch.minimum(centre + half_size, image_size)
    return torch.cat([top_left, bottom_right], 1)


def sigmoid_class_probabilities(logits: Tensor, prior: float) -> Tensor:
    """Return the probabilities [N, K+1], background last, that a box holds one of the
    classes or none, from a sigmoid model's logits [N, K+1] for matching pairs.

    The model's sigmoid holds where a share ``prior`` of all pairs matches. Here exactly
    one class, the background text or nothing matches, each equally often: the odds of a
    match are those of the sigmoid times (1 - prior) / prior, and those of nothing are 1.
    """
    log_odds = logits + torch.logit(torch.tensor(1 - prior, dtype=logits.dtype))
    background = F.softplus(log_odds[:, -1:])  # the log of the odds + 1
    return torch.cat([log_odds[:, :-1], background], 1).softmax(-1)
