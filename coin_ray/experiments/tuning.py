"""Ray Tune as the host of a grid's jobs."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from ray import tune

from coin_ray import storage
from coin_ray.errors import TrainingError
from coin_ray.experiments.grid import Job, Report
from coin_ray.stages.common.cluster import ensure_ray

RETRIES = 2
"""Of a job whose worker died or could not start; it goes on from its last state."""


def under_tune(jobs: Sequence[Job], root: str, report: Report) -> None:
    """One trial per job, as many at once as there are CPUs (GPUs, if ``fit.gpu``).
    Raises TrainingError naming the failed ones, when all have ended.

    A killed grid is started again by the same command: finished steps are never
    repeated, and a training goes on from its last state.
    """
    ensure_tune()
    needs = {"CPU": 1, "GPU": 1} if jobs[0].config.distill.fit.gpu else {"CPU": 1}
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(JobTrial, jobs=tuple(jobs), root=root), needs
        ),
        param_space={"job": tune.grid_search(list(range(len(jobs))))},
        tune_config=tune.TuneConfig(
            trial_dirname_creator=lambda trial: str(trial.trial_id)
        ),
        run_config=tune.RunConfig(
            name="grid",
            storage_path=storage.join(root, "tune"),
            verbose=0,
            callbacks=[_Told(jobs, report)],
            failure_config=tune.FailureConfig(max_failures=RETRIES),
        ),
    )
    failed = [
        (jobs[r.config["job"]].title, r.error)
        for r in tuner.fit()
        if r.error is not None
    ]
    if failed:
        told = "; ".join(
            f"{title}: {str(error).strip().splitlines()[-1]}" for title, error in failed
        )
        raise TrainingError(
            f"{len(failed)} of {len(jobs)} jobs failed; the others are kept, and the"
            f" same command tries these again. {told}"
        )


def ensure_tune() -> None:
    """A running Ray, and a Tune that leaves it to us to say what happens."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # the new one speaks at any verbosity
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # relative paths of settings stay what they were
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    ensure_ray()
    logging.getLogger("ray.tune").setLevel(logging.ERROR)


class JobTrial(tune.Trainable):  # type: ignore[misc]
    """A job in one ``step``. A class, because inside of a function trainable Ray Train
    reports nothing.
    """

    def setup(
        self, config: dict[str, Any], jobs: Sequence[Job] = (), root: str = ""
    ) -> None:
        # the stages of a trial run in this process, also on a cluster
        os.environ.pop("RAY_ADDRESS", None)
        self.job, self.root = jobs[config["job"]], root

    def step(self) -> dict[str, Any]:
        start = time.monotonic()
        self.job.run(self.root)
        return {"seconds": time.monotonic() - start, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Nothing: what a job has done lies below the root."""

    def load_checkpoint(self, checkpoint: object) -> None:
        """Nothing, for the same reason."""


class _Told(tune.Callback):  # type: ignore[misc]
    def __init__(self, jobs: Sequence[Job], report: Report) -> None:
        self.jobs, self.report = jobs, report

    def on_trial_complete(
        self, iteration: int, trials: list[Any], trial: Any, **info: Any
    ) -> None:
        self.report(self.jobs[trial.config["job"]], trial.last_result["seconds"])
