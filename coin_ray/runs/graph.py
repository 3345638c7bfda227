"""The whole adaptation on one screen: which step needs which, and what identifies each."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from coin_ray import storage
from coin_ray.config import PipelineConfig, Propagate
from coin_ray.config.files import identity
from coin_ray.runs.steps import Step

ORDER = (
    "images",
    "corrections",
    "collect",
    "propagate",
    "separate",
    "distill",
    "pseudo_label",
    "oracle",
    "evaluate",
    "export",
    "report",
)


def graph(config: PipelineConfig, *, baselines: bool = False) -> dict[str, Step]:
    """All steps by name, in order.

    Corrections, if there are any, are checked before a call is paid. ``baselines`` adds
    two students with the same network, first weights and number of steps: one on plain
    cloud labels, one on the truth.
    """
    c = config
    views = (c.detector.short_side, c.detector.long_side)
    detector = (c.clip, c.mobilenet, c.detector, c.classes, c.seed)
    baseline = baseline_training(c)
    labels = {
        name: value
        for name, value in identity(c.labels).items()
        if name != "cloud_vectors"
    }
    # propagation does not read these
    separating = identity(c.separate) | {"cloud_vectors": c.labels.cloud_vectors}
    network = (
        []
        if c.distill.student == "faster-rcnn"
        else [c.distill.student, c.distill.co_detr, c.distill.co_detr_classes]
    )

    images = Step("images", "images", identity=c.data)
    reviewed = (
        (
            Step(
                "corrections",
                "corrections",
                (_content(c.corrections), c.classes),
                (images,),
            ),
        )
        if c.corrections
        else ()
    )
    collect = Step(
        "collect",
        "collect",
        identity=(c.cloud, c.classes, c.collect, c.clip, views, *_reading(c)),
        inputs=(images,),
    )
    propagate = Step(
        "propagate",
        "propagate",
        (detector, labels, c.propagate),
        (images, collect, *reviewed),
        options={"labels": "clip"},
    )
    separate = Step(
        "separate",
        "separate",
        (labels, separating),
        (images, collect, propagate, *reviewed),
        version=2,
    )
    distill = Step(
        "distill",
        "distill",
        (detector, labels, separating, c.distill),
        (images, collect, propagate, separate, *reviewed),
    )
    pseudo_label = Step(
        "pseudo_label",
        "propagate",
        (detector, labels, baseline, *network),
        (images, collect, *reviewed),
        options={"labels": "cloud"},
    )
    oracle = Step(
        "oracle",
        "propagate",
        (detector, baseline, *network),
        (images,),
        options={"labels": "truth"},
    )
    students = (propagate, distill, *((pseudo_label, oracle) if baselines else ()))
    deployed = c.distill.co_detr_detects if c.distill.student == "co-detr" else ""
    evaluate = Step(
        "evaluate",
        "evaluate",
        identity=(c.classes, c.evaluate, deployed),
        inputs=(images, collect, separate, *students),
    )
    export = Step(
        "export", "export", identity=(c.detector, deployed), inputs=(distill,)
    )
    shown = (images, collect, separate, *students, evaluate, export, *reviewed)
    report = Step("report", "report", identity=c.preset, inputs=shown, version=2)
    steps = (
        images,
        *reviewed,
        collect,
        propagate,
        separate,
        distill,
        *students[2:],
        evaluate,
        export,
        report,
    )
    return {step.name: step for step in steps}


def _reading(config: PipelineConfig) -> list[Any]:
    """What else decides what is read from answers: further clouds, how several are one,
    and the content of label maps.
    """
    several: list[Any] = [config.more_clouds] if config.more_clouds else []
    several += [config.ensemble] if len(config.clouds) > 1 else []
    return several + [
        _digest(cloud.label_map)
        for cloud in config.clouds
        if cloud.label_map is not None
    ]


def _content(corrections: tuple[str, ...]) -> list[str]:
    # only where it is needed: it imports every format
    from coin_ray.data.review.corrections import content

    return [content(place) for place in corrections]


def _digest(uri: str) -> str:
    """Empty for a file that can't be read; the step tells when it needs it."""
    try:
        return hashlib.sha256(storage.read_bytes(uri)).hexdigest()[:16]
    except OSError:
        return ""


def baseline_training(config: PipelineConfig) -> Propagate:
    """The baselines' training on plain labels: the student's schedule over as many
    steps as it has made since its weights left CLIP.
    """
    fit = config.distill.fit
    before = (
        config.propagate.fit.steps
        if config.distill.start_from == "clip_detector"
        else 0
    )
    later = tuple(milestone + before for milestone in fit.milestones)
    return replace(
        config.propagate,
        soft_labels=False,
        fit=replace(fit, steps=before + fit.steps, milestones=later),
    )
