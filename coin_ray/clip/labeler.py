"""Classification of boxes with CLIP: on RoI features of the whole image (one pass), or
on crops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align
from torchvision.transforms.v2.functional import (
    normalize,
    resize,
    resized_crop_image,
)

from coin_ray.clip.crops import (
    BATCH_PIXELS,
    ImageBoxes,
    PixelBox,
    batch_size,
    classify_crops,
    pixel_boxes,
    sigmoid_class_probabilities,
)
from coin_ray.clip.encoder import ClipModel, class_embeddings
from coin_ray.clip.fused_resnet import FusedResNet, attention_pool
from coin_ray.config import Clip
from coin_ray.config.models import SIGLIP_PRIOR

SCALE_MAX = 100.0
"""Largest factor of cosines of models trained with a softmax, as in their training."""


class Labeler(Protocol):
    """Gives a second opinion on boxes."""

    def label(self, images: Iterable[ImageBoxes]) -> list[Tensor]:
        """Return the probabilities [N, K+1], background last, of each image's boxes, on
        the CPU.
        """


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
        embeddings: Tensor | None = None,
    ) -> None:
        self.clip = clip
        self.short_side = short_side
        self.long_side = long_side
        visual: Any = clip.network.visual
        visual.to(memory_format=torch.channels_last)
        if embeddings is None:
            embeddings = class_embeddings(clip, classes, config)
        self.embeddings = embeddings

    def label(self, images: Iterable[ImageBoxes]) -> list[Tensor]:
        """Return the probabilities [N, K+1] of each image's boxes."""
        return [self(image, boxes) for image, boxes in images]

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
        network: Any = self.clip.network
        scale = network.logit_scale.exp().clamp(max=SCALE_MAX)
        logits: Tensor = scale * F.normalize(features, dim=-1) @ self.embeddings.T
        return logits.softmax(-1).cpu()


class CropLabeler:
    """Classifies crops of the boxes, stretched to the input of any open_clip model.

    ``context``: side of the crop / side of the box. ``own_preprocessing``: crops are
    resized by open_clip as the model's images were in training, else bilinearly.
    ``sigmoid_prior``: see ``crops.sigmoid_class_probabilities``. ``fuse_batch_norms``: of
    a ResNet tower (``FusedResNet``); without, open_clip encodes the crops of each image
    by themselves.
    """

    def __init__(
        self,
        clip: ClipModel,
        classes: Sequence[str],
        config: Clip,
        context: float = 1.0,
        own_preprocessing: bool = False,
        sigmoid_prior: float = SIGLIP_PRIOR,
        embeddings: Tensor | None = None,
        fuse_batch_norms: bool = False,
    ) -> None:
        self.context = context
        self.sigmoid_prior = sigmoid_prior
        if embeddings is None:
            embeddings = class_embeddings(clip, classes, config)
        self.embeddings = embeddings.to(clip.device)
        self._clip = clip
        self._encode = _image_encoder(clip, fuse_batch_norms)
        self._shares_batches = fuse_batch_norms or not clip.has_resnet_tower
        self._crop_size = clip.image_size
        self._transform = None
        if own_preprocessing:
            self._transform = _own_transform(clip)
        elif clip.has_resnet_tower:
            side = clip.roi_size * 16
            self._crop_size = (side, side)

    def __call__(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Return the probabilities [N, K+1] of ``boxes`` [N, 4], in pixels of ``image``
        [3, H, W] uint8.
        """
        return self.label([(image, boxes)])[0]

    @torch.no_grad()
    def label(self, images: Iterable[ImageBoxes]) -> list[Tensor]:
        """Return the probabilities [N, K+1] of each image's boxes."""
        if not self._shares_batches:
            return [self._label_image(image, boxes) for image, boxes in images]
        return classify_crops(
            images,
            self.context,
            self._cut,
            self._classify,
            batch_size(self._crop_size),
            len(self.embeddings),
        )

    def _label_image(self, image: Tensor, boxes: Tensor) -> Tensor:
        """Return the probabilities [N, K+1] of one image's boxes. A ResNet's rounding
        depends on the number of crops in a batch: they are neither filled up nor mixed
        with those of other images, and divided only if they hold many pixels.
        """
        rows = [torch.zeros(0, len(self.embeddings))]
        crop_boxes = pixel_boxes(image, boxes, self.context)
        height, width = self._crop_size
        largest = max(1, BATCH_PIXELS // (height * width))
        for start in range(0, len(crop_boxes), largest):
            batch = crop_boxes[start : start + largest]
            crops = torch.stack([self._cut(image, box) for box in batch])
            rows.append(self._classify(crops))
        return torch.cat(rows)

    def logits(self, crops: Tensor) -> Tensor:
        """Return the model's own logits [B, K+1] of crops as ``_cut`` returns them."""
        pixels = crops.to(self._clip.device)
        if self._transform is None:
            pixels = _normalise_pixels(pixels, self._clip)
        features = F.normalize(self._encode(pixels), dim=-1)
        network: Any = self._clip.network
        scale: Tensor = network.logit_scale.exp()
        if network.logit_bias is None:
            return scale.clamp(max=SCALE_MAX) * features @ self.embeddings.T
        bias: Tensor = network.logit_bias
        return scale * features @ self.embeddings.T + bias

    def _classify(self, crops: Tensor) -> Tensor:
        logits = self.logits(crops)
        if self._clip.network.logit_bias is None:
            return logits.softmax(-1).cpu()
        return sigmoid_class_probabilities(logits, self.sigmoid_prior).cpu()

    def _cut(self, image: Tensor, box: PixelBox) -> Tensor:
        """Cut out ``box`` and stretch it to the input's size."""
        left, top, right, bottom = box
        if self._transform is None:
            crop: Tensor = resized_crop_image(
                image,
                top,
                left,
                bottom - top,
                right - left,
                list(self._crop_size),
                antialias=True,
            )
            return crop
        pixels = image[:, max(top, 0) : bottom, max(left, 0) : right]
        prepared: Tensor = self._transform(to_pil(pixels))
        return prepared


def to_pil(pixels: Tensor) -> Image.Image:
    """Return pixels [3, H, W] uint8 as an image."""
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


def _image_encoder(
    clip: ClipModel, fuse_batch_norms: bool
) -> Callable[[Tensor], Tensor]:
    network: Any = clip.network
    if fuse_batch_norms and clip.has_resnet_tower:
        return FusedResNet(network.visual)
    return network.encode_image  # type: ignore[no-any-return]


def _own_transform(clip: ClipModel) -> Any:
    """Return open_clip's preparation of the model's images, but stretched: the model's
    own would cut the ends off a long box.
    """
    preprocessing = PreprocessCfg(
        size=clip.image_size,
        mean=clip.mean,
        std=clip.std,
        interpolation=clip.interpolation,
        resize_mode="squash",
    )
    return image_transform_v2(preprocessing, is_train=False)


def _normalise_pixels(images: Tensor, clip: ClipModel) -> Tensor:
    """Normalise uint8 pixels [..., 3, H, W] as CLIP expects them."""
    pixels = images.float().div_(255)
    mean, std = list(clip.mean), list(clip.std)
    normalised: Tensor = normalize(pixels, mean, std, inplace=True)
    return normalised
