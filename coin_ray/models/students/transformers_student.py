"""transformers' detectors as students: D-FINE, RT-DETR, RT-DETRv2, DEIMv2, LW-DETR and
RF-DETR. Needs the extra ``teachers``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from coin_ray.models.students.base import InputFormat, ParameterParts, PostProcess
from coin_ray.models.students.detection import (
    detect_objects,
    make_pixels,
    resize_image,
)
from coin_ray.models.students.query_criteria import (
    grouped_loss,
    make_labels,
    real_time_loss,
)
from coin_ray.models.students.query_matching import WeightedQueryTargets, to_corners
from coin_ray.structures import Detections, Targets

LOSS_FUNCTIONS = {
    "rt_detr": real_time_loss,
    "rt_detr_v2": real_time_loss,
    "d_fine": real_time_loss,
    "deimv2": real_time_loss,
    "lw_detr": grouped_loss,
    "rf_detr": grouped_loss,
}
"""By transformers' ``model_type``."""
TRUNK = (
    "model.backbone.",
    "model.conv_encoder.",
    "model.encoder_input_proj.",
    "model.encoder.",
)
"""Parameters of the backbone and of what makes its maps a pyramid."""
CHECKS_OFF = "TRANSFORMERS_DISABLE_TORCH_CHECK"
SCORE_MIN, DETECTIONS_MAX = 0.01, 100


class TransformersStudent(nn.Module):
    """``network``: transformers' model for object detection, of one of the types in
    ``LOSS_FUNCTIONS``; ``input_format``: as its image processor says.
    """

    def __init__(self, network: Any, input_format: InputFormat) -> None:
        super().__init__()
        self.network, self.input_format = network, input_format
        limit = min(network.config.num_queries, DETECTIONS_MAX)
        self.post_process = PostProcess(SCORE_MIN, 1.0, limit, best_class_only=False)
        self.num_classes: int = network.config.num_labels
        network.config.auxiliary_loss = True
        network.loss_function = LOSS_FUNCTIONS[network.config.model_type]

    def losses(
        self, images: Sequence[Tensor], targets: Sequence[Targets]
    ) -> dict[str, Tensor]:
        """See ``DetectorStudent.losses``. Noise of denoising queries is drawn from
        torch's generator.
        """
        device = self.network.device
        query_targets = [
            WeightedQueryTargets.from_targets(image_targets, image.shape[1:], device)
            for image, image_targets in zip(images, targets, strict=True)
        ]
        batch = [resize_image(image.to(device), self.input_format) for image in images]
        side = self.input_format.side
        predicted = self.network(
            pixel_values=make_pixels(batch, (side, side), self.input_format),
            labels=make_labels(query_targets),
        )
        losses: dict[str, Tensor] = predicted.loss_dict
        return losses

    def detect_tensors(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Return boxes [B, Q, 4] (xyxy) and scores [B, Q, K], in evaluation mode."""
        predicted = self.network(pixel_values=pixels)
        boxes = to_corners(predicted.pred_boxes.float()) * self.input_format.side
        return boxes, predicted.logits.float().sigmoid()

    def predict(self, images: Sequence[Tensor]) -> list[Detections]:
        return detect_objects(self, images, self.network.device)

    def parameter_parts(self) -> ParameterParts:
        """Return all parameters; the trunk is the backbone and its feature pyramid."""
        parts = ParameterParts([], [])
        for name, parameter in self.network.named_parameters():
            part = parts.trunk if name.startswith(TRUNK) else parts.head
            part.append(parameter)
        return parts


@contextmanager
def without_shape_checks() -> Iterator[None]:
    """Leave transformers' checks of tensor shapes out of the graphs that are exported
    meanwhile: ONNX has no operator for them.
    """
    before = os.environ.get(CHECKS_OFF)
    os.environ[CHECKS_OFF] = "1"
    try:
        yield
    finally:
        del os.environ[CHECKS_OFF]
        if before is not None:
            os.environ[CHECKS_OFF] = before
