"""A YOLOX that learns from ``Targets``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from coin_ray import boxes as box_ops
from coin_ray.models.students.base import (
    STUDENT_RENDERINGS,
    InputFormat,
    ParameterParts,
    PostProcess,
    PyramidMaps,
    StudentRendering,
)
from coin_ray.models.students.detection import (
    detect_objects,
    make_pixels,
    padded_size,
    resize_image,
)
from coin_ray.models.students.yolox_losses import yolox_losses
from coin_ray.models.students.yolox_network import (
    STRIDES,
    YOLOX_SIZES,
    YoloxNetwork,
    cell_grid,
    decode_boxes_cxcywh,
)
from coin_ray.parallel import all_max
from coin_ray.structures import Detections, Targets

PAD_VALUE = 114.0
YOLOX_POST_PROCESS = PostProcess(
    score_min=0.01, nms=0.65, detections=100, best_class_only=True
)
CellGrid = Callable[[Tensor], tuple[Tensor, Tensor]]


class YoloxStudent(nn.Module):
    """``name``: of a released model. ``side``: of the square that images are made to
    fit, 0 for the model's own.
    """

    rendering_code: Tensor

    def __init__(self, name: str, num_classes: int, side: int = 0) -> None:
        super().__init__()
        size = YOLOX_SIZES[name]
        self.name, self.num_classes = name, num_classes
        self.network = YoloxNetwork(num_classes, size)
        self.side = side or size.side
        # part of the weights, so that whoever loads them sees images the same way
        self.register_buffer("rendering_code", torch.tensor(0))
        self.post_process = YOLOX_POST_PROCESS
        self.cell_grid: CellGrid = cell_grid

    @property
    def input_format(self) -> InputFormat:
        return InputFormat(
            self.side,
            multiple=STRIDES[-1],
            pad_value=PAD_VALUE,
            bgr=True,
            rendering=STUDENT_RENDERINGS[int(self.rendering_code)],
        )

    def set_rendering(self, rendering: StudentRendering) -> None:
        """Show the network images in a rendering from now on; it is saved with the
        weights.
        """
        self.rendering_code.fill_(STUDENT_RENDERINGS.index(rendering))

    def losses(
        self, images: Sequence[Tensor], targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """See ``DetectorStudent.losses``. Over several workers the losses are divided
        by the number of objects of all of them.
        """
        return self.losses_of_maps(self.extract_maps(images), images, targets)

    @property
    def map_channels(self) -> tuple[int, ...]:
        return self.network.head.map_channels

    @property
    def map_strides(self) -> tuple[int, ...]:
        return STRIDES

    def extract_maps(self, images: Sequence[Tensor]) -> PyramidMaps:
        """Return the maps of the feature pyramid; over several workers the images of
        all of them are padded to one size.
        """
        device = next(self.parameters()).device
        resized = [resize_image(image, self.input_format) for image in images]
        local_size = torch.tensor(padded_size(resized, self.input_format))
        height, width = all_max(local_size).tolist()
        batch = [image.to(device) for image in resized]
        pixels = make_pixels(batch, (height, width), self.input_format)
        sizes = [(image.shape[1], image.shape[2]) for image in resized]
        return PyramidMaps(pixels, self.network.backbone(pixels), sizes)

    def losses_of_maps(
        self,
        extracted: PyramidMaps,
        images: Sequence[Tensor],
        targets: Sequence[Targets],
    ) -> dict[str, Tensor]:
        predictions = self.network.head(extracted.maps)
        cells, strides = cell_grid(extracted.pixels)
        in_input = [
            _scale_targets(target, image, size).to(predictions.device)
            for target, image, size in zip(
                targets, images, extracted.sizes, strict=True
            )
        ]
        return yolox_losses(predictions, cells, strides, in_input)

    def detect_tensors(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return boxes [B, A, 4] (xyxy) and scores [B, A, K]: objectness times class."""
        predictions = self.network(pixels).float()
        cells, strides = self.cell_grid(pixels)
        boxes = decode_boxes_cxcywh(predictions[..., :4], cells, strides)
        half = boxes[..., 2:] / 2
        corners = torch.cat([boxes[..., :2] - half, boxes[..., :2] + half], -1)
        scores = predictions[..., 4:5].sigmoid() * predictions[..., 5:].sigmoid()
        return corners, scores

    def predict(self, images: Sequence[Tensor]) -> list[Detections]:
        return detect_objects(self, images, next(self.parameters()).device)

    def parameter_parts(self) -> ParameterParts:
        """Return the backbone's and feature pyramid's parameters, and the head's."""
        return ParameterParts(
            trunk=list(self.network.backbone.parameters()),
            head=list(self.network.head.parameters()),
        )


def _scale_targets(targets: Targets, image: Tensor, size: tuple[int, int]) -> Targets:
    """Move targets from the frame of ``image`` [3, H, W] into that of the image resized
    to ``size`` (height, width).
    """
    x_factor = size[1] / image.shape[2]
    y_factor = size[0] / image.shape[1]
    if x_factor == 1 and y_factor == 1:
        return targets
    return Targets(
        box_ops.scale_boxes(targets.boxes, x_factor, y_factor),
        targets.probs,
        targets.weights,
        box_ops.scale_boxes(targets.ignored, x_factor, y_factor),
    )
