"""What a search does: its settings, and the steps that its trials share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.config.fingerprints import fingerprint
from coin_ray.config.optional_dependencies import check_installed
from coin_ray.errors import ConfigError, InputError
from coin_ray.evaluation.label_free import CONFIDENT_SCORE, confident_detections
from coin_ray.experiments.variants import shorten_training
from coin_ray.runs.changed_images import reopen_if_changed
from coin_ray.runs.graph import build_steps
from coin_ray.runs.runner import (
    ask_failed_images,
    run_missing_steps,
    select_steps,
)
from coin_ray.runs.steps import Step
from coin_ray.search.requirements import has_validation_images
from coin_ray.search.space import Settings, Space, apply_settings, build_space
from coin_ray.stages.common.image_tables import read_images
from coin_ray.stages.common.teacher_outputs import fuse_teacher_labels
from coin_ray.stages.common.training_labels import is_held_out
from coin_ray.stages.common.validation import read_validation_annotations
from coin_ray.tables import Truth

Objective = Literal["map50", "label-free"]
Algorithm = Literal["optuna", "random"]
Scheduler = Literal["asha", "none"]

PARTS = 9
"""A training counts nine parts; trials are compared after the first, the third and the
last."""
RUNGS = (1, 3)
"""Parts after which ASHA may stop a trial."""
HELD_OUT_SHARE = 0.2
"""Share of the training images that a label-free search keeps from training, to judge
by."""
MIN_EXPECTED_BOXES = 10
"""Fewer held-out boxes that the teachers are sure of can judge nothing."""


@dataclass(frozen=True)
class Search:
    """A search: ``config`` is the preset as it is, with all its steps; each trial makes
    ``steps_share`` of the distillation's steps.
    """

    config: PipelineConfig
    root: str
    space_name: str
    objective: Objective
    algorithm: Algorithm = "optuna"
    scheduler: Scheduler = "asha"
    trials: int = 16
    steps_share: float = 1.0
    concurrent: int | None = None
    """Trials at once; None: as many as there are CPUs (GPUs, if ``fit.gpu``)."""

    def __post_init__(self) -> None:
        for name, count in (
            ("--trials", self.trials),
            ("--concurrent", self.concurrent),
        ):
            if count is not None and count < 1:
                raise ConfigError(f"{name} must be at least 1; got {count}")
        if not 0 < self.steps_share <= 1:
            raise ConfigError(
                f"--steps-share must lie in 0..1, and above 0; got {self.steps_share}"
            )
        self._check_workers()
        if self.objective == "map50" and not has_validation_images(self.config):
            raise ConfigError(
                "--objective map50 needs labelled validation images: give --val DIR, or"
                " --objective label-free"
            )
        _ = self.space

    def _check_workers(self) -> None:
        training = self.config.distill.fit
        if training.workers == 1 and training.max_workers is None:
            return
        at_most = f", at most {training.max_workers}" if training.max_workers else ""
        raise ConfigError(
            "a trial trains in one process, and several trials run at once: leave"
            " --distill.fit.workers at 1 and give --concurrent instead; got"
            f" {training.workers} workers{at_most}"
        )

    @property
    def space(self) -> Space:
        return build_space(self.space_name, self.config)

    @property
    def folder(self) -> str:
        """The folder of everything but the steps, which lie where the pipeline's do."""
        name = f"{self.space_name}-{self.objective}"
        return storage.join(self.root, "search", name)

    @property
    def identity(self) -> dict[str, Any]:
        """The options that must be the same to resume a search."""
        return {
            "configuration": fingerprint(self.config),
            "--space": self.space_name,
            "--objective": self.objective,
            "--algorithm": self.algorithm,
            "--scheduler": self.scheduler,
            "--trials": self.trials,
            "--steps-share": self.steps_share,
        }

    def full_config(self, settings: Settings) -> PipelineConfig:
        """Return the preset with a trial's settings, at full length."""
        return apply_settings(self.config, settings)

    def trial_config(self, settings: Settings) -> PipelineConfig:
        """Return the preset with a trial's settings, as long as the trials are."""
        config = self.full_config(settings)
        if self.steps_share == 1:
            return config
        short = shorten_training(config, self.steps_share)
        return replace(config, distill=short.distill)

    def steps(self, settings: Settings) -> dict[str, Step]:
        """Return a trial's steps up to its distillation: the pipeline's own, unless
        images are held out.
        """
        steps = select_steps(build_steps(self.trial_config(settings)), "distill")
        if self.objective == "label-free":
            options = {"held_out": HELD_OUT_SHARE}
            steps["distill"] = replace(steps["distill"], options=options)
        return steps

    @property
    def shared_steps(self) -> dict[str, Step]:
        """The steps before any distillation, as the preset makes them."""
        steps = self.steps({})
        return {name: step for name, step in steps.items() if name != "distill"}

    def run_shared_steps(self) -> None:
        """Run the shared steps that are not finished; ask again about failed images.

        Raise ConfigError if they or the trials need packages that are missing,
        InputError if their results leave nothing to judge trials by.
        """
        reopen_if_changed(self.shared_steps.values(), self.root)
        if self.shared_steps["images"].is_finished(self.root):
            ask_failed_images(self.shared_steps, self.config, self.root)
        missing_steps = [
            step
            for step in self.shared_steps.values()
            if not step.is_finished(self.root)
        ]
        names = {step.name for step in missing_steps} | {"distill"}
        check_installed(self.config, names)
        run_missing_steps(self.shared_steps.values(), self.config, self.root)
        self._check_judgeable()

    def _check_judgeable(self) -> None:
        if self.objective == "map50":
            if not self.validation_truth():
                raise InputError(
                    "the validation images are annotated, but contain no object of the"
                    " requested classes: nothing can be measured on them"
                )
            return
        count = sum(
            int((~truth.difficult).sum()) for truth in self.expected_truth().values()
        )
        if count < MIN_EXPECTED_BOXES:
            raise InputError(
                "a label-free search judges by held-out boxes to which both"
                f" teachers together give {CONFIDENT_SCORE} or more, and needs"
                f" {MIN_EXPECTED_BOXES} of them; there are {count}. Give more images,"
                " or labelled ones with --val DIR"
            )

    def expected_truth(self) -> dict[str, Truth]:
        """Return what people, or the free fusion of both teachers, say of the held-out
        images: the same for all trials.
        """
        folders = {
            name: step.folder(self.root) for name, step in self.shared_steps.items()
        }
        image_ids = read_images(folders["images"], "train")["image_id"].to_pylist()
        held_out_ids = [
            image_id for image_id in image_ids if is_held_out(image_id, HELD_OUT_SHARE)
        ]
        fused_detections = fuse_teacher_labels(held_out_ids, folders, self.config)
        return {
            image_id: confident_detections(detections)
            for image_id, detections in fused_detections.items()
        }

    def validation_truth(self) -> dict[str, Truth]:
        """Return the truth of the validation images; empty if they have none."""
        return read_validation_annotations(
            self.shared_steps["images"].folder(self.root)
        )
