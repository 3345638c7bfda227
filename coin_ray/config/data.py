"""Settings of the images."""

from __future__ import annotations

from dataclasses import dataclass

from coin_ray.config.fields import check, new_field


@dataclass(frozen=True)
class DemoScenes:
    """Scenes composed of the embedded drawings: the target domain of the demo."""

    train: int = 500
    val: int = 100
    test: int = 300
    seed: int = 11

    def __post_init__(self) -> None:
        check(
            self.train > 0 and self.test > 0 and self.val >= 0,
            "scenes need train > 0, test > 0, val >= 0",
        )


@dataclass(frozen=True)
class Folder:
    """A folder or URI of unlabelled images; labelled ones, in any format of
    docs/formats.md, are only read to evaluate.
    """

    images: str = ""
    """Folder of unlabelled training images, read recursively. Labelled folders work
    too, ``FOLDER#SPLIT`` is one of their splits."""
    val: str | None = None
    """Labelled folder for validation."""
    test: str | None = None
    """Labelled folder; without it nothing can be evaluated and the table says so."""
    same_images: bool = new_field(False)
    """Test images may be training images too, as published for Clipart1k, KITTI and
    Sim10K. Their labels are only read to evaluate; the figures say nothing of images
    that were not trained on.
    """
