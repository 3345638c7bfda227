"""What the pipeline costs beside its stages' own work, and what a second worker brings:
``make bench-pipeline``.

    make bench-pipeline                           # a quarter of an hour on two quiet
    cores make bench-pipeline ARGS="--only workers"

1. `full.py demo` on 1,000 images (600 to train on, 100 and 300 to measure on), from the
command to its end: what is spent beside the steps'
   own seconds and Ray's start-up, as a share of the steps' seconds; and the same
   command again, when everything is finished.
2. Distillation steps a second of two workers with one thread each, against one worker
with one thread, same global batch of 8 (gloo, two
   processes on this machine). Processes take turns; the ratio is the median over
   rounds. Beside it the bound: two workers that each take
   half of the batch and never meet, so that all they have in common is the machine; and
   two that each take a whole batch.

Wall time decides here, so let nothing else run. Prints a table and, last, the figures
as one line of JSON.
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
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from bench_training import demo_batch, distillation

from coin_ray.config.presets import demo
from coin_ray.data.examples import Batch

REPOSITORY = Path(__file__).resolve().parents[2]
WANTED = {
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


def whole_run(folder: Path, more: Sequence[str]) -> dict[str, float]:
    """Seconds of a run of 1,000 images, of its steps, of Ray's start-up, and of the
    same command again."""
    command = [
        sys.executable,
        "pipelines/full.py",
        "demo",
        "--root",
        str(folder),
        *IMAGES,
        *more,
    ]
    ray = float(
        subprocess.run(
            [sys.executable, "-c", RAY], capture_output=True, text=True, check=True
        ).stdout.split()[-1]
    )
    first, again = seconds(command), seconds(command)
    steps = sum(
        json.loads(manifest.read_text())["seconds"]
        for manifest in folder.glob("steps/*/manifest.json")
    )
    return {
        "seconds of the run": first,
        "seconds of its steps": steps,
        "seconds of Ray's start-up": ray,
        "overhead": (first - ray - steps) / steps,
        "seconds of a finished run": again,
    }


def seconds(command: Sequence[str]) -> float:
    start = time.monotonic()
    done = subprocess.run(
        command, cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-2000:]}"
        )
    return time.monotonic() - start


def share(batch: Batch, rank: int, workers: int) -> Batch:
    """The images of one worker."""
    own = slice(rank, None, workers)
    knowledge = {name: found[own] for name, found in batch.knowledge.items()}
    return Batch(
        batch.weak[own],
        batch.strong[own],
        knowledge,
        batch.generators[own],
        batch.reviewed[own],
    )


def worker(
    rank: int, processes: int, folder: str, steps: int, meet: bool, parts: int
) -> None:
    """Time of each step after the first ones, which warm up, with one of so many
    ``parts`` of the batch."""
    torch.set_num_threads(1)
    if meet:
        dist.init_process_group(
            "gloo", f"file://{folder}/meeting", rank=rank, world_size=processes
        )
    config = demo()
    task = distillation(config, replace(config.distill, burn_up=0))
    batches = [
        share(demo_batch(config, number), rank % parts, parts)
        for number in range(BATCHES)
    ]
    taken = []
    for step in range(WARM_UP + steps):
        start = time.monotonic()
        task.train_step(batches[step % BATCHES], step)
        taken.append(time.monotonic() - start)
    if rank == 0:
        Path(folder, "seconds").write_text(json.dumps(median(taken[WARM_UP:])))
    if meet:
        dist.destroy_process_group()


def step_seconds(
    processes: int, steps: int, *, meet: bool = False, parts: int = 1
) -> float:
    """Median seconds of a step of a batch of 8, or of a part of it."""
    with tempfile.TemporaryDirectory() as folder:
        multiprocessing.spawn(
            worker, (processes, folder, steps, meet, parts), nprocs=processes
        )  # type: ignore[no-untyped-call]
        return float(json.loads(Path(folder, "seconds").read_text()))


def two_workers(steps: int, rounds: int) -> dict[str, float]:
    turns = [
        (
            step_seconds(1, steps),
            step_seconds(2, steps, meet=True, parts=2),
            step_seconds(2, steps, parts=2),
            step_seconds(2, steps),
            step_seconds(1, steps, parts=2),
        )
        for _ in range(rounds)
    ]
    return {
        "seconds of a step, one worker": median(one for one, *_ in turns),
        "seconds of a step, two workers": median(two for _, two, *_ in turns),
        "seconds of a step, half a batch, one worker alone": median(
            half for *_, half in turns
        ),
        "two workers / one": median(one / two for one, two, *_ in turns),
        "two that never meet / one": median(one / apart for one, _, apart, *_ in turns),
        "two with a whole batch each / one": median(
            2 * one / whole for one, _, _, whole, _ in turns
        ),
    }


def verdict(name: str, value: float) -> str:
    if name not in WANTED:
        return ""
    sign, bound = WANTED[name]
    held = value <= bound if sign == "<=" else value >= bound
    return f"{sign} {bound:g}: {'yes' if held else 'NO'}"


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
    asked, more = parser.parse_known_args(arguments)
    os.environ.update(
        {"MLFLOW_DISABLE_TELEMETRY": "true", "RAY_USAGE_STATS_ENABLED": "0"}
    )
    found: dict[str, float] = {}
    if "run" in asked.only:
        with tempfile.TemporaryDirectory() as folder:
            found |= whole_run(Path(folder) / "run", more)
    if "workers" in asked.only:
        found |= two_workers(asked.steps, asked.rounds)
    print("| | | wanted |\n|---|---|---|")
    for name, value in found.items():
        print(f"| {name} | {value:.3g} | {verdict(name, value)} |")
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
