"""The interface of a student that learns from ``Targets``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from coin_ray.structures import Detections, Targets

StudentRendering = Literal["plain", "grey", "inverted"]
STUDENT_RENDERINGS: tuple[StudentRendering, ...] = get_args(StudentRendering)


@dataclass(frozen=True, slots=True, eq=False)
class ParameterParts:
    """The parameters of a student: ``trunk`` was pretrained (backbone and feature
    pyramid) and may learn more slowly, ``head`` is all the rest.
    """

    trunk: list[nn.Parameter]
    head: list[nn.Parameter]


@dataclass(frozen=True)
class InputFormat:
    """The pixels that a network takes: images are resized to fit a square of ``side``
    pixels (``keep_ratio``; else stretched to it), padded at the right and bottom with
    ``pad_value`` to multiples of ``multiple``, and normalised as (RGB - ``mean``) /
    ``std``, all in 0..255; ``bgr``: then with reversed channels.
    """

    side: int
    keep_ratio: bool = True
    multiple: int = 32
    pad_value: float = 0.0
    mean: tuple[float, float, float] = (0.0, 0.0, 0.0)
    std: tuple[float, float, float] = (1.0, 1.0, 1.0)
    bgr: bool = False
    rendering: StudentRendering = "plain"
    """Is applied before all else. grey: brightness in all channels; inverted: 255 less
    that, so that bright objects of thermal images look dark."""


@dataclass(frozen=True)
class PostProcess:
    """Which of a network's boxes become detections: scores above ``score_min``, those
    left by class-wise suppression at the IoU ``nms`` (1: all), at most ``detections``
    an image. ``best_class_only``: a box is a detection of its best class at most.
    """

    score_min: float
    nms: float
    detections: int
    best_class_only: bool


@dataclass(frozen=True, slots=True, eq=False)
class PyramidMaps:
    """Feature maps of a batch of ``pixels`` [B, 3, h, w] in the input format: ``maps``,
    finest first, [B, C, h / s, w / s] of strides s. ``sizes``: (height, width) of each
    image inside ``pixels``.
    """

    pixels: Tensor
    maps: list[Tensor]
    sizes: list[tuple[int, int]]


class DetectorStudent(Protocol):
    """A detector that learns from ``Targets``; also an ``nn.Module``.

    Images are uint8 RGB [3, H, W] of any sizes. A student resizes, pads and normalises
    them itself, and moves them to its own device.
    """

    num_classes: int

    @property
    def input_format(self) -> InputFormat: ...

    @property
    def post_process(self) -> PostProcess: ...

    def detect_tensors(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return boxes [B, A, 4], xyxy pixels of ``pixels``, and scores [B, A, K] in
        0..1, of pixels [B, 3, h, w] in the input format.

        Tensors alone, without a branch that depends on them: exporters trace it.
        """

    def losses(
        self, images: Sequence[Tensor], targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """Return the named losses of a batch: weighted, differentiable scalars that the
        caller adds up.

        ``targets``: one of each image, boxes in its pixels. A box counts as much as its
        weight, in the assignment and in each loss, and a region that is ignored not at
        all. Where every weight is 1, every class certain and no region ignored, the sum
        is the loss of the library that the network comes from. The losses are finite
        for any targets, none included.
        """

    def predict(self, images: Sequence[Tensor]) -> list[Detections]:
        """Return the detections of each image in its own pixels, best first; class
        distributions over K+1 columns, background last.
        """

    def parameter_parts(self) -> ParameterParts:
        """Return all parameters, those of the pretrained trunk apart from the others."""

    # The methods of nn.Module that training uses

    @property
    def training(self) -> bool: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def to(self, device: torch.device) -> Any: ...
    def requires_grad_(self, requires_grad: bool = True) -> Any: ...
    def parameters(self) -> Any: ...
    def modules(self) -> Any: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> Any: ...


class PyramidStudent(DetectorStudent, Protocol):
    """A student whose feature maps other heads may use in training."""

    @property
    def map_channels(self) -> tuple[int, ...]: ...

    @property
    def map_strides(self) -> tuple[int, ...]: ...

    def extract_maps(self, images: Sequence[Tensor]) -> PyramidMaps:
        """Return the maps that the student's own head sees of images [3, H, W]."""

    def losses_of_maps(
        self,
        extracted: PyramidMaps,
        images: Sequence[Tensor],
        targets: Sequence[Targets],
    ) -> dict[str, Tensor]:
        """Return the ``losses`` of images whose maps are known."""
