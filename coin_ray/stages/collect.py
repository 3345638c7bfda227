"""Collect: image bytes -> cloud actors -> CLIP labelers -> Parquet parts, one stream of Ray Data.

Each batch is committed by the actor that finishes it, as a part of its own, so a crash
repeats at most the batches under way, and the journal below makes sure that a repeated
batch costs nothing.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from torchvision.transforms.functional import pil_to_tensor

from coin_ray import errors, storage
from coin_ray.clip.encoder import load_clip
from coin_ray.clip.labeler import CropLabeler, Labeler, RoiLabeler
from coin_ray.cloud.client import governor_limits
from coin_ray.cloud.ensemble import clip_contradicts, cloud_names, create_client
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.label_map import Prior
from coin_ray.cloud.probabilities import merge_cross_class_duplicates, to_detections
from coin_ray.cloud.protocol import RawDetections, ScoreKind
from coin_ray.cloud.services import adapter_for, label_map_for
from coin_ray.config import Cloud, PipelineConfig
from coin_ray.data.canonical import decode_rgb
from coin_ray.fusion.box_clusters import merge_duplicates
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone
from coin_ray.runs.steps import Context
from coin_ray.serving.launch import start_services
from coin_ray.stages.collecting.attempts import Attempts
from coin_ray.stages.collecting.cloud_actor import STOPPED, CloudActor, journal_uri
from coin_ray.stages.collecting.parts import PART_SCHEMA, CollectedParts, merge_parts
from coin_ray.stages.common.cluster import (
    cluster_cpus,
    count_torch_threads,
    ensure_ray,
    on_cluster,
    raise_if_disk_full,
)
from coin_ray.stages.common.progress import bar
from coin_ray.stages.common.watchdog import Watchdog
from coin_ray.tables import Provenance, detections_row

DEATHS = 2
"""Labelers that one image may cost, beside the first, of which its batch is known."""


def run(context: Context[PipelineConfig]) -> dict[str, Any]:
    """Write ``cloud.parquet`` and, with a labeler, ``clip_labels.parquet``; rows
    correspond, boxes are the cloud's.

    A cascade goes over the images twice: the second time only over those in which CLIP
    contradicts the first cloud.
    """
    images = storage.read_table(
        storage.join(context.inputs["images"], "images.parquet")
    )
    # nothing asks about those yet, and calls cost money
    images = _once(images.filter(pc.not_equal(images["split"], "val")))
    _collect(context, images, _parts(context.folder))
    if _cascades(context.config):
        doubted = _doubted(context.config, CollectedParts(_parts(context.folder)))
        _collect(
            context,
            images.filter(pc.is_in(images["image_id"], value_set=doubted)),
            _parts(context.folder, second=True),
            second=True,
        )
    return _compile(context, images["image_id"])


def _once(images: pa.Table) -> pa.Table:
    """Each image in its first row: one may be a training and a test image."""
    names = images["image_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    return images.take(np.sort(np.unique(names, return_index=True)[1]))


def _parts(folder: str, second: bool = False) -> str:
    return storage.join(folder, "second_opinions" if second else "parts")


def _cascades(config: PipelineConfig) -> bool:
    return bool(config.more_clouds) and config.ensemble.mode == "cascade"


def _collect(
    context: Context[PipelineConfig], images: pa.Table, parts: str, second: bool = False
) -> None:
    """Ask about the images that have no final answer in ``parts``; failed ones are
    asked again when a stopped run goes on.
    """
    config, total = context.config, images.num_rows
    todo = images.filter(
        pc.invert(
            pc.is_in(images["image_id"], value_set=CollectedParts(parts).answered)
        )
    )
    if not todo.num_rows:
        return
    with ExitStack() as running, ThreadPoolExecutor(1) as pool:
        starting = pool.submit(start_services, config.clouds, context.root, running)
        ensure_ray()
        # what training will need is there, and fits, before a call is paid
        load_backbone(config)
        urls = starting.result()
        # not here: a notebook's thread has an event loop already
        pool.submit(_check_services, config, urls, context.root).result()
        stream = ray.data.from_arrow(
            todo.select(["image_id", "uri"]),
            override_num_blocks=-(-todo.num_rows // config.collect.batch),
        ).map_batches(
            CloudActor,
            fn_constructor_args=(config, urls, journal_uri(context.root), second),
            batch_size=None,
            batch_format="pyarrow",
            num_cpus=0,
            compute=ray.data.ActorPoolStrategy(
                size=1,
                max_tasks_in_flight_per_actor=8,
                max_concurrent_calls_per_actor=8,
            ),
        )
        with Watchdog("collect", config.collect.stalled_after) as watch:
            _drain(
                _labelled(stream, config, parts), total - todo.num_rows, total, watch
            )


def _labelled(
    answers: ray.data.Dataset, config: PipelineConfig, parts: str
) -> Iterator[pa.Table]:
    """Answers through the labelers. A single one without a GPU of its own is this very
    process: nothing to start, nothing to send on.
    """
    gpus = config.collect.labeler_gpus
    labelers = (
        1 if gpus or config.collect.labeler == "none" else max(1, cluster_cpus() - 1)
    )
    if labelers == 1 and not gpus and not on_cluster():
        return map(
            LabelerActor(config, parts),
            answers.iter_batches(batch_size=None, batch_format="pyarrow"),
        )
    labelled = answers.map_batches(
        LabelerActor,
        fn_constructor_args=(config, parts),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,
        num_gpus=gpus,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=labelers),
    )
    return iter(labelled.iter_batches(batch_size=None, batch_format="pyarrow"))


def _drain(
    labelled: Iterator[pa.Table], before: int, total: int, watch: Watchdog
) -> None:
    """Consume what the labelers return, show progress, and raise the error that stopped
    a worker.
    """
    done, failed, calls, usd = before, 0, 0, 0.0
    stopped: str | None = None
    with bar("collect", total) as shown:
        for batch in _arriving(labelled):
            watch.seen()
            for row in batch.to_pylist():
                if row["status"] == STOPPED:
                    stopped = stopped or row["error"]
                    continue
                done += 1
                failed += row["status"] == "error"
                calls, usd = calls + row["calls"], usd + row["cost_usd"]
            shown.update(done, f"{calls} calls, {failed} failed, ${usd:.2f}")
    if stopped is not None:
        problem = json.loads(stopped)
        raise getattr(errors, problem["type"])(problem["message"])


def _arriving(labelled: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """A full disk on a worker is an OSError here too."""
    try:
        yield from labelled
    except ray.exceptions.RayError as error:
        raise_if_disk_full(str(error), "of a worker")
        raise


def _check_services(config: PipelineConfig, urls: Sequence[str], root: str) -> None:
    """One cheap request before anything is sent: an unreachable host or a wrong key
    ends the run here.
    """

    async def check() -> None:
        governors = [
            LocalGovernor(Governor(governor_limits(cloud))) for cloud in config.clouds
        ]
        client = create_client(config, urls, open_journal(journal_uri(root)), governors)
        try:
            await client.check()
        finally:
            await client.aclose()

    asyncio.run(check())


@dataclass(frozen=True, slots=True)
class Reading:
    """How scores are to be understood. ``each_class_asked``: the service looks for each
    class by itself.
    """

    prior: Prior
    score_min: float
    each_class_asked: bool

    @classmethod
    def of(cls, cloud: Cloud, classes: Sequence[str]) -> Reading:
        labels = label_map_for(cloud, classes)
        service = adapter_for(cloud).capabilities
        # http: only where an answer has them
        each_class_asked = service.per_class_scores and cloud.service != "http"
        return cls(
            labels.prior if labels is not None else Prior(),
            max(cloud.score_min, service.score_min),
            each_class_asked,
        )

    @classmethod
    def of_fused(cls, readings: Sequence[Reading]) -> Reading:
        """Of boxes that are several clouds': what is known of one cloud's labels says
        little of them.
        """
        return cls(
            Prior(),
            max(r.score_min for r in readings),
            all(r.each_class_asked for r in readings),
        )


class LabelerActor:
    """Adds CLIP's opinion of the cloud's boxes and commits the batch as a part."""

    def __init__(self, config: PipelineConfig, parts: str) -> None:
        self.config, self.parts, self.attempts = (
            config,
            parts,
            Attempts(f"{parts}_begun"),
        )
        torch.set_num_threads(count_torch_threads())
        self.labeler = make_labeler(config)
        self.readings = dict(
            zip(
                cloud_names(config.clouds),
                [Reading.of(cloud, config.classes) for cloud in config.clouds],
                strict=True,
            )
        )

    def __call__(self, batch: pa.Table) -> pa.Table:
        answered = [row for row in batch.to_pylist() if row["status"] != STOPPED]
        if answered:
            key = hashlib.sha256(
                "".join(row["image_id"] for row in answered).encode()
            ).hexdigest()[:16]
            with (
                self.attempts.at(key) as died,
                Watchdog("a labeler", self.config.collect.batch_seconds),
            ):
                label = self._carefully if died else self._labelled
                part = pa.Table.from_pylist(
                    [label(row) for row in answered], schema=PART_SCHEMA
                )
                storage.write_table(
                    storage.join(self.parts, f"{uuid.uuid4().hex}.parquet"), part
                )
        return batch.select(["image_id", "status", "calls", "cost_usd", "error"])

    def _carefully(self, row: dict[str, Any]) -> dict[str, Any]:
        """Of a batch that killed a labeler: the image that does so again is given up,
        and the others are kept.
        """
        with self.attempts.at(row["image_id"]) as died:
            if died >= DEATHS:
                reason = f"the process that labelled it has died {died} times with it"
                row = row | {
                    "status": "error",
                    "error": reason,
                    "boxes": [],
                    "class_scores": [],
                }
            return self._labelled(row)

    def _labelled(self, row: dict[str, Any]) -> dict[str, Any]:
        boxes = np.asarray(row["boxes"], np.float32).reshape(-1, 4)
        scores = np.asarray(row["class_scores"], np.float32).reshape(
            len(boxes), len(self.config.classes)
        )
        kind: ScoreKind = row["score_kind"] or "per_class"
        raw = merge_cross_class_duplicates(RawDetections(boxes, scores, kind))
        read = self._reading(row["teachers"])
        one_by_one, sources = to_detections(
            raw,
            read.prior,
            read.score_min,
            each_class_asked=read.each_class_asked,
        )
        found, kept = merge_duplicates(one_by_one, self.config.collect.fuse_iou)
        opinion: list[list[float]] = []
        if self.labeler is not None and len(found):
            opinion = self.labeler(
                pil_to_tensor(decode_rgb(row["bytes"])), found.boxes
            ).tolist()
        source = f"cloud: {', '.join(row['teachers'])}" if row["teachers"] else "cloud"
        origin = Provenance(
            source,
            row["status"],
            row["attempts"],
            row["latency_ms"],
            row["cost_usd"],
            row["error"],
        )
        prob_source = [sources[i] for i in kept.tolist()]
        more = {
            "clip_probs": opinion,
            "calls": row["calls"],
            "score_kind": row["score_kind"],
            "teachers": row["teachers"],
        }
        return detections_row(row["image_id"], found, origin, prob_source) | more

    def _reading(self, teachers: Sequence[str]) -> Reading:
        readings = [self.readings[name] for name in teachers] or list(
            self.readings.values()
        )[:1]
        return readings[0] if len(readings) == 1 else Reading.of_fused(readings)


def make_labeler(config: PipelineConfig) -> Labeler | None:
    if config.collect.labeler == "none":
        return None
    clip = load_clip(config.clip)
    if config.collect.labeler_gpus:
        clip.network.to("cuda")
    if config.collect.labeler == "crop":
        return CropLabeler(
            clip, config.classes, config.clip, config.collect.crop_context
        )
    return RoiLabeler(
        clip,
        config.classes,
        config.clip,
        config.detector.short_side,
        config.detector.long_side,
    )


def _doubted(config: PipelineConfig, parts: CollectedParts) -> pa.Array:
    """Images that the first cloud failed in, or in which CLIP contradicts it."""
    found = [pa.array([], pa.string())]
    for rows in parts.blocks(parts.counting(parts.images)):
        told = rows.select(["status", "scores", "labels", "clip_probs"]).to_pylist()
        doubts = [
            row["status"] == "error" or _contradicted(config, row) for row in told
        ]
        found += rows["image_id"].filter(pa.array(doubts)).chunks
    return pa.concat_arrays(found)


def _contradicted(config: PipelineConfig, row: dict[str, Any]) -> bool:
    scores, labels = (
        np.asarray(row["scores"], np.float32),
        np.asarray(row["labels"], np.int64),
    )
    probs = np.asarray(row["clip_probs"], np.float32).reshape(
        len(scores), len(config.classes) + 1
    )
    return clip_contradicts(scores, labels, probs, config.ensemble)


def _compile(
    context: Context[PipelineConfig], images: pa.Array | pa.ChunkedArray
) -> dict[str, Any]:
    """One row per image in the order of the images, whatever order the parts came in; a
    second opinion goes before the first.
    """
    config, first, second = (
        context.config,
        _parts(context.folder),
        _parts(context.folder, second=True),
    )
    parts = (
        CollectedParts(second, first) if _cascades(config) else CollectedParts(first)
    )
    metrics = merge_parts(
        parts,
        images,
        context.folder,
        len(config.classes) if config.collect.labeler != "none" else None,
    )
    several = {
        "answered_by": metrics.pop("answered_by"),
        "second_opinions": len(CollectedParts(second).images)
        if _cascades(config)
        else 0,
    }
    return metrics | (several if len(config.clouds) > 1 else {})
