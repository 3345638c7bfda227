"""Settings of the images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from coin_ray.config.fields import (
    check_fraction,
    new_field,
    require,
    runtime_only,
)

DEMO_ASSETS = Path(__file__).parents[1] / "demo" / "assets"
DEMO_CLASSES = ("bird", "bug", "car", "cat", "flower", "fruit", "house", "person")


@dataclass(frozen=True)
class DemoScenes:
    """Scenes composed of the embedded drawings: the target domain of the demo."""

    train: int = 500
    val: int = 100
    test: int = 300
    seed: int = 11

    def __post_init__(self) -> None:
        require(
            self.train > 0 and self.test > 0 and self.val >= 0,
            "the demo needs data.train > 0, data.test > 0 and data.val >= 0; got"
            f" {self.train}, {self.test} and {self.val}",
        )


@dataclass(frozen=True)
class Folder:
    """A folder or URI of unlabelled images; labelled images, in any format of
    docs/formats.md, are used for evaluation only.
    """

    images: str = ""
    """Folder of unlabelled training images, read recursively. Labelled folders work
    too; ``FOLDER#SPLIT`` is one of their splits."""
    val: str | None = None
    """Labelled folder for validation."""
    test: str | None = None
    """Labelled folder for evaluation. Without it there are no accuracy figures."""
    same_images: bool = new_field(False)
    """Allow test images that are training images too, as published for Clipart1k, KITTI
    and Sim10K. Their labels are used for evaluation only; the figures then do not show
    the accuracy on images that were not used for training.
    """
    intensity_range: Literal["auto"] | tuple[float, float] = new_field("auto")
    """Values of grey images with more than 8 bits that become black and white, the same
    for all images of the run. auto: found in the training images. 8-bit images stay as
    they are.
    """
    max_left_out_share: float = runtime_only(0.5)
    """Highest share of the images of a folder that may be left out: broken files, files
    of unknown kinds, images that are in an earlier folder too, images none of whose
    boxes is usable. A run with more stops before any request is sent.
    """

    def __post_init__(self) -> None:
        check_intensity_range("data.intensity_range", self.intensity_range)
        check_fraction("data.max_left_out_share", self.max_left_out_share)


def check_intensity_range(
    setting: str, intensity_range: Literal["auto"] | tuple[float, float]
) -> None:
    """Raise ConfigError unless it is auto, or a lower and a higher value."""
    if intensity_range == "auto":
        return
    low, high = intensity_range
    require(
        math.isfinite(low) and math.isfinite(high) and low < high,
        f"{setting} must be auto, or two finite values, the lower one first; got"
        f" {low} {high}",
    )
