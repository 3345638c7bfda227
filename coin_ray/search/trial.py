"""One trial: the pipeline's own distillation with some settings replaced, looked at
twice on the way and at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from coin_ray import storage, tables
from coin_ray.errors import CoinError
from coin_ray.evaluation.label_free import label_free
from coin_ray.evaluation.voc import average_precision
from coin_ray.runs.steps import Context, execute
from coin_ray.search.plan import FULL, LOOKS, Search
from coin_ray.search.space import Settings
from coin_ray.stages import distill
from coin_ray.stages.common.prediction import predictions
from coin_ray.stages.common.teacher_outputs import image_table
from coin_ray.stages.common.training_job import Fit, save_weights, train
from coin_ray.stages.propagate import WEIGHTS
from coin_ray.structures import Detections
from coin_ray.training.loop import Curve

FAILED = -1.0
"""Score of a trial that failed: worse than any."""
Report = Callable[[dict[str, Any]], None]
"""Told of a trial so far: ``ninths`` made, ``score``, and what it consists of."""


def run_trial(search: Search, settings: Settings, report: Report) -> None:
    """Train, or go on where a killed trial stopped; a finished student is only
    measured. What diverges counts as failed.
    """
    try:
        figures = _distilled(search, settings, report)
    except CoinError as error:
        figures = {"score": FAILED, "failure": f"{type(error).__name__}: {error}"}
    report({"ninths": FULL, **figures})


def _distilled(search: Search, settings: Settings, report: Report) -> dict[str, Any]:
    config, steps = search.trial_config(settings), search.steps(settings)
    for step in steps.values():
        if step.manifest(search.root) is None:
            watched = (
                partial(_watched, search=search, report=report)
                if step.name == "distill"
                else None
            )
            execute(step, config, search.root, watched)
    return final_figures(search, steps["distill"].folder(search.root))


def final_figures(search: Search, folder: str) -> dict[str, Any]:
    """Of the student in a finished distillation's folder; beside a label-free score
    also what labels say, if there are some.
    """
    weights = {
        "student": storage.join(folder, WEIGHTS),
        "teacher": storage.join(folder, "teacher.pt"),
    }
    figures = measured(search, weights)
    return (
        figures
        if search.objective == "map50"
        else figures | {"validation": validated(search, weights["student"])}
    )


def _watched(context: Context, search: Search, report: Report) -> dict[str, Any]:
    def look(every: int, step: int, state: Mapping[str, Any] | None) -> None:
        ninths, rest = divmod(step + 1, every)
        if state is None or rest or search.scheduler == "none" or ninths not in LOOKS:
            return
        report({"ninths": ninths, **looked(search, context.folder, state)})

    def fit(work: Fit) -> Curve:
        every = max(1, work.optimize.steps // FULL)
        saving = replace(work, optimize=replace(work.optimize, checkpoint_every=every))
        return train(saving, lambda step, _, state: look(every, step, state))

    return distill.run(context, fit)


def looked(search: Search, folder: str, state: Mapping[str, Any]) -> dict[str, Any]:
    """``measured`` of a training's state; the weights lie below ``folder`` as long."""
    weights = {
        name: storage.join(folder, "looked_at", f"{name}.pt")
        for name in ("student", "teacher")
    }
    for name, uri in weights.items():
        save_weights(uri, state["task"][name])
    figures = measured(search, weights)
    for uri in weights.values():
        storage.remove(uri)
    return figures


def measured(search: Search, weights: Mapping[str, str]) -> dict[str, Any]:
    """``score`` and its parts, of student and teacher weights by URI: on validation
    images, or label-free on held-out ones.
    """
    if search.objective == "map50":
        value = validated(search, weights["student"])
        return {"score": value, "validation": value}
    expected = search.expected()
    found = _found(search, dict(weights), "train", expected)
    return label_free(
        found["student"], found["teacher"], expected, len(search.config.classes)
    )


def validated(search: Search, student: str) -> float | None:
    """mAP50 on the validation images; None if they have no truth. Test images are never
    looked at.
    """
    truth = search.validation()
    if not truth:
        return None
    found = _found(search, {"student": student}, "val", truth)
    return average_precision(
        found["student"],
        truth,
        len(search.config.classes),
        plus_one=search.config.evaluate.plus_one,
    ).map


def _found(
    search: Search, weights: dict[str, str], split: str, wanted: Container[str]
) -> dict[str, Mapping[str, Detections]]:
    """Results of each detector on the wanted images of a split."""
    images = image_table(search.shared["images"].folder(search.root), split)
    images = images.filter(
        pa.array([i in wanted for i in images["image_id"].to_pylist()], pa.bool_())
    )
    found = pa.concat_tables(
        [tables.DETECTIONS.empty_table(), *predictions(weights, images, search.config)]
    )
    return {
        n: tables.read_detections(
            found.filter(pc.equal(found["source"], n)), len(search.config.classes)
        )
        for n in weights
    }
