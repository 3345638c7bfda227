"""Measure the pipeline's overhead beside the work of its stages, and the speed-up of a
second worker: ``make bench-pipeline``.

    # a quarter of an hour on two quiet cores
    make bench-pipeline
    make bench-pipeline ARGS="--only workers"

1. `full.py demo` on 1,000 images (600 to train on, 100 and 300 to evaluate on), from the
   command to its end: the time spent besides the steps' own seconds and Ray's start-up,
   as a share of the steps' seconds; and the same command again, when everything is
   finished.
2. Distillation steps per second of two workers with one thread each, against one worker
   with one thread, same global batch of 8 (gloo, two processes on this machine).
   Processes take turns; the ratio is the median over rounds. For comparison the bound:
   two workers that each take half of the batch and never synchronize, so that they share
   nothing but the machine; and two that each take a whole batch.

The figures are wall times, so let nothing else run. Prints a table and, last, the
figures as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from bench_training import build_demo_batch, build_distillation

from coin_ray.config.presets import demo
from coin_ray.data.examples import Batch

REPOSITORY = Path(__file__).resolve().parents[2]
GOALS = {
    "overhead": ("<=", 0.10),
    "seconds of a finished run": ("<=", 5.0),
    "two workers / one": (">=", 1.6),
}
IMAGES = ["--data.train", "600", "--data.val", "100", "--data.test", "300"]
RAY = (
    "import time; start = time.monotonic(); import ray;"
    " ray.init(logging_level='ERROR'); print(time.monotonic() - start)"
)
WARM_UP, BATCHES = 3, 4


def measure_run(folder: Path, options: Sequence[str]) -> dict[str, float]:
    """Return the seconds of a run of 1,000 images, of its steps, of Ray's start-up, and
    of the same command again.
    """
    program = [sys.executable, "pipelines/full.py", "demo"]
    command = [*program, "--root", str(folder), *IMAGES, *options]
    ray_output = subprocess.run(
        [sys.executable, "-c", RAY], capture_output=True, text=True, check=True
    ).stdout
    ray_seconds = float(ray_output.split()[-1])
    run_seconds = time_command(command)
    seconds_again = time_command(command)
    step_seconds = sum(
        json.loads(manifest.read_text())["seconds"]
        for manifest in folder.glob("steps/*/manifest.json")
    )
    return {
        "seconds of the run": run_seconds,
        "seconds of its steps": step_seconds,
        "seconds of Ray's start-up": ray_seconds,
        "overhead": (run_seconds - ray_seconds - step_seconds) / step_seconds,
        "seconds of a finished run": seconds_again,
    }


def time_command(command: Sequence[str]) -> float:
    start = time.monotonic()
    completed = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if completed.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {completed.returncode}:"
            f" {completed.stderr[-2000:]}"
        )
    return time.monotonic() - start


def rank_share(batch: Batch, rank: int, workers: int) -> Batch:
    """Return the part of a batch of one worker."""
    images = slice(rank, None, workers)
    return Batch(
        weak=batch.weak[images],
        strong=batch.strong[images],
        detections={
            source: detections[images]
            for source, detections in batch.detections.items()
        },
        generators=batch.generators[images],
        reviewed=batch.reviewed[images],
    )


def train_worker(
    rank: int, processes: int, folder: str, steps: int, synchronize: bool, parts: int
) -> None:
    """Train on one of so many ``parts`` of the batch; rank 0 writes the median seconds of a
    step after the warm-up."""
    torch.set_num_threads(1)
    if synchronize:
        dist.init_process_group(
            "gloo", f"file://{folder}/meeting", rank=rank, world_size=processes
        )
    config = demo()
    task = build_distillation(config, replace(config.distill, burn_up=0))
    batches = [
        rank_share(build_demo_batch(config, number), rank % parts, parts)
        for number in range(BATCHES)
    ]
    step_times = []
    for step in range(WARM_UP + steps):
        start = time.monotonic()
        task.train_step(batches[step % BATCHES], step)
        step_times.append(time.monotonic() - start)
    if rank == 0:
        Path(folder, "seconds").write_text(json.dumps(median(step_times[WARM_UP:])))
    if synchronize:
        dist.destroy_process_group()


def time_steps(
    processes: int, steps: int, *, synchronize: bool = False, parts: int = 1
) -> float:
    """Return the median seconds of a step of a batch of 8, or of a part of it."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(
            train_worker,
            (processes, folder, steps, synchronize, parts),
            nprocs=processes,
        )  # type: ignore[no-untyped-call]
        return float(json.loads(Path(folder, "seconds").read_text()))


@dataclass(frozen=True)
class Turn:
    """Seconds of a step of each arrangement, measured one after the other."""

    one_worker: float
    two_workers: float
    two_unsynchronized: float
    two_whole_batches: float
    half_batch: float


def _measure_turn(steps: int) -> Turn:
    return Turn(
        one_worker=time_steps(1, steps),
        two_workers=time_steps(2, steps, synchronize=True, parts=2),
        two_unsynchronized=time_steps(2, steps, parts=2),
        two_whole_batches=time_steps(2, steps),
        half_batch=time_steps(1, steps, parts=2),
    )


def compare_two_workers(steps: int, rounds: int) -> dict[str, float]:
    turns = [_measure_turn(steps) for _ in range(rounds)]
    return {
        "seconds of a step, one worker": median(t.one_worker for t in turns),
        "seconds of a step, two workers": median(t.two_workers for t in turns),
        "seconds of a step, half a batch, one worker alone": median(
            t.half_batch for t in turns
        ),
        "two workers / one": median(t.one_worker / t.two_workers for t in turns),
        "two that never meet / one": median(
            t.one_worker / t.two_unsynchronized for t in turns
        ),
        "two with a whole batch each / one": median(
            2 * t.one_worker / t.two_whole_batches for t in turns
        ),
    }


def compare_with_goal(name: str, figure: float) -> str:
    if name not in GOALS:
        return ""
    sign, bound = GOALS[name]
    is_reached = figure <= bound if sign == "<=" else figure >= bound
    return f"{sign} {bound:g}: {'yes' if is_reached else 'NO'}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", choices=("run", "workers"), nargs="+", default=("run", "workers")
    )
    parser.add_argument(
        "--steps", type=int, default=40, help="timed steps of each turn"
    )
    parser.add_argument("--rounds", type=int, default=3)
    options, run_options = parser.parse_known_args(arguments)
    os.environ.update(
        {"MLFLOW_DISABLE_TELEMETRY": "true", "RAY_USAGE_STATS_ENABLED": "0"}
    )
    figures: dict[str, float] = {}
    if "run" in options.only:
        with tempfile.TemporaryDirectory() as folder:
            figures |= measure_run(Path(folder) / "run", run_options)
    if "workers" in options.only:
        figures |= compare_two_workers(options.steps, options.rounds)
    print("| | | goal |\n|---|---|---|")
    for name, figure in figures.items():
        print(f"| {name} | {figure:.3g} | {compare_with_goal(name, figure)} |")
    print(json.dumps({name: round(figure, 4) for name, figure in figures.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
