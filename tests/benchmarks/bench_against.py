"""Compare this revision with an earlier one: ``make bench-against REV=f5fc1d4``.

Makes a worktree of the earlier revision and runs both in turns:

- collect: a collection of the same images against the same emulator, then the same from
  its journal. CPU seconds of all the product's processes (steady: between 10 % and 90 %
  of the answers, so without the start of Ray), images per second, peak memory.
- step: CPU seconds of a distillation step of the demo, also with ``fit.amp``.
- latency: images per second with answers in 500 ms, as a share of the bound.
- memory: peak of driver and cloud actors in a collection of 20,000 images.
- demo: seconds of ``pipelines/full.py demo``, from its start to its end.

Prints a table, and all figures as one line of JSON last. CPU seconds and memory depend
little on other load; the rest needs a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from bench_cloud import (
    REPOSITORY,
    CollectRun,
    EmulatorProcess,
    image_size,
    run_collect,
    start_emulator,
    write_noise_images,
)

TARGETS = {
    "steady_cpu_per_1000": 0.5,
    "images_per_second": 1.6,
    "step_cpu_before": 0.7,
    "step_cpu_after": 0.7,
    "peak_mib_many": 0.8,
    "demo_seconds": 0.5,
}
"""Goals as ratios of this revision to the earlier one."""
BOUND_TARGET = 0.97
"""Goal of ``share_of_bound``, which is no ratio."""
LATENCY, SLOW_LATENCY = 0.005, 0.5
STEPS = 10
MANY_IMAGES = 20_000


Figures = dict[str, float]


@dataclass(frozen=True)
class Side:
    """One revision. ``python``: its interpreter; ``options``: for its collection;
    ``precision``: of its training step.
    """

    name: str
    repository: Path
    python: str
    options: tuple[str, ...] = ()
    precision: str = "float32"

    def run(self, *command: str) -> str:
        """Run a Python script of this revision, and return what it prints."""
        environment = {**os.environ, "PYTHONPATH": str(self.repository)}
        process = subprocess.run(
            [self.python, *command],
            cwd=self.repository,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        if process.returncode:
            raise RuntimeError(process.stdout[-1000:] + process.stderr[-3000:])
        return process.stdout


def product_cpu(run: CollectRun) -> float:
    """Return the CPU seconds of all processes but the emulator, start included."""
    return sum(s for name, s in run.usage.cpu[-1].items() if name != "emulator")


def steady_cpu_per_1000(run: CollectRun) -> float:
    """Return the CPU seconds for 1,000 images in steady state."""
    cores = sum(c for name, c in run.cores.items() if name != "emulator")
    return 1000 * cores / run.rate if run.rate else 0.0


def collect(
    side: Side, images: Path, root: Path, emulator: EmulatorProcess, in_flight: int
) -> CollectRun:
    return run_collect(
        images,
        root,
        emulator,
        in_flight,
        *side.options,
        repository=side.repository,
        python=side.python,
    )


def measure_collection(
    side: Side, images: Path, emulator: EmulatorProcess, in_flight: int
) -> Figures:
    """Measure one collection and its replay."""
    emulator.reset(LATENCY)
    with tempfile.TemporaryDirectory(prefix="bench_against_") as work:
        root = Path(work) / "root"
        run = collect(side, images, root, emulator, in_flight)
        for step in (root / "steps").glob("collect-*"):
            shutil.rmtree(step)
        replay = collect(side, images, root, emulator, in_flight)
    return {
        "steady_cpu_per_1000": steady_cpu_per_1000(run),
        "cpu_seconds": product_cpu(run),
        "images_per_second": run.rate,
        "peak_mib": run.usage.together / 2**20,
        "replay_cpu_seconds": product_cpu(replay),
        "replay_calls": replay.calls,
    }


def measure_latency(
    side: Side, images: Path, emulator: EmulatorProcess, in_flight: int
) -> Figures:
    emulator.reset(SLOW_LATENCY)
    with tempfile.TemporaryDirectory(prefix="bench_against_") as work:
        run = collect(side, images, Path(work) / "root", emulator, in_flight)
    return {"share_of_bound": run.rate * SLOW_LATENCY / in_flight}


def measure_memory(
    side: Side, images: Path, emulator: EmulatorProcess, in_flight: int
) -> Figures:
    emulator.reset(LATENCY)
    with tempfile.TemporaryDirectory(prefix="bench_against_") as work:
        run = collect(side, images, Path(work) / "root", emulator, in_flight)
    return {"peak_mib_many": run.usage.together / 2**20}


def measure_step(side: Side) -> Figures:
    script = str(Path(__file__).with_name("step_seconds.py"))
    printed = side.run(script, str(side.repository), side.precision, str(STEPS))
    seconds = json.loads(printed.splitlines()[-1])
    return {f"step_cpu_{name}": figure for name, figure in seconds.items()}


def measure_demo(side: Side) -> Figures:
    with tempfile.TemporaryDirectory(prefix="bench_against_") as work:
        start = time.monotonic()
        side.run("pipelines/full.py", "demo", "--root", f"{work}/demo")
        return {"demo_seconds": time.monotonic() - start}


@contextmanager
def earlier_side(revision: str, install: bool) -> Iterator[Side]:
    """Check the revision out, and with ``install`` make an environment with the packages
    that it names; otherwise this environment's packages are used.
    """
    with tempfile.TemporaryDirectory(prefix="bench_revision_") as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(REPOSITORY), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), revision], check=True)
        try:
            python = sys.executable
            if install:
                environment = Path(folder) / "environment"
                venv.create(environment, with_pip=True)
                python = str(environment / "bin" / "python")
                subprocess.run(
                    [python, "-m", "pip", "install", "-q", "-e", str(tree)], check=True
                )
            yield Side(revision, tree, python)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def take_turns(
    sides: Sequence[Side], rounds: int, measure: Callable[[Side], Figures]
) -> dict[str, Figures]:
    """Return the medians of each side's figures, measured in turns."""
    runs: dict[str, list[Figures]] = {side.name: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            runs[side.name].append(measure(side))
            latest = json.dumps(runs[side.name][-1])
            print(f"{side.name}: {latest}", file=sys.stderr, flush=True)
    return {
        name: {key: median(run[key] for run in of_side) for key in of_side[0]}
        for name, of_side in runs.items()
    }


def compare_collections(
    sides: Sequence[Side], part: str, rounds: int, count: int, in_flight: int
) -> dict[str, Figures]:
    """Compare collections of ``count`` images; ``part``: which figures."""
    measure = {
        "collect": measure_collection,
        "latency": measure_latency,
        "memory": measure_memory,
    }[part]
    pixels = 224 if part == "memory" else 350
    with tempfile.TemporaryDirectory(prefix="bench_images_") as folder:
        images = Path(folder) / "images"
        write_noise_images(images, count, pixels)
        with start_emulator(image_size(pixels), LATENCY) as emulator:
            return take_turns(
                sides, rounds, lambda side: measure(side, images, emulator, in_flight)
            )


def compare(
    earlier: Side, ours: Sequence[Side], options: argparse.Namespace
) -> dict[str, Figures]:
    """Return all figures of each side."""
    single = ours[0]
    mixed = replace(single, name="bfloat16", precision="bfloat16")
    comparisons: dict[str, Callable[[], dict[str, Figures]]] = {
        "collect": lambda: compare_collections(
            [earlier, *ours],
            "collect",
            options.rounds,
            options.images,
            options.in_flight,
        ),
        "step": lambda: take_turns(
            [earlier, single, mixed], options.rounds, measure_step
        ),
        "latency": lambda: compare_collections(
            [single], "latency", options.rounds, options.images, options.in_flight
        ),
        "memory": lambda: compare_collections(
            [earlier, *ours], "memory", 1, options.many_images, options.in_flight
        ),
        "demo": lambda: take_turns([earlier, single], 1, measure_demo),
    }
    figures: dict[str, Figures] = {}
    for part in options.only:
        for name, measured in comparisons[part]().items():
            rounded = {key: round(figure, 4) for key, figure in measured.items()}
            figures.setdefault(name, {}).update(rounded)
    return figures


def compute_ratios(before: Figures, after: Figures) -> Figures:
    """Return the figures of this revision over those of the earlier one."""
    return {
        key: round(figure / before[key], 3)
        for key, figure in after.items()
        if before.get(key)
    }


def print_table(figures: dict[str, Figures], ratios: dict[str, Figures]) -> None:
    names = list(figures)
    keys = dict.fromkeys(key for measured in figures.values() for key in measured)
    print(f"{'':<22}" + "".join(f"{name:>22}" for name in names))
    for key in keys:
        line = f"{key:<22}"
        for name in names:
            ratio = ratios.get(name, {}).get(key)
            suffix = "" if ratio is None else f" ({ratio:.2f})"
            figure = figures[name].get(key)
            line += f"{'' if figure is None else f'{figure:.3f}{suffix}':>22}"
        print(line)


PARTS = ("collect", "step", "latency", "memory", "demo")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rev", default="f5fc1d4", help="the earlier revision")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--rounds", type=int, default=3, help="of collect, step and latency"
    )
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--many-images", type=int, default=MANY_IMAGES)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 3])
    parser.add_argument(
        "--install", action="store_true", help="install the revision's own packages"
    )
    return parser.parse_args()


def main() -> int:
    options = parse_options()
    ours = [
        Side(
            f"actors={actors}",
            REPOSITORY,
            sys.executable,
            ("--collect.actors", str(actors)),
        )
        for actors in options.actors
    ]
    with earlier_side(options.rev, options.install) as earlier:
        figures = compare(earlier, ours, options)
    before = figures.get(earlier.name, {})
    ratios = {
        name: compute_ratios(before, measured)
        for name, measured in figures.items()
        if name != earlier.name
    }
    print_table(figures, ratios)
    report = {
        "figures": figures,
        "ratios": ratios,
        "targets": TARGETS | {"share_of_bound": BOUND_TARGET},
        "cpus": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
