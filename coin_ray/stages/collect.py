"""Collect: image bytes -> cloud actor -> CLIP labelers -> Parquet parts, as one stream of
Ray Data.

Each batch is committed by the labeler that finishes it, as a part of its own. So a crash
repeats at most the batches under way, and repeating them costs no call: the journal has
their answers.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray

from coin_ray import errors, storage
from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.ensemble import clip_contradicts, create_client
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.protocol import NO_COUNTS, BoxCounts
from coin_ray.config import PipelineConfig
from coin_ray.runs.estimate import print_other_answers
from coin_ray.runs.failed_images import failed_count, needs_every_cloud
from coin_ray.runs.steps import Context, Metrics, read_reopened, remove_readers
from coin_ray.serving.launch import start_services
from coin_ray.stages.collecting.batches import answer_by_batches
from coin_ray.stages.collecting.call_account import (
    NO_CALLS,
    RunAccount,
    describe_calls,
)
from coin_ray.stages.collecting.cloud_actor import STOPPED, CloudActor, journal_uri
from coin_ray.stages.collecting.failures import FailureReasons
from coin_ray.stages.collecting.governor_actor import start_governor
from coin_ray.stages.collecting.labeler_actor import (
    LabelerActor,
    describe_labeler,
    text_cache,
)
from coin_ray.stages.collecting.model_check import check_models
from coin_ray.stages.collecting.parts import CollectedParts, merge_parts
from coin_ray.stages.collecting.pools import (
    cloud_actor_cpus,
    count_cloud_actors,
    count_labelers,
    most_cloud_actors,
)
from coin_ray.stages.common.blocks import dataset_from_table
from coin_ray.stages.common.cluster import (
    cluster_cpus,
    ensure_ray,
    node_address,
    on_cluster,
    raise_if_storage_failed,
)
from coin_ray.stages.common.progress import show_progress
from coin_ray.stages.common.watchdog import Watchdog

EARLIER_WORKERS_SECONDS = 30.0
POLL_SECONDS = 0.2
BATCHES_IN_FLIGHT = 8
"""Batches that a cloud actor works on at once. Ray Data starts further actors only if
twice as many wait for each."""


def run(context: Context[PipelineConfig]) -> Metrics:
    """Write ``cloud.parquet`` and, with a labeler, ``clip_labels.parquet``; their rows
    correspond, both have the cloud's boxes.

    A cascade goes over the images twice: the second time only over those in which CLIP
    contradicts the first cloud.

    A collection that was finished before asks again about the images that failed. If
    fewer fail now, the results of the steps that read it are removed. Raises CloudError
    if more than ``cloud.max_error_share`` of the images failed.
    """
    config = context.config
    images = storage.read_table(
        storage.join(context.inputs["images"], "images.parquet")
    )
    # nothing reads answers about validation images, and calls cost money
    images = _first_rows(images.filter(pc.not_equal(images["split"], "val")))
    first_folder = _parts_folder(context.folder)
    _collect(context, images, first_folder)
    if _is_cascade(config):
        contradicted = _contradicted_images(config, CollectedParts(first_folder))
        _collect(
            context,
            images.filter(pc.is_in(images["image_id"], value_set=contradicted)),
            _parts_folder(context.folder, second=True),
            second=True,
        )
    account = _read_account(context)
    metrics = _merge(context, images["image_id"], account)
    _print_account(account, metrics, images)
    if "box_counts" in metrics:
        _print_box_counts(_all_parts(context).box_counts, images)
    _check_error_share(context, images)
    _remove_outdated_readers(context, metrics)
    return metrics


def _first_rows(images: pa.Table) -> pa.Table:
    """Return the first row of each image: one may be a training and a test image."""
    image_ids = images["image_id"].combine_chunks()
    codes = image_ids.dictionary_encode().indices.to_numpy()
    first_rows = np.unique(codes, return_index=True)[1]
    return images.take(np.sort(first_rows))


def _parts_folder(step_folder: str, second: bool = False) -> str:
    return storage.join(step_folder, "second_opinions" if second else "parts")


def _is_cascade(config: PipelineConfig) -> bool:
    return bool(config.more_clouds) and config.ensemble.mode == "cascade"


def _collect(
    context: Context[PipelineConfig],
    images: pa.Table,
    parts_folder: str,
    second: bool = False,
) -> None:
    """Ask about the images that have no final answer in the parts. Failed ones are asked
    again, also if one of several clouds failed; refused ones only with
    ``collect.retry_refused``.
    """
    config = context.config
    parts = CollectedParts(parts_folder)
    remaining = _remaining_images(
        images, parts, config.collect.retry_refused, needs_every_cloud(config)
    )
    if not remaining.num_rows:
        return
    _wait_for_earlier_workers(context.root)
    if not parts.files:
        print_other_answers(config, remaining, context.root)
    with ExitStack() as services, ThreadPoolExecutor(1) as pool:
        starting = pool.submit(
            start_services, config.clouds, context.root, services, node_address()
        )
        ensure_ray()
        check_models(config, text_cache(parts_folder))  # before a call is paid
        print(f"collect: {describe_labeler(config)}", flush=True)
        urls = starting.result()
        # in a thread: a notebook's own thread runs an event loop already
        pool.submit(_check_services, config, urls, context.root).result()
        count = 1 if _is_cascade(config) and not second else len(config.clouds)
        answer_by_batches(
            config,
            list(zip(config.clouds, urls, strict=True))[:count],
            remaining["uri"].to_pylist(),
            context.root,
            _run_name(context),
        )
        answers = _ask(context, remaining, urls, second)
        with Watchdog("collect", config.collect.stalled_after) as watchdog:
            _show_collected(
                _label_answers(answers, config, parts_folder),
                images,
                images.num_rows - remaining.num_rows,
                watchdog,
                lambda: _read_account(context),
            )


def _remaining_images(
    images: pa.Table,
    parts: CollectedParts,
    retry_refused: bool,
    every_cloud: bool = False,
) -> pa.Table:
    """Return the images that are to be asked about; ``every_cloud``: as in
    ``CollectedParts.settled_ids``.
    """
    settled_ids = parts.settled_ids(
        retry_refused=retry_refused, every_cloud=every_cloud
    )
    settled = pc.is_in(images["image_id"], value_set=settled_ids)
    return images.filter(pc.invert(settled))


def _wait_for_earlier_workers(root: str) -> None:
    """Wait until the workers of a killed run have ended: they may still store answers,
    which need not be paid again.
    """
    journal = open_journal(journal_uri(root))
    give_up_at = time.monotonic() + EARLIER_WORKERS_SECONDS
    is_announced = False
    while journal.has_other_users() and time.monotonic() < give_up_at:
        if not is_announced:
            print("collect: waiting for the workers of an earlier run", flush=True)
            is_announced = True
        time.sleep(POLL_SECONDS)
    journal.close()


def _ask(
    context: Context[PipelineConfig],
    images: pa.Table,
    urls: Sequence[str],
    second: bool,
) -> ray.data.Dataset:
    """Return the stream of answers about the images, as tables of ``ANSWER_SCHEMA``."""
    config = context.config
    num_batches = -(-images.num_rows // config.collect.batch)
    journal = journal_uri(context.root)
    actors = min(count_cloud_actors(config, cluster_cpus()), num_batches)
    most_actors = min(most_cloud_actors(config), num_batches)
    governor = start_governor(config, urls, journal) if most_actors > 1 else None
    return dataset_from_table(
        images.select(["image_id", "uri"]), num_batches
    ).map_batches(
        CloudActor,
        fn_constructor_args=(
            config,
            urls,
            journal,
            second,
            _run_name(context),
            governor,
        ),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=cloud_actor_cpus(config),
        compute=ray.data.ActorPoolStrategy(
            min_size=1,
            max_size=most_actors,
            initial_size=actors,
            max_tasks_in_flight_per_actor=BATCHES_IN_FLIGHT * min(most_actors, 2),
            max_concurrent_calls_per_actor=BATCHES_IN_FLIGHT,
        ),
    )


def _label_answers(
    answers: ray.data.Dataset, config: PipelineConfig, parts_folder: str
) -> Iterator[pa.Table]:
    """Send the answers through the labelers. A single one without a GPU of its own is
    this very process: nothing to start, nothing to send on.
    """
    gpus = config.collect.labeler_gpus
    labelers = count_labelers(config)
    if labelers == 1 and not gpus and not on_cluster():
        batches = answers.iter_batches(batch_size=None, batch_format="pyarrow")
        return map(LabelerActor(config, parts_folder), batches)
    labelled = answers.map_batches(
        LabelerActor,
        fn_constructor_args=(config, parts_folder),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=1,
        num_gpus=gpus,
        compute=ray.data.ActorPoolStrategy(min_size=1, max_size=labelers),
    )
    return iter(labelled.iter_batches(batch_size=None, batch_format="pyarrow"))


def _run_name(context: Context[PipelineConfig]) -> str:
    """Return the name under which the journal records the calls of this collection."""
    return context.folder.rstrip("/").rpartition("/")[2]


def _read_account(context: Context[PipelineConfig]) -> RunAccount:
    return RunAccount.read(journal_uri(context.root), _run_name(context))


def _show_collected(
    batches: Iterator[pa.Table],
    images: pa.Table,
    count: int,
    watchdog: Watchdog,
    read_account: Callable[[], RunAccount] = RunAccount,
) -> None:
    """Consume the labelers' batches, show progress, and raise the error that stopped a
    worker, with the commonest reason of failed images. ``count``: those of ``images``
    that were answered before; ``read_account``: reads the calls of all the run's
    processes.

    A batch that is repeated because its worker was lost counts no call for an answer
    that is on record, so the last line has the calls of the journal.
    """
    failures = FailureReasons()
    account = read_account().run
    calls = account.calls
    usd = account.usd
    stop_error: str | None = None
    try:
        with show_progress("collect", images.num_rows) as progress:
            for batch in _raise_storage_errors(batches):
                watchdog.notify_progress()
                for row in batch.to_pylist():
                    if row["status"] == STOPPED:
                        stop_error = stop_error or row["error"]
                        continue
                    count += 1
                    if row["status"] == "error":
                        failures.add(row["image_id"], row["error"])
                    calls += row["calls"]
                    usd += row["cost_usd"]
                if count >= images.num_rows:
                    account = read_account().run
                    calls, usd = max(calls, account.calls), max(usd, account.usd)
                progress.update(
                    count, f"{calls} calls, {failures.total} failed, ${usd:.2f}"
                )
    except BaseException:
        _print_failures(failures, images, count)
        raise
    if stop_error is not None:
        _print_failures(failures, images, count)
        error = json.loads(stop_error)
        raise getattr(errors, error["type"])(error["message"])


def _print_failures(failures: FailureReasons, images: pa.Table, count: int) -> None:
    """Print the commonest reason of the failed images, if any of ``count`` failed."""
    if failures.total:
        print(f"collect: {failures.describe(images, count)}", flush=True)


def _raise_storage_errors(batches: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """Yield the batches; raise here that a worker's storage is full or away."""
    try:
        yield from batches
    except ray.exceptions.RayError as error:
        raise_if_storage_failed(str(error), "of a worker")
        raise


def _check_services(config: PipelineConfig, urls: Sequence[str], root: str) -> None:
    """Send one cheap request before any image: an unreachable host or a wrong key ends
    the run here.
    """

    async def check() -> None:
        governors = [
            LocalGovernor(Governor(governor_limits(cloud))) for cloud in config.clouds
        ]
        journal = open_journal(journal_uri(root))
        client = create_client(config, urls, journal, governors)
        try:
            await client.check()
        finally:
            await client.aclose()
            journal.close()

    asyncio.run(check())


def _contradicted_images(config: PipelineConfig, parts: CollectedParts) -> pa.Array:
    """Return the ids of the images that the first cloud failed in, or in which CLIP
    contradicts it.
    """
    image_ids = [pa.array([], pa.string())]
    for block in parts.read_blocks(parts.select_rows(parts.image_ids)):
        statuses = block["status"].to_pylist()
        asked_again = [
            status == "error" or _is_contradicted(config, block, row)
            for row, status in enumerate(statuses)
        ]
        image_ids += block["image_id"].filter(pa.array(asked_again)).chunks
    return pa.concat_arrays(image_ids)


def _is_contradicted(config: PipelineConfig, block: pa.Table, row: int) -> bool:
    scores = np.asarray(block["scores"][row].as_py(), np.float32)
    labels = np.asarray(block["labels"][row].as_py(), np.int64)
    clip_probs = np.asarray(block["clip_probs"][row].as_py(), np.float32)
    return clip_contradicts(
        scores,
        labels,
        clip_probs.reshape(len(scores), len(config.classes) + 1),
        config.ensemble,
    )


def _all_parts(context: Context[PipelineConfig]) -> CollectedParts:
    """Return the parts of the collection, second opinions first."""
    folders = [_parts_folder(context.folder)]
    if _is_cascade(context.config):
        folders.insert(0, _parts_folder(context.folder, second=True))
    return CollectedParts(*folders)


def _merge(
    context: Context[PipelineConfig],
    image_ids: pa.Array | pa.ChunkedArray,
    account: RunAccount = NO_CALLS,
) -> Metrics:
    """Merge the parts into one row per image, in the order of the images; a second
    opinion replaces the first. ``account``: the calls of the journal.
    """
    config = context.config
    second_opinions = 0
    if _is_cascade(config):
        second_folder = _parts_folder(context.folder, second=True)
        second_opinions = len(CollectedParts(second_folder).image_ids)
    parts = _all_parts(context)
    counts = merge_parts(
        parts,
        image_ids,
        context.folder,
        len(config.classes) if config.collect.labeler != "none" else None,
    )
    metrics: Metrics = {
        "calls": account.metrics(
            calls=counts.calls,
            usd=counts.usd,
            cached=counts.cached,
            failed=counts.failed,
        ),
        "empty": counts.empty,
        "boxes": counts.boxes,
        "errors": counts.errors,
    }
    if len(config.clouds) > 1:
        metrics["answered_by"] = counts.answered_by
        metrics["second_opinions"] = second_opinions
    if needs_every_cloud(config):
        metrics["answered_in_part"] = counts.answered_in_part
    if parts.box_counts:
        box_totals = sum(parts.box_counts.values(), NO_COUNTS)
        metrics["box_counts"] = box_totals.as_dict()
    return metrics


def _print_account(account: RunAccount, metrics: Metrics, images: pa.Table) -> None:
    """Print what was made, answered before and may be billed."""
    print(f"collect: {describe_calls(metrics['calls'])}", flush=True)
    if unanswered := account.describe_unanswered(images):
        print(f"collect: {unanswered}", flush=True)


def _print_box_counts(box_counts: Mapping[str, BoxCounts], images: pa.Table) -> None:
    """Print how many boxes of the answers were dropped or put right, with the image that
    has most of them.
    """
    most = max(box_counts, key=lambda image_id: box_counts[image_id].changed)
    if not box_counts[most].changed:
        return
    row = pc.index(images["image_id"], most).as_py()
    image = images["uri"][row].as_py() if row >= 0 else most
    totals = sum(box_counts.values(), NO_COUNTS)
    print(
        f"collect: boxes in {len(box_counts)} answers are not used as they came:"
        f" {totals.describe()}; most in {image}: {box_counts[most].describe()}",
        flush=True,
    )


def _check_error_share(context: Context[PipelineConfig], images: pa.Table) -> None:
    """Print the commonest reason of the failed images. Raise CloudError if they are more
    than ``cloud.max_error_share`` of all, however few those are.
    """
    config = context.config
    failures = FailureReasons.read(storage.join(context.folder, "cloud.parquet"))
    if failures.total <= config.cloud.max_error_share * images.num_rows:
        _print_failures(failures, images, images.num_rows)
        return
    raise errors.CloudError(
        f"{failures.describe(images, images.num_rows)}. At most"
        f" cloud.max_error_share={config.cloud.max_error_share:g} of them may fail."
        " Remove the cause and run the same command again: it asks about failed images"
        " only (about refused ones with --collect.retry-refused), and answers so far"
        " are kept"
    )


def _remove_outdated_readers(
    context: Context[PipelineConfig], metrics: Metrics
) -> None:
    """Remove the results that were made from this collection when more of its images had
    failed than now; the runner makes them again.
    """
    former = read_reopened(context.folder)
    if former is None:
        return
    answered = failed_count(former.metrics) - failed_count(metrics)
    if answered <= 0:
        return
    outdated = remove_readers(context.root, context.folder)
    again = f"; made again: {', '.join(outdated)}" if outdated else ""
    print(
        f"collect: {answered} images that failed have an answer now{again}", flush=True
    )
