"""What a search is asked to do, and the steps its trials share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.config.files import fingerprint
from coin_ray.config.optional_dependencies import check_installed
from coin_ray.errors import ConfigError, InputError
from coin_ray.evaluation.label_free import SURE, expected_boxes
from coin_ray.experiments.grid import Job
from coin_ray.experiments.variants import shortened
from coin_ray.runs.graph import graph
from coin_ray.runs.runner import up_to
from coin_ray.runs.steps import Step
from coin_ray.search.lineage import Look, scheduled
from coin_ray.search.needs import has_validation
from coin_ray.search.space import CHANGEABLE, Space, apply, space_of
from coin_ray.stages.common.teacher_outputs import fused_opinions, held_out, image_table
from coin_ray.stages.common.validation import validation_truth
from coin_ray.tables import Truth

Objective = Literal["map50", "label-free"]
Algorithm = Literal["optuna", "random", "bohb", "population"]
Scheduler = Literal["asha", "none"]

FULL = 9
"""A training counts nine parts; trials are compared after the first, the third and the
last."""
LOOKS = (1, 3)
HELD_OUT = 0.2
"""Share of the training images that a label-free search keeps from training, to judge
by."""
FEWEST_MEMBERS = 4
"""Of a population: the worst quarter copies the best quarter."""
FEWEST_EXPECTED = 10
"""Held-out boxes that the teachers are sure of below which nothing can be judged."""


@dataclass(frozen=True)
class Search:
    """``config``: the preset as it is, with all its steps. ``steps_share``: of the
    distillation's steps, made by each trial.
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
        for name, number in (
            ("--trials", self.trials),
            ("--concurrent", self.concurrent),
        ):
            if number is not None and number < 1:
                raise ConfigError(f"{name} must be at least 1; got {number}")
        if not 0 < self.steps_share <= 1:
            raise ConfigError(
                f"--steps-share must lie in 0..1, and above 0; got {self.steps_share}"
            )
        fit = self.config.distill.fit
        if fit.workers > 1 or fit.max_workers is not None:
            raise ConfigError(
                "a trial trains in one process, and several trials run at once: leave"
                " --distill.fit.workers at 1 and give --concurrent instead; got"
                f" {fit.workers} workers"
                + (f", at most {fit.max_workers}" if fit.max_workers else "")
            )
        if self.objective == "map50" and not has_validation(self.config):
            raise ConfigError(
                "--objective map50 needs labelled validation images: give --val DIR, or"
                " --objective label-free"
            )
        self._check_population()
        _ = self.space

    def _check_population(self) -> None:
        if not self.population:
            return
        if self.scheduler != "none":
            raise ConfigError(
                "--algorithm population stops no trial, its worst members copy its"
                f" best: leave out --scheduler {self.scheduler}"
            )
        if self.trials < FEWEST_MEMBERS:
            raise ConfigError(
                f"--algorithm population needs --trials {FEWEST_MEMBERS} or more, its"
                f" members; got {self.trials}"
            )
        fixed = [name for name in self.space if name not in CHANGEABLE]
        if fixed:
            raise ConfigError(
                "--algorithm population changes settings within a training, and only"
                f" loss weights can: {', '.join(fixed)} can not. Give --space"
                " loss-weights, or another --algorithm"
            )
        steps = self.trial_config({}).distill.fit.steps
        if steps < FULL:
            raise ConfigError(
                "--algorithm population compares its members after each ninth of"
                f" {steps} steps: there must be {FULL} or more"
            )

    @property
    def space(self) -> Space:
        return space_of(self.space_name, self.config)

    @property
    def population(self) -> bool:
        return self.algorithm == "population"

    @property
    def folder(self) -> str:
        """Everything of the search but the steps, which lie where the pipeline's do."""
        return storage.join(
            self.root,
            "search",
            f"{self.space_name}-{self.objective}{'-population' * self.population}",
        )

    @property
    def asked(self) -> dict[str, Any]:
        """What must be the same to go on with a search."""
        return {
            "configuration": fingerprint(self.config),
            "--space": self.space_name,
            "--objective": self.objective,
            "--algorithm": self.algorithm,
            "--scheduler": self.scheduler,
            "--trials": self.trials,
            "--steps-share": self.steps_share,
        }

    def full_config(
        self, settings: Mapping[str, Any], line: Sequence[Look] = ()
    ) -> PipelineConfig:
        """The preset with a trial's settings; with those of a member of a population,
        which has come through ``line``.
        """
        return scheduled(apply(self.config, settings), line, FULL)

    def trial_config(
        self, settings: Mapping[str, Any], line: Sequence[Look] = ()
    ) -> PipelineConfig:
        """As long as the trials are."""
        config = apply(self.config, settings)
        short = (
            config
            if self.steps_share == 1
            else replace(config, distill=shortened(config, self.steps_share).distill)
        )
        return scheduled(short, line, FULL)

    def steps(
        self, settings: Mapping[str, Any], line: Sequence[Look] = ()
    ) -> dict[str, Step]:
        """A trial's steps up to its distillation; the pipeline's own, unless images are
        held out.
        """
        steps = up_to(graph(self.trial_config(settings, line)), "distill")
        if self.objective == "label-free":
            steps["distill"] = replace(steps["distill"], options={"held_out": HELD_OUT})
        return steps

    @property
    def shared(self) -> dict[str, Step]:
        """Steps before any distillation, as the preset makes them."""
        return {
            name: step for name, step in self.steps({}).items() if name != "distill"
        }

    def prepare(self) -> None:
        """Do the shared steps that are missing.

        Raises ConfigError if they or the trials need packages that are missing,
        InputError if their results leave nothing to judge trials by.
        """
        missing = [
            step for step in self.shared.values() if step.manifest(self.root) is None
        ]
        check_installed(self.config, {step.name for step in missing} | {"distill"})
        for step in missing:
            print(f"{step.name}: started", flush=True)
            Job(step.name, self.config, (step,)).run(self.root)
        if self.objective == "map50" and not self.validation():
            raise InputError(
                "the validation images are annotated, but with no object of the asked"
                " classes: nothing can be measured on them"
            )
        if self.objective == "label-free":
            count = sum(
                int((~truth.difficult).sum()) for truth in self.expected().values()
            )
            if count < FEWEST_EXPECTED:
                raise InputError(
                    "a label-free search judges by held-out boxes to which both"
                    f" teachers together give {SURE} or more, and needs"
                    f" {FEWEST_EXPECTED} of them; there are {count}. Give more images,"
                    " or labelled ones with --val DIR"
                )

    def expected(self) -> dict[str, Truth]:
        """What people, or the free fusion of both teachers, say of the held-out images:
        the same for all trials.
        """
        folders = {name: step.folder(self.root) for name, step in self.shared.items()}
        train = image_table(folders["images"], "train")["image_id"].to_pylist()
        found = fused_opinions(
            [image for image in train if held_out(image, HELD_OUT)],
            folders,
            self.config,
        )
        return {image: expected_boxes(said) for image, said in found.items()}

    def validation(self) -> dict[str, Truth]:
        """Truth of the validation images; empty if they have none."""
        return validation_truth(self.shared["images"].folder(self.root))
