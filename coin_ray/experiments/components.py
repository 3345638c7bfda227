"""What Co-DETR's auxiliary heads and positive queries are worth: the same training with
none, each, both, and both with two heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from coin_ray import storage
from coin_ray.config.co_detr import AuxiliaryHead, CoDetr
from coin_ray.config.detector_training import DetectorConfig, SourceScenes
from coin_ray.runs.detector_graph import (
    build_detector_steps,
    run_missing_detector_steps,
)
from coin_ray.runs.lease import hold_root
from coin_ray.runs.steps import Step
from coin_ray.stages.common.detector_checks import check_labelled_images, check_network


@dataclass(frozen=True)
class Components:
    """Which parts of Co-DETR are trained with. ``heads``: their description."""

    heads: str
    auxiliary: tuple[AuxiliaryHead, ...]
    auxiliary_losses: bool
    positive_queries: bool

    def change(self, co_detr: CoDetr) -> CoDetr:
        """Return the settings with these components."""
        return replace(
            co_detr,
            auxiliary=self.auxiliary,
            auxiliary_losses=self.auxiliary_losses,
            positive_queries=self.positive_queries,
        )


VARIANTS = {
    "none": Components("K=0", (), True, True),
    "heads": Components("K=1, ATSS", ("atss",), True, False),
    "queries": Components("K=1, ATSS", ("atss",), False, True),
    "both": Components("K=1, ATSS", ("atss",), True, True),
    "both, two heads": Components(
        "K=2, Faster R-CNN and ATSS", ("rcnn", "atss"), True, True
    ),
}
METRICS = ("voc_ap50", "coco_ap")
QUICK_STEPS, QUICK_SCENES = 10, SourceScenes(train=32, val=16)
TrialFigures = dict[str, Any]
"""``arm``, ``seed``, ``seconds_per_step`` and the metrics of one training."""
ComponentTable = dict[str, dict[str, Any]]
"""By variant ``heads``, ``seconds_per_step``, and ``mean``, ``std`` and ``values`` of each
metric: the contents of components.json."""


@dataclass(frozen=True)
class ComponentTrial:
    """One training. ``scenes``: how many, with the demo's source scenes."""

    variant: str
    seed: int
    config: DetectorConfig
    scenes: SourceScenes | None = None

    @property
    def steps(self) -> dict[str, Step]:
        return build_detector_steps(self.config, self.scenes)

    def run(self, root: str) -> TrialFigures:
        """Train if it is not finished; return the figures on the validation images."""
        manifests = run_missing_detector_steps(
            self.steps, self.config, root, progress=False
        )
        training = manifests["train"]
        seconds = training.seconds / training.metrics["steps"]
        return {
            "arm": self.variant,
            "seed": self.seed,
            **manifests["evaluate"].metrics["val"],
            "seconds_per_step": round(seconds, 3),
        }


@dataclass(frozen=True)
class ComponentStudy:
    """Trainings of every variant with every seed below one root."""

    trials: tuple[ComponentTrial, ...]
    root: str
    dry_run: bool


def build_component_trials(
    config: DetectorConfig, seeds: Sequence[int], scenes: SourceScenes | None = None
) -> tuple[ComponentTrial, ...]:
    """Return the trials seed by seed, so that a cut run has whole rows."""
    trials = []
    for seed in seeds:
        for name, components in VARIANTS.items():
            co_detr = components.change(config.co_detr)
            changed = replace(config, co_detr=co_detr, ship="base", seed=seed)
            trials.append(ComponentTrial(name, seed, changed, scenes))
    return tuple(trials)


def shorten_detector_training(config: DetectorConfig) -> DetectorConfig:
    """Return the config with few steps: whether it runs; its figures mean nothing."""
    training = replace(config.fit, steps=QUICK_STEPS)
    return replace(config, epochs=0.0, drops=(), fit=training)


def run_component_study(study: ComponentStudy) -> None:
    """Run the trials and write components.json and components.md at the root. With
    ``dry_run`` only print what is to do.
    """
    if study.dry_run:
        _print_missing_steps(study)
        return
    config = study.trials[0].config
    check_labelled_images(config)
    check_network(config)
    with hold_root(study.root):
        table = run_component_trials(study.trials, study.root)
        text = format_component_table(table)
        print(text)
        storage.write_json(storage.join(study.root, "components.json"), table)
        storage.write_bytes(storage.join(study.root, "components.md"), text.encode())


def run_component_trials(trials: Sequence[ComponentTrial], root: str) -> ComponentTable:
    """Run what is not finished, one trial after the other; return the table."""
    all_figures = []
    for number, trial in enumerate(trials, start=1):
        figures = trial.run(root)
        all_figures.append(figures)
        print(
            f"[{number}/{len(trials)}] {trial.variant}, seed {trial.seed}: AP50"
            f" {figures['voc_ap50']}",
            flush=True,
        )
    return build_component_table(all_figures)


def build_component_table(all_figures: Sequence[TrialFigures]) -> ComponentTable:
    """Return values, mean and standard deviation (n - 1) of AP by variant."""
    table: ComponentTable = {}
    for name, components in VARIANTS.items():
        by_seed = [figures for figures in all_figures if figures["arm"] == name]
        seconds = fmean(figures["seconds_per_step"] for figures in by_seed)
        table[name] = {
            "heads": components.heads,
            "seconds_per_step": round(seconds, 3),
        }
        for metric in METRICS:
            precisions = [figures[metric] or 0.0 for figures in by_seed]
            spread = stdev(precisions) if len(precisions) > 1 else 0.0
            table[name][metric] = {
                "mean": round(fmean(precisions), 4),
                "std": round(spread, 4),
                "values": precisions,
            }
    return table


def format_component_table(table: ComponentTable) -> str:
    """Return the table as Markdown: AP in points, mean ± standard deviation over seeds."""
    lines = [
        "| trained with | auxiliary heads | AP50 | COCO AP | s / step |",
        "|---|---|---|---|---|",
    ]
    for name, row in table.items():
        precisions = " | ".join(
            f"{100 * row[metric]['mean']:.1f} ± {100 * row[metric]['std']:.1f}"
            for metric in METRICS
        )
        seconds = f"{row['seconds_per_step']:.2f}"
        lines.append(f"| {name} | {row['heads']} | {precisions} | {seconds} |")
    return "\n".join([*lines, ""])


def _print_missing_steps(study: ComponentStudy) -> None:
    for trial in study.trials:
        missing_steps = [
            name
            for name, step in trial.steps.items()
            if not step.is_finished(study.root)
        ]
        steps = ", ".join(missing_steps) or "nothing"
        print(f"{trial.variant}, seed {trial.seed}: to do {steps}")
