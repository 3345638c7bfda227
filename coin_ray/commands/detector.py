"""The command line of supervised training: ``train_detector.py --model MODEL --data ...
--classes ... --root DIR [settings]``.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import tyro

from coin_ray import storage
from coin_ray.commands.arguments import reported, split_classes
from coin_ray.config.detector_presets import FAST, PRESETS
from coin_ray.config.detector_training import (
    DEMO,
    DEMO_CLASSES,
    DEMO_SOURCE,
    FORMATS,
    DetectorConfig,
    Model,
    check_runnable,
    folder,
)
from coin_ray.config.files import to_yaml
from coin_ray.errors import ConfigError, InputError
from coin_ray.runs.detector_graph import graph
from coin_ray.runs.steps import Step, execute, finished


@dataclass(frozen=True)
class Options:
    """How to run, beside the settings."""

    root: str
    dry_run: bool


def main(script: str, description: str) -> int:
    """Train and evaluate; returns the exit code. User errors are one message, no
    traceback.
    """

    def work() -> None:
        config, options = parse(sys.argv[1:], script, description)
        train(config, options)

    return reported(work)


def parse(
    arguments: Sequence[str], script: str = "train_detector.py", description: str = ""
) -> tuple[DetectorConfig, Options]:
    """The config and the options of a command line. Raises ConfigError with what to
    change.
    """
    parser = argparse.ArgumentParser(
        prog=script,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        choices=get_args(Model),
        default="co-detr",
        help="what is trained (default: co-detr)",
    )
    parser.add_argument(
        "--preset",
        choices=sorted(PRESETS),
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
    parser.epilog = (
        "Most used settings: --data --val --test --classes a,b --fit.batch N --epochs N"
        " --fit.gpu --co-detr.auxiliary atss --seed N"
    )
    known, rest = parser.parse_known_args(list(arguments))
    rest = split_classes(rest)
    data = _data(rest)
    preset = _preset(known.model, known.preset, data)
    if data in (DEMO, DEMO_SOURCE) and "--classes" not in rest:
        rest += ["--classes", *DEMO_CLASSES]
    arguments = ["--help"] if known.settings else rest
    config = tyro.cli(
        DetectorConfig,
        prog=script,
        default=preset,
        args=arguments,
        config=(tyro.conf.AvoidSubcommands,),
    )
    check_runnable(config)
    return config, Options(
        storage.absolute(known.root or storage.join("runs", known.model)), known.dry_run
    )


def _preset(model: str, name: str | None, data: str) -> DetectorConfig:
    if model == "co-detr":
        return PRESETS[name or ("tiny" if data in (DEMO, DEMO_SOURCE) else "r50")]()
    if name is not None:
        raise ConfigError(
            f"--preset {name} is a Co-DETR; --model {model} takes --network NAME or"
            " --network FOLDER"
        )
    return FAST[model]()


def _data(arguments: Sequence[str]) -> str:
    for argument, following in zip(arguments, [*arguments, ""][1:], strict=True):
        if argument == "--data":
            return following
        if argument.startswith("--data="):
            return argument.removeprefix("--data=")
    return ""


def train(config: DetectorConfig, options: Options) -> dict[str, Any]:
    """Check everything that can be checked before, then do what is missing; returns the
    figures, which ROOT/summary.json holds too.
    """
    steps, root = graph(config), options.root
    done = finished(list(steps.values()), root)
    if "train" not in done:
        counts = check_images(config)
        check_network(config)
        _print_plan(config, steps, done, root, counts)
    if options.dry_run:
        return {}
    _run_missing(config, steps, done, root)
    return _summary(config, steps, done, root)


def check_images(config: DetectorConfig) -> dict[str, Counter[str]]:
    """Images and boxes by class of each part, from the labels alone. Raises InputError
    for what can't be trained on.
    """
    from coin_ray.cloud.label_map import LabelMap
    from coin_ray.data import formats

    if config.data in (DEMO, DEMO_SOURCE):
        return {}
    asked, counts = LabelMap.of_classes(config.classes), {}
    for part, place in (
        ("train", config.data),
        ("val", config.val),
        ("test", config.test),
    ):
        if not place:
            continue
        dataset = formats.read(folder(place))
        expected = place.partition(":")[0]
        if (
            expected in FORMATS
            and folder(place) != place
            and dataset.format != expected
        ):
            raise InputError(
                f"--data {place}: the folder is in the format {dataset.format}, not"
                f" {expected} (docs/formats.md)"
            )
        found = {
            name: match[0]
            for name in dataset.names
            if (match := asked.find([name])) is not None
        }
        annotated = [r for r in dataset.records if r.annotated]
        boxes = Counter(
            config.classes[found[label]]
            for r in annotated
            for label in r.labels
            if label in found
        )
        absent = [name for name in config.classes if not boxes[name]]
        if part == "train" and absent:
            names = ", ".join(sorted(dataset.names))[:300] or "no names"
            raise InputError(
                f"--data {place}: no box of {', '.join(absent)} in {len(annotated)}"
                f" annotated images; its classes are {names}"
            )
        if not boxes:
            raise InputError(
                f"--{part} {place}: no box of {', '.join(config.classes)} in"
                f" {len(annotated)} annotated images"
            )
        counts[part] = Counter({"images": len(annotated), **boxes})
    return counts


def check_network(config: DetectorConfig) -> None:
    """The backbone (or the whole network) and its weights can be had, and so can the
    GPU.
    """
    import torch

    if config.model == "co-detr":
        from coin_ray.models.co_detr.towers import build_backbone

        build_backbone(config.backbone)
    else:
        from coin_ray.models.co_detr.transformers_detr import load_fast

        load_fast(config.network, config.model, config.classes)
    if config.fit.gpu and config.fit.workers == 1 and not torch.cuda.is_available():
        from coin_ray.stages.common.cluster import on_cluster

        if not on_cluster():
            raise ConfigError(
                "fit.gpu is on, but there is no CUDA device: leave it off, or run on a"
                " machine with a GPU"
            )


def _print_plan(
    config: DetectorConfig,
    steps: Mapping[str, Step],
    done: Mapping[str, Any],
    root: str,
    counts: Mapping[str, Counter[str]],
) -> None:
    for name, step in steps.items():
        print(
            f"{name:<9} {'finished' if name in done else 'to do':<9}"
            f" {step.folder(root)}"
        )
    for part, found in counts.items():
        boxes = ", ".join(f"{name} {found[name]}" for name in config.classes)
        print(f"{part}: {found['images']} annotated images; boxes: {boxes}")
    images = counts["train"]["images"] if "train" in counts else 0
    fit = config.fit_over(images) if images else config.fit
    passes = f", {fit.steps * fit.batch / images:.1f} epochs" if images else ""
    print(
        f"training: {fit.steps} steps of {fit.batch} images{passes}, heads:"
        f" {', '.join(config.co_detr.auxiliary) or 'none'}",
        flush=True,
    )


def _run_missing(
    config: DetectorConfig,
    steps: Mapping[str, Step],
    done: dict[str, dict[str, Any]],
    root: str,
) -> None:
    from coin_ray.runs.tracking import Tracker

    missing = [name for name in steps if name not in done]
    if not missing:
        return
    storage.write_bytes(storage.join(root, "config.yaml"), to_yaml(config).encode())
    tracker = Tracker(config, root)
    for name in missing:
        step, start = steps[name], time.monotonic()
        print(f"{name}: started", flush=True)
        digest = str(done.get("images", {}).get("metrics", {}).get("digest", ""))
        with tracker.stage(name, {"fingerprint": step.fingerprint}, digest) as stage:
            done[name] = execute(step, config.pipeline, root)
            stage.finish(done[name]["metrics"], step.folder(root))
        print(f"{name}: finished in {time.monotonic() - start:.0f} s", flush=True)
    tracker.summary(_figures(done["evaluate"]["metrics"]), None)


def _figures(metrics: Mapping[str, Any]) -> dict[str, float]:
    names = ("voc_ap50", "coco_ap50", "coco_ap")
    return {
        f"{split}/{name}": found[name]
        for split, found in metrics.items()
        for name in names
        if found[name] is not None
    }


def _summary(
    config: DetectorConfig,
    steps: Mapping[str, Step],
    done: Mapping[str, Any],
    root: str,
) -> dict[str, Any]:
    from coin_ray.runs.summary import versions

    place, serve = _ship(config, steps["train"].folder(root), root)
    seconds = {name: manifest["seconds"] for name, manifest in done.items()}
    evaluated, training = done["evaluate"]["metrics"], done["train"]["metrics"]
    found = {
        "classes": list(config.classes),
        "seed": config.seed,
        "evaluate": evaluated,
        "train": training,
        "seconds": seconds,
    }
    storage.write_json(
        storage.join(root, "summary.json"),
        found | {"model": place, "versions": versions()},
    )
    for split, figures in evaluated.items():
        shown = ", ".join(
            f"{name} {figures[name]}" for name in ("voc_ap50", "coco_ap50", "coco_ap")
        )
        print(f"{split}: {shown} on {figures['images']} images")
        for head, own in figures.get("heads", {}).items():
            print(
                f"  {head:<9} "
                + ", ".join(
                    f"{name} {own[name]}"
                    for name in ("voc_ap50", "coco_ap50", "coco_ap")
                )
            )
    print(f"serve it: --cloud.serve {serve} --cloud.model {place}")
    return found


def _ship(config: DetectorConfig, trained: str, root: str) -> tuple[str, str]:
    """Copy what was trained to the root; returns its place and how it is served."""
    from coin_ray.predictors.co_detr import FILE
    from coin_ray.predictors.transformers_folder import FOLDER, files

    if config.model == "co-detr":
        place = storage.join(root, FILE)
        storage.write_bytes(place, storage.read_bytes(storage.join(trained, FILE)))
        return place, "checkpoint"
    place = storage.join(root, config.model)
    for name, data in files(storage.join(trained, FOLDER)).items():
        storage.write_bytes(storage.join(place, name), data)
    return place, "transformers"
