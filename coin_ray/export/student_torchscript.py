"""A student that was a detector before as TorchScript: one uint8 image in, boxes in its
pixels out, as ``coin_ray.export.torchscript``.

No postponed annotations here: TorchScript reads them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from coin_ray.export.student_network import StudentNetwork, export_copy
from coin_ray.export.torchscript import DetectionTensors
from coin_ray.models.students.base import DetectorStudent
from coin_ray.models.students.detection import BRIGHTNESS_WEIGHTS, MIN_SIDE
from coin_ray.models.students.yolox import YoloxStudent


def cell_grid_of_any_size(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``yolox_network.cell_grid``: a trace would keep the size and the device of
    the example as constants of the graph.
    """
    height, width = pixels.shape[2], pixels.shape[3]
    cells: list[Tensor] = []
    strides: list[Tensor] = []
    for stride in [8, 16, 32]:
        rows = torch.arange(height // stride, device=pixels.device, dtype=torch.float32)
        columns = torch.arange(
            width // stride, device=pixels.device, dtype=torch.float32
        )
        y, x = torch.meshgrid([rows, columns], indexing="ij")
        level = torch.stack([x, y], -1).reshape(-1, 2)
        cells.append(level)
        strides.append(torch.full_like(level[:, 0], stride))
    return torch.cat(cells), torch.cat(strides)


class SingleImageStudent(nn.Module):
    """image [H, W, 3] uint8 RGB -> boxes [N, 4], scores [N], labels [N], probs [N,
    K+1], best first.
    """

    mean: Tensor
    std: Tensor
    brightness_weights: Tensor

    def __init__(self, student: DetectorStudent) -> None:
        super().__init__()
        input_format, settings = student.input_format, student.post_process
        self.side, self.keep_ratio = input_format.side, input_format.keep_ratio
        self.multiple, self.pad_value = input_format.multiple, input_format.pad_value
        self.bgr, self.rendering = input_format.bgr, str(input_format.rendering)
        self.score_min, self.nms = settings.score_min, settings.nms
        self.detections = settings.detections
        self.best_class_only, self.min_side = settings.best_class_only, MIN_SIDE
        channel = (3, 1, 1)
        self.register_buffer("mean", torch.tensor(input_format.mean).view(channel))
        self.register_buffer("std", torch.tensor(input_format.std).view(channel))
        weights = torch.tensor(BRIGHTNESS_WEIGHTS).view(channel)
        self.register_buffer("brightness_weights", weights)
        copied = export_copy(student)
        if isinstance(copied, YoloxStudent):
            copied.cell_grid = torch.jit.script(cell_grid_of_any_size)
        side = self.side + -self.side % self.multiple
        sides = (3 * self.multiple, 4 * self.multiple)
        example = torch.zeros(1, 3, *(sides if self.keep_ratio else (side, side)))
        network = StudentNetwork(copied).eval()
        self.network = torch.jit.trace(network, (example,), check_trace=False)

    def forward(self, image: Tensor) -> DetectionTensors:
        height, width = image.shape[0], image.shape[1]
        rows, columns = self.side, self.side
        if self.keep_ratio:
            factor = min(self.side / min(height, width), self.side / max(height, width))
            rows = max(1, int(round(height * factor)))  # noqa: RUF046
            columns = max(1, int(round(width * factor)))  # noqa: RUF046
        resized = image.permute(2, 0, 1)[None]
        if rows != height or columns != width:
            resized = F.interpolate(
                resized, size=[rows, columns], mode="bilinear", antialias=True
            )
        pads = [0, -columns % self.multiple, 0, -rows % self.multiple]
        pixels = self.normalise(F.pad(resized.float(), pads, value=self.pad_value))
        boxes, scores = self.network(pixels)
        limits = torch.tensor(
            [columns, rows, columns, rows], dtype=torch.float32, device=image.device
        )
        inside = torch.minimum(boxes[0].clamp(min=0), limits)
        boxes, best, labels, probs = self.select(inside, scores[0])
        x_factor, y_factor = width / columns, height / rows
        scale = torch.tensor(
            [x_factor, y_factor, x_factor, y_factor],
            dtype=torch.float32,
            device=image.device,
        )
        return boxes * scale, best, labels, probs

    def normalise(self, pixels: Tensor) -> Tensor:
        if self.rendering != "plain":
            brightness = (pixels * self.brightness_weights).sum(1, keepdim=True)
            pixels = brightness.expand(-1, 3, -1, -1)
            if self.rendering == "inverted":
                pixels = 255 - pixels
        pixels = (pixels - self.mean) / self.std
        return pixels.flip([1]) if self.bgr else pixels

    def select(self, boxes: Tensor, scores: Tensor) -> DetectionTensors:
        """Suppress overlapping boxes of each class; return the best of all."""
        best = scores.max(1)
        has_area = (boxes[:, 2:] - boxes[:, :2]).amin(1) >= self.min_side
        selected: list[Tensor] = []
        for label in range(scores.shape[1]):
            is_likely = (scores[:, label] > self.score_min) & has_area
            if self.best_class_only:
                is_likely = is_likely & (best.indices == label)
            likely = is_likely.nonzero().flatten()
            if self.nms < 1:
                likely = likely[nms(boxes[likely], scores[likely, label], self.nms)]
            selected.append(torch.stack([likely, torch.full_like(likely, label)], 1))
        pairs = torch.cat(selected)
        pair_scores = scores[pairs[:, 0], pairs[:, 1]]
        order = pair_scores.argsort(descending=True, stable=True)[: self.detections]
        rows = pairs[order, 0]
        foreground = scores[rows]
        foreground = foreground / foreground.sum(1, keepdim=True).clamp(min=1.0)
        background = (1 - foreground.sum(1, keepdim=True)).clamp(min=0.0)
        probs = torch.cat([foreground, background], 1)
        return boxes[rows], pair_scores[order], pairs[order, 1], probs


def student_torchscript(student: DetectorStudent) -> torch.jit.ScriptModule:
    """Return the student on the CPU, frozen."""
    scripted = torch.jit.script(SingleImageStudent(student).eval())
    frozen: torch.jit.ScriptModule = torch.jit.freeze(scripted)
    return frozen
