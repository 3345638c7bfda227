"""What Co-DETR's auxiliary heads and positive queries are worth: the same training with
none, each, both, and both with two heads.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any

from coin_ray import storage
from coin_ray.commands.arguments import reported
from coin_ray.commands.detector import Options, check_images, check_network, parse
from coin_ray.config.detector_training import DEMO_SOURCE, DetectorConfig, SourceScenes
from coin_ray.errors import ConfigError
from coin_ray.runs.detector_graph import graph
from coin_ray.runs.steps import execute, finished

SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "none": (
        "K=0",
        {"auxiliary": (), "auxiliary_losses": True, "positive_queries": True},
    ),
    "heads": (
        "K=1, ATSS",
        {"auxiliary": ("atss",), "auxiliary_losses": True, "positive_queries": False},
    ),
    "queries": (
        "K=1, ATSS",
        {"auxiliary": ("atss",), "auxiliary_losses": False, "positive_queries": True},
    ),
    "both": (
        "K=1, ATSS",
        {"auxiliary": ("atss",), "auxiliary_losses": True, "positive_queries": True},
    ),
    "both, two heads": (
        "K=2, Faster R-CNN and ATSS",
        {
            "auxiliary": ("rcnn", "atss"),
            "auxiliary_losses": True,
            "positive_queries": True,
        },
    ),
}
"""By what is trained with: the heads, and the settings."""
QUICK_STEPS, QUICK_SCENES = 10, SourceScenes(train=32, val=16)


@dataclass(frozen=True)
class Arm:
    """One training. ``scenes``: how many, with the demo's source scenes."""

    name: str
    seed: int
    config: DetectorConfig
    scenes: SourceScenes | None = None

    def run(self, root: str) -> dict[str, Any]:
        """Its figures on the held-out images, from ``root`` if it is finished."""
        steps = graph(self.config, self.scenes)
        done = finished(list(steps.values()), root)
        for name, step in steps.items():
            if name not in done:
                done[name] = execute(step, self.config.pipeline, root)
        seconds = done["train"]["seconds"] / done["train"]["metrics"]["steps"]
        return {
            "arm": self.name,
            "seed": self.seed,
            **done["evaluate"]["metrics"]["val"],
            "seconds_per_step": round(seconds, 3),
        }


def arms(
    config: DetectorConfig, seeds: Sequence[int], scenes: SourceScenes | None = None
) -> list[Arm]:
    """Seed by seed, so that a cut run has whole rows."""
    return [
        Arm(
            name,
            seed,
            replace(
                config,
                co_detr=replace(config.co_detr, **changes),
                ship="base",
                seed=seed,
            ),
            scenes,
        )
        for seed in seeds
        for name, (_, changes) in SETTINGS.items()
    ]


def run(chosen: Sequence[Arm], root: str) -> dict[str, dict[str, Any]]:
    """Do what is missing, one after the other; returns the table."""
    found = []
    for number, arm in enumerate(chosen, start=1):
        found.append(arm.run(root))
        print(
            f"[{number}/{len(chosen)}] {arm.name}, seed {arm.seed}: AP50"
            f" {found[-1]['voc_ap50']}",
            flush=True,
        )
    return table(found)


def table(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Values, mean and standard deviation (n - 1) of AP by arm."""
    rows: dict[str, dict[str, Any]] = {}
    for name, (heads, _) in SETTINGS.items():
        own = [f for f in found if f["arm"] == name]
        values = {key: [f[key] or 0.0 for f in own] for key in ("voc_ap50", "coco_ap")}
        rows[name] = {
            "heads": heads,
            "seconds_per_step": round(fmean(f["seconds_per_step"] for f in own), 3),
        }
        for key, numbers in values.items():
            spread = stdev(numbers) if len(numbers) > 1 else 0.0
            rows[name][key] = {
                "mean": round(fmean(numbers), 4),
                "std": round(spread, 4),
                "values": numbers,
            }
    return rows


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """AP in points, mean ± standard deviation over seeds."""
    lines = [
        "| trained with | auxiliary heads | AP50 | COCO AP | s / step |",
        "|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        texts = [
            f"{100 * row[key]['mean']:.1f} ± {100 * row[key]['std']:.1f}"
            for key in ("voc_ap50", "coco_ap")
        ]
        lines.append(
            f"| {name} | {row['heads']} | {' | '.join(texts)} |"
            f" {row['seconds_per_step']:.2f} |"
        )
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str], script: str, description: str) -> int:
    """Train every arm and print the table; returns the exit code. User errors are one
    message, no traceback.
    """
    return reported(lambda: study(*requested(arguments, script, description)))


def requested(
    arguments: Sequence[str], script: str, description: str
) -> tuple[list[Arm], Options]:
    """The arms of a command line: the table's own options, and train_detector.py's.
    Raises ConfigError with what to change.
    """
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS
    )
    own = parser.add_argument_group("options of the table")
    own.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2"
    )
    own.add_argument(
        "--quick",
        action="store_true",
        help="few steps and one seed: does it run? The figures mean nothing",
    )
    known, rest = parser.parse_known_args(list(arguments))
    rest += (
        []
        if any(word.partition("=")[0] == "--data" for word in rest)
        else ["--data", DEMO_SOURCE]
    )
    config, options = parse(rest, script, f"{description}\n\n{parser.format_help()}")
    if config.model != "co-detr":
        raise ConfigError(f"the table is Co-DETR's: leave --model {config.model} out")
    if config.seed:
        raise ConfigError(
            "the table has several seeds: give --seeds 0 1 2 instead of --seed"
        )
    if not known.quick:
        return arms(config, known.seeds), options
    few = replace(
        config, epochs=0.0, drops=(), fit=replace(config.fit, steps=QUICK_STEPS)
    )
    return arms(few, known.seeds[:1], QUICK_SCENES), options


def study(chosen: Sequence[Arm], options: Options) -> None:
    """Leaves components.json and components.md at the root. With --dry-run only what is
    to do is said.
    """
    if options.dry_run:
        for arm in chosen:
            steps = graph(arm.config, arm.scenes)
            done = finished(list(steps.values()), options.root)
            print(
                f"{arm.name}, seed {arm.seed}: to do"
                f" {', '.join(name for name in steps if name not in done) or 'nothing'}"
            )
        return
    check_images(chosen[0].config)
    check_network(chosen[0].config)
    rows = run(chosen, options.root)
    print(markdown(rows))
    storage.write_json(storage.join(options.root, "components.json"), rows)
    storage.write_bytes(
        storage.join(options.root, "components.md"), markdown(rows).encode()
    )
