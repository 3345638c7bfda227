"""Compare this revision with an earlier one: ``make bench-against REV=f5fc1d4``.

Makes a worktree of the earlier revision and runs both in turns on the same images against
the same emulator: a collection, then the same from its journal. Compares CPU seconds of
all the product's processes (steady: between 10 % and 90 % of the answers, so without the
start of Ray), images per second and peak memory. Prints a table, and all figures as one
line of JSON last. CPU seconds depend little on other load, images per second do.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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
    "peak_mib": 0.8,
}
"""Goals as ratios of this revision to the earlier one."""
LATENCY = 0.005


@dataclass(frozen=True)
class Side:
    """One revision. ``python``: its interpreter; ``options``: for its collection."""

    name: str
    repository: Path
    python: str
    options: tuple[str, ...] = ()


def product_cpu(run: CollectRun) -> float:
    """Return the CPU seconds of all processes but the emulator, start included."""
    return sum(s for name, s in run.usage.cpu[-1].items() if name != "emulator")


def steady_cpu_per_1000(run: CollectRun) -> float:
    """Return the CPU seconds for 1,000 images in steady state."""
    cores = sum(c for name, c in run.cores.items() if name != "emulator")
    return 1000 * cores / run.rate if run.rate else 0.0


def measure(
    side: Side, images: Path, emulator: EmulatorProcess, in_flight: int
) -> dict[str, float]:
    """Measure one collection and its replay."""
    emulator.reset(LATENCY)
    with tempfile.TemporaryDirectory(prefix="bench_against_") as work:
        root = Path(work) / "root"
        run = run_collect(
            images,
            root,
            emulator,
            in_flight,
            *side.options,
            repository=side.repository,
            python=side.python,
        )
        for step in (root / "steps").glob("collect-*"):
            shutil.rmtree(step)
        replay = run_collect(
            images,
            root,
            emulator,
            in_flight,
            *side.options,
            repository=side.repository,
            python=side.python,
        )
    return {
        "steady_cpu_per_1000": steady_cpu_per_1000(run),
        "cpu_seconds": product_cpu(run),
        "images_per_second": run.rate,
        "peak_mib": run.usage.together / 2**20,
        "replay_cpu_seconds": product_cpu(replay),
        "replay_calls": replay.calls,
    }


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


def compare(
    sides: Sequence[Side], rounds: int, count: int, in_flight: int
) -> dict[str, dict[str, float]]:
    """Return the medians of each side's figures, measured in turns."""
    figures: dict[str, list[dict[str, float]]] = {side.name: [] for side in sides}
    with tempfile.TemporaryDirectory(prefix="bench_images_") as folder:
        images = Path(folder) / "images"
        write_noise_images(images, count, 350)
        with start_emulator(image_size(350), LATENCY) as emulator:
            for _ in range(rounds):
                for side in sides:
                    figures[side.name].append(
                        measure(side, images, emulator, in_flight)
                    )
                    latest = json.dumps(figures[side.name][-1])
                    print(f"{side.name}: {latest}", file=sys.stderr, flush=True)
    return {
        name: {key: round(median(run[key] for run in runs), 3) for key in runs[0]}
        for name, runs in figures.items()
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rev", default="f5fc1d4", help="the earlier revision")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--in-flight", type=int, default=64)
    parser.add_argument("--actors", type=int, nargs="*", default=[1, 3])
    parser.add_argument(
        "--install", action="store_true", help="install the revision's own packages"
    )
    options = parser.parse_args()
    with earlier_side(options.rev, options.install) as earlier:
        ours = [
            Side(
                f"actors={actors}",
                REPOSITORY,
                sys.executable,
                ("--collect.actors", str(actors)),
            )
            for actors in options.actors
        ]
        figures = compare(
            [earlier, *ours], options.rounds, options.images, options.in_flight
        )
    before = figures[earlier.name]
    ratios = {
        side.name: {
            key: round(figure / before[key], 3)
            for key, figure in figures[side.name].items()
            if before[key]
        }
        for side in ours
    }
    print(f"{'':<22}{earlier.name:>12}" + "".join(f"{s.name:>22}" for s in ours))
    for key, figure in before.items():
        line = f"{key:<22}{figure:>12.2f}"
        for side in ours:
            ratio = ratios[side.name].get(key, 0.0)
            line += f"{figures[side.name][key]:>14.2f} ({ratio:.2f})"
        print(line)
    report = {
        "figures": figures,
        "ratios": ratios,
        "targets": TARGETS,
        "cpus": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
    }
    print(json.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main())
