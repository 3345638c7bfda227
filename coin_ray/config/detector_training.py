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
from coin_ray.errors import ConfigError

DEMO, DEMO_SOURCE = "demo", "demo-source"
DEMO_CLASSES = ("bird", "bug", "car", "cat", "flower", "fruit", "house", "person")
Model = Literal["co-detr", "rt-detr-v2", "d-fine"]
FORMATS = ("coco", "voc", "yolo", "kitti", "bdd100k", "cityscapes")


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
    """One training scene in so many is in the target's style."""


@dataclass(frozen=True)
class DetectorConfig:
    """Everything one training depends on."""

    preset: str
    classes: tuple[str, ...] = ()
    data: str = ""
    """Labelled training images: ``FOLDER`` or ``FOLDER#SPLIT`` in any format of
    docs/formats.md, ``coco:FOLDER`` to insist on one, or ``demo-source`` or ``demo``:
    labelled scenes of the demo.
    """
    val: str = ""
    """Labelled images to evaluate on, as ``data``. Empty: a tenth of the training
    images, chosen by their content, is held out."""
    test: str = ""
    """Labelled images to evaluate on as well."""
    model: Model = field(default="co-detr", metadata={"identity": False})
    network: str = field(default="", metadata={"identity": False})
    """RT-DETRv2 or D-FINE of transformers to train: its name on the Hugging Face hub,
    or its folder."""
    co_detr: CoDetr = field(default_factory=CoDetr)
    backbone: Backbone = field(default_factory=Backbone)
    fit: TrainingConfig = field(default_factory=TrainingConfig)
    """``steps`` and ``milestones`` count unless ``epochs`` is given.
    ``visual_lr_factor`` is the backbone's."""
    epochs: float = 0.0
    """Instead of ``fit.steps``; 0: those count."""
    drops: tuple[float, ...] = ()
    """Epochs after which the learning rate falls to a tenth, with ``epochs``."""
    accumulate: int = 1
    """Parts in which a batch passes through the network one after the other, to save
    memory."""
    average: float = 0.0
    """Share of the trained weights in averaged ones per step (EMA), which are then
    evaluated and shipped. 0: no averaging."""
    ship: Literal["base", "heads", "agreement"] = field(
        default="base", metadata={"identity": False}
    )
    """What ``co_detr.pt`` holds. base: the detector alone. heads: its auxiliary heads
    too, and each of them is evaluated. agreement: the same, and the confidence that is
    reported is the one that all heads share.
    """
    short_side: int = 800
    long_side: int = 1333
    tracking: Tracking = field(default_factory=Tracking, metadata={"identity": False})
    seed: int = 0
    evaluate_batch: int = runtime_only(8)
    """Images at once through the network in evaluation."""

    def __post_init__(self) -> None:
        parts = (
            self.fit.batch / self.fit.workers / self.accumulate
            if self.accumulate > 0
            else 0
        )
        _check(
            parts == int(parts) and parts > 0,
            f"accumulate {self.accumulate} must divide a worker's batch"
            f" ({self.fit.batch} images)",
        )
        _check(
            self.fit.max_workers is None or self.accumulate == 1,
            "accumulate needs equal shares: leave out fit.max_workers",
        )
        _check(0 <= self.average < 1, f"average must lie in 0..1; got {self.average}")
        _check(
            self.epochs >= 0,
            f"epochs must be positive, or 0 for fit.steps; got {self.epochs}",
        )
        _check(
            all(0 < d < self.epochs for d in self.drops) or not self.epochs,
            f"drops {self.drops} must lie within {self.epochs} epochs",
        )
        kept = self.ship == "base" or (
            self.co_detr.auxiliary and self.co_detr.auxiliary_losses
        )
        _check(
            bool(kept),
            f"ship {self.ship} needs heads that are trained: co_detr.auxiliary and"
            " co_detr.auxiliary_losses",
        )
        _check(
            0 < self.short_side <= self.long_side,
            "short_side must be positive and not exceed long_side",
        )
        _check(
            not self.fit.validate_every,
            "validate_every is for adaptation: train_detector.py measures the val"
            " images once, at its end",
        )
        _check(
            self.evaluate_batch > 0,
            f"evaluate_batch must be positive; got {self.evaluate_batch}",
        )

        self._check_fast()

    def _check_fast(self) -> None:
        """Settings that RT-DETRv2 and D-FINE don't have."""
        if self.model == "co-detr":
            _check(
                not self.network,
                "--network goes with --model rt-detr-v2 or d-fine; a Co-DETR has"
                " --backbone.name",
            )
            return
        _check(
            bool(self.network),
            f"--model {self.model} needs --network: a name on the Hugging Face hub, or"
            " a folder",
        )
        _check(
            set(self.co_detr.auxiliary) <= {"atss"},
            f"--model {self.model} trains with the ATSS head alone: --co-detr.auxiliary"
            " atss, or none",
        )
        _check(
            self.ship == "base",
            f"--model {self.model} ships transformers' own folder, without the"
            " auxiliary head: leave --ship out",
        )

    def fit_over(self, images: int) -> TrainingConfig:
        """The optimisation over so many images: epochs as steps."""
        if not self.epochs:
            return self.fit
        per_epoch = images / self.fit.batch
        steps = max(1, round(self.epochs * per_epoch))
        milestones = tuple(round(d * per_epoch) for d in self.drops)
        factors = tuple(0.1 ** (n + 1) for n in range(len(self.drops)))
        return replace(self.fit, steps=steps, milestones=milestones, factors=factors)

    @property
    def pipeline(self) -> PipelineConfig:
        """What the stage that reads images needs."""
        data = (
            DemoScenes()
            if self.data in (DEMO, DEMO_SOURCE)
            else Folder(
                folder(self.data), folder(self.val) or None, folder(self.test) or None
            )
        )
        return PipelineConfig(
            self.preset,
            self.classes,
            data,
            Cloud(),
            tracking=self.tracking,
            seed=self.seed,
        )


def folder(place: str) -> str:
    """``coco:DIR`` without the format."""
    name, colon, rest = place.partition(":")
    return rest if colon and name in FORMATS else place


def check_runnable(config: DetectorConfig) -> None:
    """What a preset may leave open and a training needs. Raises ConfigError naming the
    option to give.
    """
    _check(
        bool(config.data),
        "which images? give --data FOLDER, --data FOLDER#SPLIT, --data coco:FOLDER, or"
        " --data demo-source",
    )
    _check(bool(config.classes), "which classes? give --classes person,dog")
    if config.data in (DEMO, DEMO_SOURCE):
        _check(
            not config.val and not config.test,
            f"--data {config.data} brings its own val and test images: leave --val and"
            " --test out",
        )
        _check(
            config.classes == DEMO_CLASSES,
            f"the demo's classes are {', '.join(DEMO_CLASSES)}: leave --classes out",
        )


def _check(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
