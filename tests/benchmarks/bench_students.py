"""Measure students that were detectors before: ``make bench-students`` or ``python
tests/benchmarks/bench_students.py``.

    # thermal (asked once, and in three renderings) and carla
    make bench-students ARGS="--assets DIR"
    # the demo, whose first weights are a Faster R-CNN's
    make bench-students ARGS="--sets demo --students faster-rcnn"
    # some of it
    make bench-students ARGS="--assets DIR --sets carla --students yolox-nano --seeds 0 1"

Each run trains COIN's student and, on the same network with the same start and steps, one
on plain cloud labels and one on the truth, and chooses between the first two without
labels (``strategy`` auto). A killed benchmark resumes with the same command; figures of
finished runs below the root are read, not made again. Prints the table, writes it to
docs/results/students.md and students.json, and prints the figures as one line of JSON
last.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from coin_ray import storage
from coin_ray.config import Folder, PipelineConfig
from coin_ray.config.presets import demo, thermal, with_student
from coin_ray.errors import CoinError
from coin_ray.experiments.variants import shorten_training
from coin_ray.report.methods import DASH
from coin_ray.runs.graph import build_steps
from coin_ray.runs.lease import hold_root
from coin_ray.runs.runner import run_missing_steps, select_steps
from coin_ray.runs.steps import Manifest, finished_manifests
from coin_ray.runs.summary import PACKAGES

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs" / "results"
SETS = {
    "thermal-once": "thermal photos, the cloud asked once",
    "thermal-three": "thermal photos, the cloud asked in three renderings",
    "carla": "rendered street scenes at 640 pixels, the cloud asked once",
    "demo": "the demo's scenes",
}
STUDENTS = ("yolox-nano", "faster-rcnn")
SEEDS = (0, 1, 2, 3, 4)
CARLA_CLASSES = ("car", "bicycle", "motorcycle", "traffic light")
METHODS = {
    "cloud": "cloud",
    "clip_detector": "second teacher",
    "pseudo_label": "plain",
    "coin": "COIN",
    "student": "chosen",
    "oracle": "oracle",
}
"""Columns of the table by the evaluation's names. The second teacher of a YOLOX is the
student as it starts, in several views."""
TIE = 0.005
"""Difference in mAP50 up to which either choice is right."""
CARLA_SIDE = 640
"""The photos' own size: at 416 pixels traffic lights are too small for a YOLOX."""
Figures = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One run: a set, a student and a seed."""

    set_name: str
    student: str
    config: PipelineConfig

    @property
    def title(self) -> str:
        return f"{self.set_name}, {self.student}, seed {self.config.seed}"

    def run(self, folder: str) -> None:
        """Run what is not finished."""
        steps = select_steps(build_steps(self.config, baselines=True), "evaluate")
        root = self._root(folder)
        with hold_root(root):
            run_missing_steps(steps.values(), self.config, root, progress=False)

    def _root(self, folder: str) -> str:
        """Return the run's root: sets of the same images share what they can, others may
        run at the same time.
        """
        return storage.join(folder, self.set_name.partition("-")[0])

    def read_figures(self, folder: str) -> Figures | None:
        """Return the figures of a finished run; None of any other."""
        steps = select_steps(build_steps(self.config, baselines=True), "evaluate")
        manifests = finished_manifests(steps.values(), self._root(folder))
        if "evaluate" not in manifests:
            return None
        return self._figures(manifests)

    def _figures(self, manifests: dict[str, Manifest]) -> Figures:
        map50 = manifests["evaluate"].metrics["map50"]
        choice = manifests["choose"].metrics
        candidates = {"coin": map50["coin"], "plain": map50["pseudo_label"]}
        cost = max(candidates.values()) - candidates[choice["winner"]]
        return {
            "set": self.set_name,
            "student": self.student,
            "seed": self.config.seed,
            "map50": {name: map50[name] for name in METHODS if name in map50},
            "winner": choice["winner"],
            "scores": choice["scores"],
            "choice_is_right": cost <= TIE,
            "choice_cost": round(cost, 4),
            "seconds": {name: m.seconds for name, m in manifests.items()},
        }


def build_config(set_name: str, student: str, assets: str) -> PipelineConfig:
    """Return the run of a set with a student, as a user would start it."""
    if set_name == "demo":
        config = with_student(demo(), student)
    else:
        config = with_student(_photo_config(set_name, assets), student)
    if student.startswith("yolox"):
        distill = replace(
            config.distill,
            student_weights=f"{assets}/models/yolox_nano.onnx",
            student_side=CARLA_SIDE if set_name == "carla" else 0,
        )
        config = replace(config, distill=distill)
    tracking = replace(config.tracking, enabled=False)
    return replace(config, strategy="auto", tracking=tracking)


def _photo_config(set_name: str, assets: str) -> PipelineConfig:
    config = thermal(assets)
    if set_name == "thermal-three":
        return config
    config = replace(config, cloud=replace(config.cloud, views=("plain",)))
    if set_name == "carla":
        folder = f"{assets}/data/carla"
        data = Folder(images=f"{folder}/train", test=f"{folder}/test")
        config = replace(config, classes=CARLA_CLASSES, data=data, preset="carla")
    return config


def build_trials(options: argparse.Namespace) -> Iterator[Trial]:
    """Yield the trials seed by seed, so that a cut benchmark has whole rows."""
    sets = options.sets or [name for name in SETS if name != "demo"]
    for seed in options.seeds:
        for student in options.students:
            for set_name in sets:
                config = build_config(set_name, student, str(options.assets))
                training = replace(config.distill.fit, amp=options.amp)
                distill = replace(config.distill, fit=training)
                config = replace(config, seed=seed, distill=distill)
                if options.steps_share != 1:
                    config = shorten_training(config, options.steps_share)
                yield Trial(set_name, student, config)


def group_figures(all_figures: Sequence[Figures]) -> dict[str, dict[str, Any]]:
    """Return by ``SET, STUDENT`` the mean, deviation (n - 1) and values by seed of each
    method, and of the choice how often it is right and what it costs.
    """
    grouped: dict[str, dict[str, Any]] = {}
    for set_name in SETS:
        for student in dict.fromkeys(figures["student"] for figures in all_figures):
            runs = [
                figures
                for figures in all_figures
                if (figures["set"], figures["student"]) == (set_name, student)
            ]
            if runs:
                grouped[f"{set_name}, {student}"] = _summarize_runs(runs)
    return grouped


def _summarize_runs(runs: Sequence[Figures]) -> dict[str, Any]:
    summary: dict[str, Any] = {"seeds": [run["seed"] for run in runs], "map50": {}}
    for method in METHODS:
        values = [run["map50"][method] for run in runs if method in run["map50"]]
        if values:
            summary["map50"][method] = {
                "mean": round(fmean(values), 4),
                "std": round(stdev(values), 4) if len(values) > 1 else None,
                "values": values,
            }
    summary["choice"] = {
        "right": sum(run["choice_is_right"] for run in runs),
        "of": len(runs),
        "cost": round(fmean(run["choice_cost"] for run in runs), 4),
        "winners": [run["winner"] for run in runs],
    }
    return summary


def format_table(grouped: dict[str, dict[str, Any]]) -> str:
    """Return the table in Markdown, in points of mAP50."""
    header = ["set, student", "seeds", *METHODS.values(), "right choices", "cost"]
    lines = [header, ["---"] * len(header)]
    for title, summary in grouped.items():
        cells = [_format_cell(summary["map50"].get(method)) for method in METHODS]
        choice = summary["choice"]
        lines.append(
            [
                title,
                str(len(summary["seeds"])),
                *cells,
                f"{choice['right']} of {choice['of']}",
                f"{100 * choice['cost']:.1f}",
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _format_cell(figures: dict[str, Any] | None) -> str:
    if figures is None:
        return DASH
    mean = f"{100 * figures['mean']:.1f}"
    varies = len(set(figures["values"])) > 1
    return f"{mean} ± {100 * figures['std']:.1f}" if varies else mean


def write_results(
    out: Path, all_figures: Sequence[Figures], command: str, amp: bool
) -> None:
    """Write students.json, and the table of students.md between its two marks; the rest
    of that page is written by people.
    """
    out.mkdir(parents=True, exist_ok=True)
    grouped = group_figures(all_figures)
    packages = {package: version(package) for package in PACKAGES}
    record = {"table": grouped, "runs": list(all_figures), "versions": packages}
    (out / "students.json").write_text(json.dumps(record, indent=1) + "\n")
    versions = ", ".join(f"{name} {number}" for name, number in packages.items())
    precision = "bfloat16 (`fit.amp`)" if amp else "float32"
    made = (
        f"    {command}\n\nmAP50 in points on the held-out test images, last checkpoint,"
        f" mean ± sample standard deviation over seeds; training in {precision}."
        f" {datetime.now(UTC):%Y-%m-%d}, {os.cpu_count()} CPU cores, Python"
        f" {platform.python_version()}, {versions}.\n"
    )
    page = out / "students.md"
    text = page.read_text() if page.exists() else f"# Students\n\n{BEGIN}\n{END}\n"
    before, _, rest = text.partition(BEGIN)
    after = rest.partition(END)[2]
    page.write_text(f"{before}{BEGIN}\n\n{format_table(grouped)}\n{made}\n{END}{after}")


BEGIN, END = "<!-- table -->", "<!-- end of table -->"


def parse_options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--assets", help="folder of images and detectors")
    parser.add_argument(
        "--sets", nargs="+", choices=SETS, help="default: all but the demo"
    )
    parser.add_argument("--students", nargs="+", default=list(STUDENTS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument(
        "--amp", action="store_true", help="train in bfloat16, in half the time"
    )
    parser.add_argument("--steps-share", type=float, default=1.0)
    parser.add_argument("--root", default=str(REPOSITORY / "runs" / "bench-students"))
    parser.add_argument("--out", type=Path, help="default: docs/results")
    parser.add_argument(
        "--only-read", action="store_true", help="run nothing; tables of finished runs"
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str]) -> int:
    options = parse_options(arguments)
    needs_assets = set(options.sets or SETS) != {"demo"}
    if needs_assets and not options.assets:
        print("thermal and carla need --assets DIR", file=sys.stderr)
        return 2
    if "demo" in (options.sets or ()) and options.students != ["faster-rcnn"]:
        print("the demo has weights for --students faster-rcnn alone", file=sys.stderr)
        return 2
    shown = ["DIR" if text == options.assets else text for text in arguments]
    command = f'make bench-students ARGS="{shlex.join(shown)}"'
    is_shortened = options.steps_share != 1
    out = options.out or (None if is_shortened else RESULTS)
    root = storage.absolute_uri(options.root)
    trials = list(build_trials(options))
    try:
        if not options.only_read:
            for number, trial in enumerate(trials, start=1):
                trial.run(root)
                print(f"[{number}/{len(trials)}] {trial.title}", flush=True)
        figures = [f for f in (trial.read_figures(root) for trial in trials) if f]
    except CoinError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    grouped = group_figures(figures)
    print(format_table(grouped))
    if out is not None:
        write_results(out, figures, command, options.amp)
    print(json.dumps(grouped))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
