"""Ray Tune runs the jobs of a grid."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from typing import Any

from ray import tune

from coin_ray import storage
from coin_ray.errors import TrainingError
from coin_ray.experiments.grid import Job, OnJobEnd
from coin_ray.stages.common.cluster import ensure_ray

RETRIES = 2
"""How often a job is restarted whose worker died or could not start; it resumes from
its last checkpoint."""


def run_jobs_with_tune(jobs: Sequence[Job], root: str, on_job_end: OnJobEnd) -> None:
    """Run one trial per job, as many at once as there are CPUs (GPUs, if ``fit.gpu``).
    Raise TrainingError naming the failed ones, when all have ended.

    A killed grid is started again by the same command: finished steps are never
    repeated, and a training resumes from its last checkpoint.
    """
    ensure_tune()
    resources = {"CPU": 1}
    if jobs[0].config.distill.fit.gpu:
        resources["GPU"] = 1
    tuner = tune.Tuner(
        tune.with_resources(
            tune.with_parameters(JobTrainable, jobs=tuple(jobs), root=root), resources
        ),
        param_space={"job": tune.grid_search(list(range(len(jobs))))},
        tune_config=tune.TuneConfig(
            trial_dirname_creator=lambda trial: str(trial.trial_id)
        ),
        run_config=tune.RunConfig(
            name="grid",
            storage_path=storage.join(root, "tune"),
            verbose=0,
            callbacks=[_JobEndCallback(jobs, on_job_end)],
            failure_config=tune.FailureConfig(max_failures=RETRIES),
        ),
    )
    failures = []
    for trial_result in tuner.fit():
        if trial_result.error is not None:
            title = jobs[trial_result.config["job"]].title
            reason = str(trial_result.error).strip().splitlines()[-1]
            failures.append(f"{title}: {reason}")
    if failures:
        raise TrainingError(
            f"{len(failures)} of {len(jobs)} jobs failed; the others are finished, and"
            f" the same command tries these again. {'; '.join(failures)}"
        )


def ensure_tune() -> None:
    """Start Ray if it is not running, and switch off Tune's own reports."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    # The new output engine prints at any verbosity.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Relative paths in settings must keep their meaning.
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
    ensure_ray()
    logging.getLogger("ray.tune").setLevel(logging.ERROR)


class JobTrainable(tune.Trainable):  # type: ignore[misc]
    """A job in one ``step``. A class, because inside of a function trainable Ray Train
    reports nothing.
    """

    def setup(
        self, config: dict[str, Any], jobs: Sequence[Job] = (), root: str = ""
    ) -> None:
        # The stages of a trial run in this process, also on a cluster.
        os.environ.pop("RAY_ADDRESS", None)
        self.job, self.root = jobs[config["job"]], root

    def step(self) -> dict[str, Any]:
        start = time.monotonic()
        self.job.run(self.root)
        return {"seconds": time.monotonic() - start, "done": True}

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save nothing: what a job has done lies below the root."""

    def load_checkpoint(self, checkpoint: object) -> None:
        """Load nothing, for the same reason."""


class _JobEndCallback(tune.Callback):  # type: ignore[misc]
    def __init__(self, jobs: Sequence[Job], on_job_end: OnJobEnd) -> None:
        self.jobs, self.on_job_end = jobs, on_job_end

    def on_trial_complete(
        self, iteration: int, trials: list[Any], trial: Any, **info: Any
    ) -> None:
        self.on_job_end(self.jobs[trial.config["job"]], trial.last_result["seconds"])
