"""CLIP's opinion on given boxes: on RoI features of the whole image (one pass), or on
crops.
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
    """Whole image -> stages 1-3 -> RoIAlign on the exact boxes -> stage 4 -> attention pooling -> class probabilities (paper section 3.2)."""

    def __init__(
        self,
        clip: ClipModel,
        classes: Sequence[str],
        config: Clip,
        short_side: int,
        long_side: int,
    ) -> None:
        self.clip, self.short_side, self.long_side = clip, short_side, long_side
        clip.network.visual.to(memory_format=torch.channels_last)  # type: ignore[operator,union-attr]
        self.embeddings = class_embeddings(clip, classes, config)

    @torch.no_grad()
    def __call__(self, image: Tensor, boxes: Tensor) -> Tensor:
        """``image`` [3, H, W] uint8, ``boxes`` [N, 4] in its pixels -> probabilities
        [N, K+1].
        """
        if not len(boxes):
            return torch.zeros(0, len(self.embeddings))
        visual = self.clip.network.visual
        image, boxes = image.to(self.clip.device), boxes.to(self.clip.device)
        view = resize(image, [self.short_side], max_size=self.long_side)
        factors = boxes.new_tensor(
            [view.shape[2] / image.shape[2], view.shape[1] / image.shape[1]]
        ).repeat(2)
        pixels = normalize(
            view.float() / 255, list(self.clip.mean), list(self.clip.std)
        )[None].contiguous(memory_format=torch.channels_last)
        shared = visual.layer3(visual.layer2(visual.layer1(visual.stem(pixels))))  # type: ignore[operator,union-attr]
        pooled = roi_align(
            shared, [boxes * factors], self.clip.roi_size, 1 / 16, -1, aligned=True
        )
        features = attention_pool(visual.attnpool, visual.layer4(pooled))  # type: ignore[operator,union-attr]
        return _probabilities(self.clip, features, self.embeddings)


class CropLabeler:
    """Each box cut out with some of what surrounds it, stretched to CLIP's input size
    and encoded by itself.

    ``context``: side of what is cut out / side of the box.
    """

    def __init__(
        self,
        clip: ClipModel,
        classes: Sequence[str],
        config: Clip,
        context: float = 1.0,
    ) -> None:
        self.clip, self.context = clip, context
        self.embeddings = class_embeddings(clip, classes, config)

    @torch.no_grad()
    def __call__(self, image: Tensor, boxes: Tensor) -> Tensor:
        """``image`` [3, H, W] uint8, ``boxes`` [N, 4] in its pixels -> probabilities
        [N, K+1].
        """
        if not len(boxes):
            return torch.zeros(0, len(self.embeddings))
        side = self.clip.roi_size * 16
        crops = []
        for left, top, right, bottom in (
            with_context(boxes, self.context, image.shape[1], image.shape[2])
            .round()
            .int()
            .tolist()
        ):
            left, top = (
                min(max(left, 0), image.shape[2] - 2),
                min(max(top, 0), image.shape[1] - 2),
            )
            crops.append(
                resized_crop(
                    image,
                    top,
                    left,
                    max(bottom - top, 2),
                    max(right - left, 2),
                    [side, side],
                    antialias=True,
                )
            )
        pixels = normalize(
            torch.stack(crops).to(self.clip.device).float() / 255,
            list(self.clip.mean),
            list(self.clip.std),
        )
        embedded = self.clip.network.encode_image(pixels)  # type: ignore[operator]
        return _probabilities(self.clip, embedded, self.embeddings)


Labeler = RoiLabeler | CropLabeler


def with_context(boxes: Tensor, factor: float, height: int, width: int) -> Tensor:
    """``boxes`` [N, 4] xyxy pixels with sides ``factor`` times as long, about the same
    centres, cut at the image's borders.
    """
    centre, half = (
        (boxes[:, :2] + boxes[:, 2:]) / 2,
        (boxes[:, 2:] - boxes[:, :2]) * factor / 2,
    )
    border = boxes.new_tensor([width, height])
    return torch.cat(
        [(centre - half).clamp(min=0), torch.minimum(centre + half, border)], 1
    )


def attention_pool(pool: Any, maps: Tensor) -> Tensor:
    """What open_clip's AttentionPool2d ``pool`` makes of ``maps`` [R, C, s, s] -> [R,
    D], for the one query that counts: the mean cell.

    Keys and values are never formed: their projections are applied to the query and to
    the attended mean instead, so a region costs 4 C^2 multiplications instead of 4 (s^2
    + 1) C^2. The keys' bias moves all scores alike and drops out.
    """
    cells = maps.flatten(2).transpose(1, 2)
    tokens = (
        torch.cat([cells.mean(1, keepdim=True), cells], 1) + pool.positional_embedding
    )
    key, value = (
        projection.weight.unflatten(0, (pool.num_heads, -1))
        for projection in (pool.k_proj, pool.v_proj)
    )
    query = (
        pool.q_proj(tokens[:, 0]).unflatten(1, (pool.num_heads, -1))
        / key.shape[1] ** 0.5
    )
    attention = (
        torch.einsum("rhd,hdc->rhc", query, key) @ tokens.transpose(1, 2)
    ).softmax(-1)
    attended = (
        torch.einsum("rhc,hdc->rhd", attention @ tokens, value).flatten(1)
        + pool.v_proj.bias
    )
    return pool.c_proj(attended)  # type: ignore[no-any-return]


def _probabilities(clip: ClipModel, features: Tensor, embeddings: Tensor) -> Tensor:
    scale = clip.network.logit_scale.exp().clamp(max=100)  # type: ignore[operator,union-attr]
    return (scale * F.normalize(features, dim=-1) @ embeddings.T).softmax(-1).cpu()
