"""CPU seconds of a distillation step of the demo, for ``bench_against.py``: ``python
step_seconds.py REPOSITORY PRECISION STEPS``.

Uses the repository's own ``tests/benchmarks/bench_training.py``, of this or of an earlier
revision, on one thread: the median over steps before the end of the burn-up and over as
many after it. Prints both as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

WARM_UP = 2
BURN_UPS = {"before": 1000, "after": 0}


def find_function(module: Any, *names: str) -> Any:
    """Return the function of a module by its present or its earlier name."""
    for name in names:
        if hasattr(module, name):
            return getattr(module, name)
    raise AttributeError(f"{module.__name__} has none of {', '.join(names)}")


def step_seconds(repository: str, precision: str, steps: int) -> dict[str, float]:
    sys.path.insert(0, str(Path(repository) / "tests" / "benchmarks"))
    import bench_training

    build = find_function(bench_training, "build_distillation", "distillation")
    build_batch = find_function(bench_training, "build_demo_batch", "demo_batch")
    config = bench_training.demo()
    if hasattr(config.detector, "weights"):  # first weights of their own, as before
        config = replace(config, detector=replace(config.detector, weights=""))
    fit = replace(config.distill.fit, amp=precision == "bfloat16")
    batch = build_batch(config, 0)
    medians = {}
    for name, burn_up in BURN_UPS.items():
        training = build(config, replace(config.distill, burn_up=burn_up, fit=fit))
        seconds = []
        for _ in range(WARM_UP + steps):
            start = time.process_time()
            training.train_step(batch, 1)
            seconds.append(time.process_time() - start)
        medians[name] = median(seconds[WARM_UP:])
    return medians


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(step_seconds(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
