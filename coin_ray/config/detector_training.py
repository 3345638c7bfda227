"""Settings of a detector's supervised training. Imports neither torch nor ray."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from coin_ray.config import (
    Cloud,
    DemoScenes,
    Folder,
    PipelineConfig,
    Tracking,
    TrainingConfig,
    runtime_only,
)
from coin_ray.config.co_detr import Backbone, CoDetr
from coin_ray.config.data import DEMO_CLASSES, check_intensity_range
from coin_ray.config.fields import new_field, require

DEMO, DEMO_SOURCE = "demo", "demo-source"
DetectorModel = Literal["co-detr", "rt-detr-v2", "d-fine"]
LABEL_FORMATS = ("coco", "voc", "yolo", "kitti", "bdd100k", "cityscapes")


@dataclass(frozen=True)
class SourceScenes:
    """Labelled scenes of the demo's source domain: the drawings and the mixture of
    styles that its cloud was trained on.

    Scenes of ``val`` and ``test`` are all plain, and none of them is in ``train``.
    """

    train: int = 1000
    val: int = 200
    test: int = 0
    cluttered: int = 7
    """One of this many training scenes is in the target's style."""


@dataclass(frozen=True)
class DetectorConfig:
    """Every setting of one supervised training."""

    preset: str
    classes: tuple[str, ...] = ()
    data: str = ""
    """Labelled training images: ``FOLDER`` or ``FOLDER#SPLIT`` in any format of
    docs/formats.md, ``coco:FOLDER`` to require one, or ``demo-source`` or ``demo``:
    labelled scenes of the demo.
    """
    val: str = ""
    """Labelled images for evaluation, written like ``data``. Empty: a tenth of the
    training images, selected by their content, is held out."""
    test: str = ""
    """Further labelled images for evaluation."""
    model: DetectorModel = field(default="co-detr", metadata={"identity": False})
    network: str = field(default="", metadata={"identity": False})
    """RT-DETRv2 or D-FINE of transformers to train: its name on the Hugging Face hub,
    or its folder."""
    co_detr: CoDetr = field(default_factory=CoDetr)
    backbone: Backbone = field(default_factory=Backbone)
    fit: TrainingConfig = field(default_factory=TrainingConfig)
    """``steps`` and ``milestones`` are used unless ``epochs`` is given.
    ``visual_lr_factor`` is the backbone's."""
    epochs: float = 0.0
    """Duration of the training instead of ``fit.steps``; 0: ``fit.steps``."""
    drops: tuple[float, ...] = ()
    """Epochs after which the learning rate falls to a tenth, with ``epochs``."""
    accumulate: int = 1
    """Number of parts in which a batch passes through the network, to save memory
    (gradient accumulation)."""
    average: float = 0.0
    """Share of the trained weights in the averaged ones per step (EMA); averaged weights
    are then evaluated and saved. 0: no averaging."""
    ship: Literal["base", "heads", "agreement"] = field(
        default="base", metadata={"identity": False}
    )
    """Contents of ``co_detr.pt``. base: the detector alone. heads: its auxiliary heads
    too, and each of them is evaluated. agreement: as heads, with the confidence that
    all heads share as the score.
    """
    short_side: int = 800
    long_side: int = 1333
    intensity_range: Literal["auto"] | tuple[float, float] = new_field("auto")
    """Values of grey images with more than 8 bits that become black and white. auto:
    found in the training images."""
    tracking: Tracking = field(default_factory=Tracking, metadata={"identity": False})
    seed: int = 0
    evaluate_batch: int = runtime_only(8)
    """Images per batch of the evaluation."""

    def __post_init__(self) -> None:
        self._check_batch()
        check_intensity_range("intensity_range", self.intensity_range)
        require(0 <= self.average < 1, f"average must lie in 0..1; got {self.average}")
        require(
            self.epochs >= 0,
            f"epochs must be positive, or 0 for fit.steps; got {self.epochs}",
        )
        require(
            not self.epochs or all(0 < epoch < self.epochs for epoch in self.drops),
            f"drops {self.drops} must lie within {self.epochs} epochs",
        )
        trains_heads = self.co_detr.auxiliary and self.co_detr.auxiliary_losses
        require(
            self.ship == "base" or bool(trains_heads),
            f"ship {self.ship} needs heads that are trained: co_detr.auxiliary and"
            " co_detr.auxiliary_losses",
        )
        require(
            0 < self.short_side <= self.long_side,
            "short_side must be positive and not exceed long_side; got"
            f" {self.short_side} and {self.long_side}",
        )
        require(
            not self.fit.validate_every,
            "fit.validate_every is a setting of the adaptation; coin-ray detector"
            " measures the val images once, at its end",
        )
        require(
            self.evaluate_batch > 0,
            f"evaluate_batch must be positive; got {self.evaluate_batch}",
        )
        if self.model == "co-detr":
            require(
                not self.network,
                "--network goes with --model rt-detr-v2 or d-fine; a Co-DETR has"
                " --backbone.name",
            )
        else:
            self._check_real_time_model()

    def _check_batch(self) -> None:
        worker_batch = self.fit.batch // self.fit.workers
        require(
            self.accumulate > 0 and worker_batch % self.accumulate == 0,
            f"accumulate {self.accumulate} must divide a worker's batch"
            f" ({worker_batch} images)",
        )
        require(
            self.fit.max_workers is None or self.accumulate == 1,
            "accumulate needs a fixed number of workers: leave fit.max_workers out",
        )

    def _check_real_time_model(self) -> None:
        """Check the settings that RT-DETRv2 and D-FINE don't have."""
        require(
            bool(self.network),
            f"--model {self.model} needs --network: a name on the Hugging Face hub, or"
            " a folder",
        )
        require(
            set(self.co_detr.auxiliary) <= {"atss"},
            f"--model {self.model} trains with the ATSS head alone: --co-detr.auxiliary"
            " atss, or none",
        )
        require(
            self.ship == "base",
            f"--model {self.model} saves transformers' own folder, without the"
            " auxiliary head: leave --ship out",
        )

    def training_over(self, images: int) -> TrainingConfig:
        """Return the training over this many images, with epochs as steps."""
        if not self.epochs:
            return self.fit
        steps_per_epoch = images / self.fit.batch
        return replace(
            self.fit,
            steps=max(1, round(self.epochs * steps_per_epoch)),
            milestones=tuple(round(epoch * steps_per_epoch) for epoch in self.drops),
            factors=tuple(0.1 ** (n + 1) for n in range(len(self.drops))),
        )

    @property
    def found_intensity_range(self) -> tuple[float, float] | None:
        """Return the range of deep grey images that is set, or that the images step has
        found; None: each image's own.
        """
        return None if self.intensity_range == "auto" else self.intensity_range

    def with_intensity_range(self, found: tuple[float, float]) -> DetectorConfig:
        """Return the config for stages that read images, with the range that the images
        step has found.
        """
        return replace(self, intensity_range=found)

    @property
    def pipeline(self) -> PipelineConfig:
        """Return the config of the stage that reads images."""
        data: DemoScenes | Folder = DemoScenes()
        if self.data not in (DEMO, DEMO_SOURCE):
            val, test = dataset_folder(self.val), dataset_folder(self.test)
            data = Folder(
                dataset_folder(self.data),
                val or None,
                test or None,
                intensity_range=self.intensity_range,
            )
        return PipelineConfig(
            self.preset,
            self.classes,
            data,
            Cloud(),
            tracking=self.tracking,
            seed=self.seed,
        )


def dataset_folder(location: str) -> str:
    """Return ``DIR`` of ``coco:DIR``; other locations unchanged."""
    label_format, colon, folder = location.partition(":")
    return folder if colon and label_format in LABEL_FORMATS else location


def check_trainable(config: DetectorConfig) -> None:
    """Check the settings that a preset leaves open and a training needs.

    Raises ConfigError naming the option to give.
    """
    require(
        bool(config.data),
        "which images? give --data FOLDER, --data FOLDER#SPLIT, --data coco:FOLDER, or"
        " --data demo-source",
    )
    require(bool(config.classes), "which classes? give --classes person,dog")
    if config.data in (DEMO, DEMO_SOURCE):
        require(
            not config.val and not config.test,
            f"--data {config.data} has its own val and test images: leave --val and"
            " --test out",
        )
        require(
            config.classes == DEMO_CLASSES,
            f"the demo's classes are {', '.join(DEMO_CLASSES)}: leave --classes out",
        )
