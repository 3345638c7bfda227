"""A detector as TorchScript: one uint8 image in, boxes in its pixels out. Programs that
load it need torch and ``import torchvision``.

No postponed annotations here: TorchScript reads them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms, roi_align

from coin_ray.export.networks import PAD, split_detector
from coin_ray.models.faster_rcnn_clip.model import STRIDE, ClipDetector

DetectionTensors = tuple[Tensor, Tensor, Tensor, Tensor]


def cell_shifts_on_device(features: Tensor, stride: int) -> Tensor:
    """Return ``networks.cell_shifts`` on the device of ``features``, which a trace would
    keep as a constant of the graph.
    """
    device = features.device
    y = torch.arange(features.shape[2], dtype=torch.float32, device=device) * stride
    x = torch.arange(features.shape[3], dtype=torch.float32, device=device) * stride
    rows, columns = torch.meshgrid([y, x], indexing="ij")
    return torch.stack([columns, rows, columns, rows], -1)


class SingleImageDetector(nn.Module):
    """image [H, W, 3] uint8 RGB -> boxes [N, 4], scores [N], labels [N], probs [N,
    K+1], best first.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, detector: ClipDetector) -> None:
        super().__init__()
        config = detector.config
        propose, describe = split_detector(detector)
        propose.cell_shifts = torch.jit.script(cell_shifts_on_device)
        self.short, self.long = config.short_side, config.long_side
        self.proposals, self.rpn_nms = config.proposals_test, config.rpn_nms
        self.side, self.samples = config.roi_size, config.roi_samples
        self.score_min, self.detections = config.score_min, config.detections
        self.nms = config.nms
        self.stride, self.pad = STRIDE, PAD
        self.register_buffer("mean", detector.mean.detach().cpu().clone())
        self.register_buffer("std", detector.std.detach().cpu().clone())
        limits = torch.tensor([4.0 * PAD, 3.0 * PAD, 4.0 * PAD, 3.0 * PAD])
        pooled = torch.zeros(5, propose.tower.shared_channels, self.side, self.side)
        pixels = torch.zeros(1, 3, 3 * PAD, 4 * PAD)
        regions = (pooled, torch.ones(5, 4), limits)
        self.propose = torch.jit.trace(propose, (pixels, limits), check_trace=False)
        self.describe = torch.jit.trace(describe, regions, check_trace=False)

    def forward(self, image: Tensor) -> DetectionTensors:
        height, width = image.shape[0], image.shape[1]
        factor = min(self.short / min(height, width), self.long / max(height, width))
        rows = max(1, int(round(height * factor)))  # noqa: RUF046
        columns = max(1, int(round(width * factor)))  # noqa: RUF046
        resized = image.permute(2, 0, 1)[None]
        if rows != height or columns != width:
            resized = F.interpolate(
                resized, size=[rows, columns], mode="bilinear", antialias=True
            )
        normalised = (resized.float() / 255 - self.mean) / self.std
        pixels = F.pad(normalised, [0, -columns % self.pad, 0, -rows % self.pad])
        limits = torch.tensor(
            [columns, rows, columns, rows], dtype=torch.float32, device=image.device
        )
        features, objectness, candidates = self.propose(pixels, limits)
        proposals = self.choose_proposals(objectness[0], candidates[0])
        pooled = roi_align(
            features,
            [proposals],
            self.side,
            1 / self.stride,
            self.samples,
            aligned=True,
        )
        probs, boxes = self.describe(pooled, proposals, limits)
        boxes, scores, labels, probs = self.postprocess_detections(boxes, probs)
        x_factor, y_factor = width / columns, height / rows
        scale = torch.tensor(
            [x_factor, y_factor, x_factor, y_factor],
            dtype=torch.float32,
            device=image.device,
        )
        return boxes * scale, scores, labels, probs

    def choose_proposals(self, objectness: Tensor, candidates: Tensor) -> Tensor:
        best = objectness.topk(min(6 * self.proposals, len(objectness)))
        boxes = candidates[best.indices]
        sizes = boxes[:, 2:] - boxes[:, :2]
        large = (sizes.amin(1) >= 1.0).nonzero().flatten()
        order = nms(boxes[large], best.values[large], self.rpn_nms)
        return boxes[large[order[: self.proposals]]]

    def postprocess_detections(self, boxes: Tensor, probs: Tensor) -> DetectionTensors:
        """Suppress overlapping boxes of each class; return the best of all."""
        per_class: list[Tensor] = []
        for label in range(probs.shape[1] - 1):
            likely = (probs[:, label] > self.score_min).nonzero().flatten()
            region = likely[nms(boxes[likely], probs[likely, label], self.nms)]
            per_class.append(torch.stack([region, torch.full_like(region, label)], 1))
        pairs = torch.cat(per_class)
        scores = probs[pairs[:, 0], pairs[:, 1]]
        order = scores.argsort(descending=True, stable=True)[: self.detections]
        regions = pairs[order, 0]
        return boxes[regions], scores[order], pairs[order, 1], probs[regions]


def torchscript(detector: ClipDetector) -> torch.jit.ScriptModule:
    """Return the detector on the CPU, frozen, without a text encoder."""
    scripted = torch.jit.script(SingleImageDetector(detector).eval())
    frozen: torch.jit.ScriptModule = torch.jit.freeze(scripted)
    return frozen
