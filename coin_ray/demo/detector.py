"""The demo's stand-in for a cloud: a small anchor-free detector (objectness x class on
a stride-8 map).

It is trained by ``coin_ray.demo.build.cloud`` on source-style scenes and answers over
HTTP only (``coin_ray.serving.local_cloud``). Nothing in the adaptation imports it.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms
from torchvision.transforms.functional import pil_to_tensor

from coin_ray.demo.drawings import ASSETS, CLASSES

STRIDE = 8
SIDE_SCALE = 32.0
WEIGHTS = ASSETS / "cloud.pt"


def _convolution(
    in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1
) -> nn.Sequential:
    """Build a 3 x 3 convolution with batch normalisation and ReLU."""
    convolution = nn.Conv2d(
        in_channels, out_channels, 3, stride, dilation, dilation, bias=False
    )
    return nn.Sequential(convolution, nn.BatchNorm2d(out_channels), nn.ReLU(True))


class DemoCloud(nn.Module):
    """Detects the demo's classes: images [B, 3, H, W] in 0..1 -> objectness logits [B,
    h, w], class logits [B, h, w, K], side distances [B, h, w, 4] in pixels.
    """

    def __init__(self, width: int = 24, classes: int = len(CLASSES)) -> None:
        super().__init__()
        w = width
        self.fine = nn.Sequential(
            _convolution(3, w, 2),
            _convolution(w, 2 * w, 2),
            _convolution(2 * w, 2 * w),
            _convolution(2 * w, 4 * w, 2),
            _convolution(4 * w, 4 * w),
        )
        self.coarse = nn.Sequential(
            _convolution(4 * w, 6 * w, 2),
            _convolution(6 * w, 6 * w),
            _convolution(6 * w, 6 * w, 1, 2),
        )
        self.from_fine = nn.Conv2d(4 * w, 4 * w, 1)
        self.from_coarse = nn.Conv2d(6 * w, 4 * w, 1)
        self.head = _convolution(4 * w, 4 * w)
        self.output = nn.Conv2d(4 * w, 1 + classes + 4, 1)
        nn.init.constant_(self.output.bias[:1], -3.0)  # type: ignore[index]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return objectness logits, class logits and side distances of each cell."""
        fine = self.fine((images - 0.5) / 0.27)
        coarse = self.from_coarse(self.coarse(fine))
        coarse = F.interpolate(coarse, size=fine.shape[-2:])
        features = self.head(F.relu(self.from_fine(fine) + coarse))
        cells = self.output(features).permute(0, 2, 3, 1)
        sides = F.softplus(cells[..., -4:]) * SIDE_SCALE
        return cells[..., 0], cells[..., 1:-4], sides


def grid_centres(height: int, width: int) -> Tensor:
    """Return the centres [h, w, 2] of the stride-8 cells, xy in pixels."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (torch.stack([x, y], -1) + 0.5) * STRIDE


@torch.no_grad()
def run_demo_cloud(
    model: DemoCloud, image: Image.Image, score_min: float, limit: int = 40
) -> tuple[Tensor, Tensor]:
    """Detect objects: boxes [N, 4] xyxy pixels of ``image`` and independent class
    scores [N, K], best first. Images of any size; scenes are 192 px.
    """
    padded = _pad(pil_to_tensor(image.convert("RGB")).float() / 255)
    height, width = padded.shape[1] // STRIDE, padded.shape[2] // STRIDE
    objectness, class_logits, sides = (
        cells[0].flatten(0, 1) for cells in model(padded[None])
    )
    scores = objectness.sigmoid()[:, None] * class_logits.softmax(-1)
    centres = grid_centres(height, width).flatten(0, 1)
    boxes = torch.cat([centres - sides[:, :2], centres + sides[:, 2:]], 1)
    boxes[:, 0::2].clamp_(0, image.width)
    boxes[:, 1::2].clamp_(0, image.height)
    best = scores.amax(1)
    confident = best > score_min
    boxes, scores, best = boxes[confident], scores[confident], best[confident]
    order = nms(boxes, best, 0.5)[:limit]
    return boxes[order], scores[order]


def _pad(image: Tensor) -> Tensor:
    """Pad right and bottom with grey to a multiple of the coarse stride."""
    multiple = 2 * STRIDE
    right, bottom = -image.shape[2] % multiple, -image.shape[1] % multiple
    return F.pad(image, (0, right, 0, bottom), value=0.5)


def load_demo_cloud(path: Path = WEIGHTS) -> DemoCloud:
    """Load the trained demo cloud for inference."""
    model = DemoCloud()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.float().eval()
