"""Classification of boxes with CLIP: on RoI features of the whole image (one pass), or
on crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align
from torchvision.transforms.v2.functional import normalize, resize, resized_crop

from coin_ray.clip.encoder import ClipModel, class_embeddings
from coin_ray.config import Clip


class RoiLabeler:
    """Classifies boxes on the whole image: stages 1-3, RoIAlign on the exact boxes,
    stage 4, attention pooling, class probabilities (paper section 3.2).
    """

    def __init__(
        self,
        clip: ClipModel,
        classes: Sequence[str],
        config: Clip,
        short_side: int,
        long_side: int,
    ) -> None:
        self.clip = clip
        self.short_side = short_side
        self.long_side = long_side
        visual: Any = clip.network.visual
        visual.to(memory_format=torch.channels_last)
        self.embeddings = class_embeddings(clip, classes, config)

    @torch.no_grad()
    def __call__(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Return the probabilities [N, K+1] of ``boxes`` [N, 4], in pixels of ``image``
        [3, H, W] uint8.
        """
        if not len(boxes):
            return torch.zeros(0, len(self.embeddings))
        image, boxes = image.to(self.clip.device), boxes.to(self.clip.device)
        resized = resize(image, [self.short_side], max_size=self.long_side)
        x_factor = resized.shape[2] / image.shape[2]
        y_factor = resized.shape[1] / image.shape[1]
        boxes = boxes * boxes.new_tensor([x_factor, y_factor]).repeat(2)
        pixels = _normalise_pixels(resized, self.clip)[None]
        pixels = pixels.contiguous(memory_format=torch.channels_last)
        visual: Any = self.clip.network.visual
        maps = visual.stem(pixels)
        for stage in (visual.layer1, visual.layer2, visual.layer3):
            maps = stage(maps)
        side = self.clip.roi_size
        pooled = roi_align(maps, [boxes], side, 1 / 16, -1, aligned=True)
        features = attention_pool(visual.attnpool, visual.layer4(pooled))
        return _classify(self.clip, features, self.embeddings)


class CropLabeler:
    """Classifies crops of the boxes, stretched to CLIP's input size and encoded one by
    one.

    ``context``: side of the crop / side of the box.
    """

    def __init__(
        self,
        clip: ClipModel,
        classes: Sequence[str],
        config: Clip,
        context: float = 1.0,
    ) -> None:
        self.clip = clip
        self.context = context
        self.embeddings = class_embeddings(clip, classes, config)

    @torch.no_grad()
    def __call__(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Return the probabilities [N, K+1] of ``boxes`` [N, 4], in pixels of ``image``
        [3, H, W] uint8.
        """
        if not len(boxes):
            return torch.zeros(0, len(self.embeddings))
        height, width = image.shape[1:]
        enlarged = enlarge_boxes(boxes, self.context, height, width)
        crops = torch.stack(
            [self._crop(image, box) for box in enlarged.round().int().tolist()]
        )
        pixels = _normalise_pixels(crops.to(self.clip.device), self.clip)
        embedded = self.clip.network.encode_image(pixels)  # type: ignore[operator]
        return _classify(self.clip, embedded, self.embeddings)

    def _crop(self, image: Tensor, box: Sequence[int]) -> Tensor:
        """Cut ``box`` (left, top, right, bottom), at least 2 pixels a side, out of the
        image and resize it to CLIP's input.
        """
        height, width = image.shape[1:]
        x1, y1, x2, y2 = box
        x1 = min(max(x1, 0), width - 2)
        y1 = min(max(y1, 0), height - 2)
        crop_height, crop_width = max(y2 - y1, 2), max(x2 - x1, 2)
        side = self.clip.roi_size * 16
        crop: Tensor = resized_crop(
            image, y1, x1, crop_height, crop_width, [side, side], antialias=True
        )
        return crop


Labeler = RoiLabeler | CropLabeler


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


def attention_pool(pool: Any, maps: Tensor) -> Tensor:
    """Compute open_clip's AttentionPool2d ``pool`` of ``maps`` [R, C, s, s] -> [R, D],
    for the only query whose output is used: the mean cell.

    Keys and values are never formed: their projections are applied to the query and to
    the attended mean instead, so a region costs 4 C^2 multiplications instead of 4 (s^2
    + 1) C^2. The keys' bias adds the same to all scores, so the softmax cancels it.
    """
    cells = maps.flatten(2).transpose(1, 2)
    tokens = torch.cat([cells.mean(1, keepdim=True), cells], 1)
    tokens = tokens + pool.positional_embedding
    key_weight = pool.k_proj.weight.unflatten(0, (pool.num_heads, -1))
    value_weight = pool.v_proj.weight.unflatten(0, (pool.num_heads, -1))
    query = pool.q_proj(tokens[:, 0]).unflatten(1, (pool.num_heads, -1))
    query = query / key_weight.shape[1] ** 0.5
    scores = torch.einsum("rhd,hdc->rhc", query, key_weight) @ tokens.transpose(1, 2)
    mean_tokens = scores.softmax(-1) @ tokens
    attended = torch.einsum("rhc,hdc->rhd", mean_tokens, value_weight).flatten(1)
    return pool.c_proj(attended + pool.v_proj.bias)  # type: ignore[no-any-return]


def _normalise_pixels(images: Tensor, clip: ClipModel) -> Tensor:
    """Normalise uint8 pixels [..., 3, H, W] as CLIP expects them."""
    normalised: Tensor = normalize(
        images.float() / 255, list(clip.mean), list(clip.std)
    )
    return normalised


def _classify(clip: ClipModel, features: Tensor, embeddings: Tensor) -> Tensor:
    """Return the probabilities [N, K+1] of image features [N, D]."""
    scale = clip.network.logit_scale.exp().clamp(max=100)  # type: ignore[operator,union-attr]
    logits = scale * F.normalize(features, dim=-1) @ embeddings.T
    return logits.softmax(-1).cpu()
