"""Collect: image bytes -> cloud actors -> CLIP labelers -> Parquet parts, one stream of Ray Data.

Each batch is committed by the actor that finishes it, as a part of its own, so a crash repeats at most the batches under
way, and the journal below makes sure that a repeated batch costs nothing.
"""

from __future__ import annotations

import asyncio
import json
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import torch
from torchvision.transforms.functional import pil_to_tensor

from coin_ray import errors, storage, tables
from coin_ray.clip.encoder import load_clip
from coin_ray.clip.labeler import CropLabeler, Labeler, RoiLabeler
from coin_ray.cloud.client import CloudClient, limits
from coin_ray.cloud.journal import Journal
from coin_ray.cloud.limiter import Governor, LocalGovernor
from coin_ray.cloud.probabilities import fuse_duplicates, to_detections
from coin_ray.cloud.protocol import RawDetections
from coin_ray.config import Cloud, PipelineConfig
from coin_ray.data.canonical import decode_rgb
from coin_ray.models.faster_rcnn_clip.backbone import load_backbone
from coin_ray.serving.launch import local_cloud
from coin_ray.stages.asking import STOPPED, CloudActor, GovernorActor
from coin_ray.stages.cluster import ensure_ray
from coin_ray.stages.progress import bar
from coin_ray.steps import Context
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row

PART = tables.DETECTIONS.append(pa.field("clip_probs", tables.VECTORS)).append(pa.field("calls", pa.int32()))


def journal_uri(root: str) -> str:
    """Answers are kept beside the steps: no changed setting and no deleted step loses a paid one."""
    return storage.join(root, "journal")


def run(context: Context) -> dict[str, Any]:
    """Write ``cloud.parquet`` and, with a labeler, ``clip_labels.parquet``; rows correspond, boxes are the cloud's."""
    images = storage.read_table(storage.join(context.inputs["images"], "images.parquet"))
    images = images.filter(pc.not_equal(images["split"], "val"))  # nothing asks about them yet, and calls cost money
    parts = storage.join(context.folder, "parts")
    done = _committed(parts)
    todo = images.filter(pa.array([i not in done for i in images["image_id"].to_pylist()], pa.bool_()))
    if todo.num_rows:
        _collect(context, todo, parts, images.num_rows)
    return _compile(context, images["image_id"].to_pylist(), parts)


def _collect(context: Context, todo: pa.Table, parts: str, total: int) -> None:
    config = context.config
    with ExitStack() as running, ThreadPoolExecutor(1) as pool:
        starting = pool.submit(running.enter_context, _service(config.cloud, context.root))
        ensure_ray()
        load_backbone(config)  # what training will need is there, and fits, before a call is paid
        url = starting.result()
        spent = Journal.open(journal_uri(context.root)).spent()
        governor = GovernorActor.options(num_cpus=0, max_concurrency=1000).remote(config.cloud, spent)  # type: ignore[attr-defined]
        _check_service(config, url, context.root)
        stream = (
            ray.data.from_arrow(todo.select(["image_id", "uri"]))
            .repartition(max(1, -(-todo.num_rows // config.collect.batch)))
            .map_batches(
                CloudActor,
                fn_constructor_args=(config, url, journal_uri(context.root), governor),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=0,
                compute=ray.data.ActorPoolStrategy(size=1, max_tasks_in_flight_per_actor=8, max_concurrent_calls_per_actor=8),
            )
            .map_batches(
                LabelerActor,
                fn_constructor_args=(config, parts),
                batch_size=None,
                batch_format="pyarrow",
                num_cpus=1,
                compute=ray.data.ActorPoolStrategy(size=1),
            )
        )
        _drain(stream, total - todo.num_rows, total)


def _drain(stream: ray.data.Dataset, before: int, total: int) -> None:
    """Consume what the labelers return, show progress, and raise the error that stopped a worker."""
    done, failed, calls, usd = before, 0, 0, 0.0
    stopped: str | None = None
    with bar("collect", total) as shown:
        for batch in stream.iter_batches(batch_size=None, batch_format="pyarrow"):
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


def _service(cloud: Cloud, root: str) -> Any:
    from contextlib import nullcontext

    folder = storage.join(root, "local_cloud") if "://" not in root else f"/tmp/coin_ray/{uuid.uuid4().hex}"
    return nullcontext(cloud.url) if cloud.serve == "none" else local_cloud(cloud, folder)


def _check_service(config: PipelineConfig, url: str, root: str) -> None:
    """One cheap request before anything is sent: an unreachable host or a wrong key ends the run here."""

    async def check() -> None:
        client = CloudClient(
            config.cloud, config.classes, url, Journal.open(journal_uri(root)), LocalGovernor(Governor(limits(config.cloud)))
        )
        try:
            await client.check()
        finally:
            await client.aclose()

    asyncio.run(check())


class LabelerActor:
    """Adds CLIP's opinion of the cloud's boxes and commits the batch as a part."""

    def __init__(self, config: PipelineConfig, parts: str) -> None:
        self.config, self.parts = config, parts
        self.labeler = make_labeler(config)

    def __call__(self, batch: pa.Table) -> pa.Table:
        answered = [row for row in batch.to_pylist() if row["status"] != STOPPED]
        if answered:
            part = pa.Table.from_pylist([self._labelled(row) for row in answered], schema=PART)
            storage.write_table(storage.join(self.parts, f"{uuid.uuid4().hex}.parquet"), part)
        return batch.select(["image_id", "status", "calls", "cost_usd", "error"])

    def _labelled(self, row: dict[str, Any]) -> dict[str, Any]:
        boxes = np.asarray(row["boxes"], np.float32).reshape(-1, 4)
        scores = np.asarray(row["class_scores"], np.float32).reshape(len(boxes), len(self.config.classes))
        found = fuse_duplicates(to_detections(RawDetections(boxes, scores, "per_class"), "background"), self.config.collect.fuse_iou)
        opinion: list[list[float]] = []
        if self.labeler is not None and len(found):
            opinion = self.labeler(pil_to_tensor(decode_rgb(row["bytes"])), found.boxes).tolist()
        origin = Provenance("cloud", row["status"], row["attempts"], row["latency_ms"], row["cost_usd"], row["error"])
        return detections_row(row["image_id"], found, origin) | {"clip_probs": opinion, "calls": row["calls"]}


def make_labeler(config: PipelineConfig) -> Labeler | None:
    if config.collect.labeler == "none":
        return None
    clip = load_clip(config.clip)
    if config.collect.labeler == "crop":
        return CropLabeler(clip, config.classes, config.clip)
    return RoiLabeler(clip, config.classes, config.clip, config.detector.short_side, config.detector.long_side)


def _committed(parts: str) -> set[str]:
    """Images with a final answer; failed ones are asked again when a stopped run goes on."""
    files = storage.list_files(parts, ".parquet")
    if not files:
        return set()
    rows = storage.read_table(parts).select(["image_id", "status"]).to_pylist()
    return {r["image_id"] for r in rows if r["status"] not in ("error", "skipped_budget")}


def _compile(context: Context, order: list[str], parts: str) -> dict[str, Any]:
    """One row per image in the order of the images, whatever order the parts came in; the last answer of an image counts."""
    latest: dict[str, dict[str, Any]] = {}
    calls, cost = 0, 0.0
    for row in storage.read_table(parts).to_pylist():
        calls, cost = calls + row["calls"], cost + row["cost_usd"]
        if row["image_id"] not in latest or latest[row["image_id"]]["status"] in ("error", "skipped_budget"):
            latest[row["image_id"]] = row
    rows = [latest[i] for i in order]
    storage.write_table(
        storage.join(context.folder, "cloud.parquet"), pa.Table.from_pylist(rows, schema=PART).select(tables.DETECTIONS.names)
    )
    if context.config.collect.labeler != "none":
        opinions = [_opinion(row, len(context.config.classes)) for row in rows]
        storage.write_table(storage.join(context.folder, "clip_labels.parquet"), tables.detections_table(opinions))
    states = [row["status"] for row in rows]
    failed = states.count("error")
    reasons = sorted({row["error"] for row in rows if row["error"]})[:10]
    return {
        "calls": {"made": calls, "cached": states.count("cached"), "failed": failed, "cost_usd": round(cost, 6)},
        "empty": sum(s in ("ok", "cached", "empty") and not row["boxes"] for s, row in zip(states, rows, strict=True)),
        "boxes": sum(len(row["boxes"]) for row in rows),
        "errors": reasons,
    }


def _opinion(row: dict[str, Any], classes: int) -> dict[str, object]:
    """CLIP's best foreground class of each cloud box; probabilities keep the background column."""
    probs = torch.tensor(row["clip_probs"], dtype=torch.float32).reshape(-1, classes + 1)
    best = probs[:, :-1].max(1)
    found = Detections(torch.tensor(row["boxes"], dtype=torch.float32).reshape(-1, 4), best.values, best.indices, probs)
    return detections_row(row["image_id"], found, Provenance("clip_labels", row["status"]))
