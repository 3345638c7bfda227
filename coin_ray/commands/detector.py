"""``coin-ray detector --model MODEL --data ... --classes ... --root DIR [settings]``."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, get_args

from coin_ray import storage
from coin_ray.commands.arguments import split_class_names
from coin_ray.config.data import DEMO_CLASSES
from coin_ray.config.detector_presets import DETECTOR_PRESETS, REAL_TIME_PRESETS
from coin_ray.config.detector_training import (
    DEMO,
    DEMO_SOURCE,
    DetectorConfig,
    DetectorModel,
    check_trainable,
)
from coin_ray.errors import ConfigError

if TYPE_CHECKING:
    from coin_ray.runs.steps import Manifest, Step
    from coin_ray.stages.common.detector_checks import BoxCounts

DESCRIPTION = """\
Train Co-DETR on labelled images, evaluate it, and write it as one file that can be
served as a cloud.

Or RT-DETRv2 or D-FINE of transformers with Co-DETR's ATSS head beside them, as the
folder that transformers reads.

    coin-ray detector --data coco:DIR --val coco:DIR2 --classes person,dog --root RUN
    coin-ray detector --data 'DIR#train' --val 'DIR#val' --classes person,dog --fit.gpu
    coin-ray detector --data demo-source --root RUN
    coin-ray detector --model d-fine --network FOLDER --data coco:DIR --classes person

Every format of docs/formats.md is read. The same command resumes a killed run.
Results: RUN/co_detr.pt or RUN/d-fine, RUN/summary.json and MLflow.
"""
METRICS = ("voc_ap50", "coco_ap50", "coco_ap")


@dataclass(frozen=True)
class DetectorOptions:
    """How to run, beside the settings."""

    root: str
    dry_run: bool


def detector(arguments: Sequence[str]) -> None:
    """Train and evaluate a detector."""
    config, options = parse_detector_arguments(
        arguments, "coin-ray detector", DESCRIPTION
    )
    train_detector(config, options)


def parse_detector_arguments(
    arguments: Sequence[str],
    program: str = "coin-ray detector",
    description: str = "",
) -> tuple[DetectorConfig, DetectorOptions]:
    """Return the config and the options of a command line. Raise ConfigError with what
    to change.
    """
    parser = build_detector_parser(program, description)
    options, setting_arguments = parser.parse_known_args(list(arguments))
    setting_arguments = split_class_names(setting_arguments)
    data = _find_data(setting_arguments)
    preset = _build_preset(options.model, options.preset, data)
    if data in (DEMO, DEMO_SOURCE) and "--classes" not in setting_arguments:
        setting_arguments += ["--classes", *DEMO_CLASSES]
    if options.settings:
        setting_arguments = ["--help"]
    import tyro

    config = tyro.cli(
        DetectorConfig,
        prog=program,
        default=preset,
        args=setting_arguments,
        config=(tyro.conf.AvoidSubcommands,),
    )
    check_trainable(config)
    root = options.root or storage.join("runs", options.model)
    return config, DetectorOptions(storage.absolute_uri(root), options.dry_run)


def build_detector_parser(program: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of all options that are no settings of the preset."""
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog=(
            "Most used settings: --data --val --test --classes a,b --fit.batch N"
            " --epochs N --fit.gpu --co-detr.auxiliary atss --seed N"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        choices=get_args(DetectorModel),
        default="co-detr",
        help="what is trained (default: co-detr)",
    )
    parser.add_argument(
        "--preset",
        choices=sorted(DETECTOR_PRESETS),
        help="default: tiny for the demo's scenes, else r50",
    )
    parser.add_argument(
        "--root",
        help="folder or URI of everything the run writes (default: runs/co-detr)",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check settings, images and classes, print the steps, and stop",
    )
    parser.add_argument(
        "--settings", action="store_true", help="list all settings of the preset"
    )
    return parser


def _build_preset(model: str, name: str | None, data: str) -> DetectorConfig:
    if model == "co-detr":
        default = "tiny" if data in (DEMO, DEMO_SOURCE) else "r50"
        return DETECTOR_PRESETS[name or default]()
    if name is not None:
        raise ConfigError(
            f"--preset {name} is a Co-DETR; --model {model} takes --network NAME or"
            " --network FOLDER"
        )
    return REAL_TIME_PRESETS[model]()


def _find_data(arguments: Sequence[str]) -> str:
    """Return what ``--data`` names, or an empty text."""
    for argument, following in pairwise([*arguments, ""]):
        if argument == "--data":
            return following
        if argument.startswith("--data="):
            return argument.removeprefix("--data=")
    return ""


def train_detector(config: DetectorConfig, options: DetectorOptions) -> dict[str, Any]:
    """Check everything that can be checked first, then run the missing steps; return
    the figures, which ROOT/summary.json holds too.
    """
    from coin_ray.config.yaml_files import to_yaml
    from coin_ray.runs.detector_graph import (
        build_detector_steps,
        run_missing_detector_steps,
    )
    from coin_ray.runs.environment import check_environment
    from coin_ray.runs.lease import hold_root
    from coin_ray.runs.runner import open_tracker
    from coin_ray.stages.common.detector_checks import (
        check_labelled_images,
        check_network,
    )

    steps, root = build_detector_steps(config), options.root
    if not steps["train"].is_finished(root):
        counts = check_labelled_images(config)
        check_network(config)
        _print_plan(config, steps, root, counts)
    if options.dry_run:
        return {}
    with ExitStack() as holding:
        if not all(step.is_finished(root) for step in steps.values()):
            check_environment(root)
            holding.enter_context(hold_root(root))
            config_file = storage.join(root, "config.yaml")
            storage.write_bytes(config_file, to_yaml(config).encode())
        tracker = open_tracker(steps.values(), config, root)
        manifests = run_missing_detector_steps(steps, config, root, tracker=tracker)
        if tracker is not None:
            tracker.log_summary(_summary_figures(manifests["evaluate"].metrics), None)
        return _write_summary(config, steps["train"].folder(root), manifests, root)


def _print_plan(
    config: DetectorConfig, steps: Mapping[str, Step], root: str, counts: BoxCounts
) -> None:
    for name, step in steps.items():
        state = "finished" if step.is_finished(root) else "to do"
        print(f"{name:<9} {state:<9} {step.folder(root)}")
    for split, box_counts in counts.items():
        boxes = ", ".join(f"{name} {box_counts[name]}" for name in config.classes)
        print(f"{split}: {box_counts['images']} annotated images; boxes: {boxes}")
    images = counts["train"]["images"] if "train" in counts else 0
    training, epochs = config.fit, ""
    if images:
        training = config.training_over(images)
        epochs = f", {training.steps * training.batch / images:.1f} epochs"
    heads = ", ".join(config.co_detr.auxiliary) or "none"
    print(
        f"training: {training.steps} steps of {training.batch} images{epochs}, heads:"
        f" {heads}",
        flush=True,
    )


def _summary_figures(evaluation: Mapping[str, Any]) -> dict[str, float]:
    return {
        f"{split}/{name}": figures[name]
        for split, figures in evaluation.items()
        for name in METRICS
        if figures[name] is not None
    }


def _write_summary(
    config: DetectorConfig,
    training_folder: str,
    manifests: Mapping[str, Manifest],
    root: str,
) -> dict[str, Any]:
    """Write ROOT/summary.json and print the figures, which are returned."""
    from coin_ray.runs.summary import package_versions

    model, serve = _copy_model(config, training_folder, root)
    evaluation = manifests["evaluate"].metrics
    summary = {
        "classes": list(config.classes),
        "seed": config.seed,
        "evaluate": evaluation,
        "train": manifests["train"].metrics,
        "seconds": {name: manifest.seconds for name, manifest in manifests.items()},
    }
    storage.write_json(
        storage.join(root, "summary.json"),
        summary | {"model": model, "versions": package_versions()},
    )
    for split, figures in evaluation.items():
        print(f"{split}: {_format_metrics(figures)} on {figures['images']} images")
        for head, head_figures in figures.get("heads", {}).items():
            print(f"  {head:<9} {_format_metrics(head_figures)}")
    print(f"serve it: --cloud.serve {serve} --cloud.model {model}")
    return summary


def _format_metrics(figures: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {figures[name]}" for name in METRICS)


def _copy_model(
    config: DetectorConfig, training_folder: str, root: str
) -> tuple[str, str]:
    """Copy the trained model to the root; return its URI and how it is served."""
    from coin_ray.predictors.co_detr import CO_DETR_FILE
    from coin_ray.predictors.transformers_folder import TRANSFORMERS_FOLDER, read_files

    if config.model == "co-detr":
        model = storage.join(root, CO_DETR_FILE)
        storage.write_bytes(
            model, storage.read_bytes(storage.join(training_folder, CO_DETR_FILE))
        )
        return model, "checkpoint"
    model = storage.join(root, config.model)
    for name, content in read_files(
        storage.join(training_folder, TRANSFORMERS_FOLDER)
    ).items():
        storage.write_bytes(storage.join(model, name), content)
    return model, "transformers"
