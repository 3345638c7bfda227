"""A grid of trials in MLflow: one parent run, one child for each trial, all written by
the driver.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from coin_ray import storage
from coin_ray.config import PipelineConfig
from coin_ray.config.fingerprints import fingerprint
from coin_ray.runs.tracking import Tracker


class TrialRuns:
    """The MLflow runs of the grid ``name``. A trial is written once, however often the
    same command runs.
    """

    def __init__(self, name: str, config: PipelineConfig, root: str) -> None:
        self.root = root
        self.tracker = Tracker(replace(config, preset=f"{config.preset} {name}"), root)

    def add(
        self,
        title: str,
        figures: Mapping[str, Any],
        config: PipelineConfig,
        folder: str,
        digest: str = "",
    ) -> None:
        """Write one child run: the whole config, every figure, and the distillation's
        curve from ``folder``.
        """
        key = fingerprint([self.tracker.parent_run, title])
        marker = storage.join(self.root, "mlflow", f"trial-{key}.json")
        if not self.tracker.enabled or storage.exists(marker):
            return
        with self.tracker.child_run(title, config, digest) as run:
            written = run.log(dict(figures), folder)
        if written:
            storage.write_json(marker, {"run_id": run.run_id})
