"""Settings of the images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coin_ray.config.fields import new_field, require

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
