"""Estimate the calls, cost and time of a collection without making a call."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from coin_ray import storage
from coin_ray.config import PLAIN_RENDERING, Cloud, DemoScenes, Folder, PipelineConfig
from coin_ray.runs.steps import Step, with_found_range
from coin_ray.serving.launch import EMULATED_CLOUDS

if TYPE_CHECKING:
    import pyarrow as pa

    from coin_ray.cloud.client import CloudClient
    from coin_ray.cloud.journal.base import Journal
    from coin_ray.runs.sent_digests import SentDigests

SECONDS_PER_DAY = 86_400
MINUTES_PER_DAY = 1440
SAMPLED_IMAGES = 32
"""Images that are rendered to see whether the journal has answers about them."""
LOCAL_URL = "http://127.0.0.1"
"""Address of a local server that has not been started yet."""


@dataclass(frozen=True)
class Estimate:
    """The calls that one service would get, over all its renderings.

    ``answered``: calls whose response the journal holds. ``rate``: calls per second
    within the cloud's limits. ``at_most``: some of the calls may not be needed.
    """

    cloud: str
    images: int
    answered: int
    calls: int
    usd: float
    minutes: float
    rate: float
    at_most: bool = False
    views: int = 1
    questions: int = 1


def estimate_cost(
    config: PipelineConfig, steps: Mapping[str, Step], root: str
) -> list[Estimate]:
    """Return an estimate for each service.

    If the images of the run have not been listed yet, files are counted without opening
    them.
    """
    from coin_ray.cloud.ensemble import cloud_names
    from coin_ray.cloud.question_client import questions_for
    from coin_ray.cloud.services import call_price

    mode = config.ensemble.mode if config.more_clouds else "fuse"
    image_count = _count_images(config, steps["images"], root)
    journal = _open_existing_journal(root)
    answered_images = _answered_images(config, steps, root, journal)
    if mode == "failover":  # one service's answer is enough for an image
        answered_by_any = set[str]().union(*answered_images)
        answered_images = [answered_by_any] * len(answered_images)
    names = cloud_names(config.services)
    recent_calls = _count_recent_calls(config, journal)
    if journal is not None:
        journal.close()
    estimates: list[Estimate] = []
    first = 0
    for cloud, name, recent in zip(config.services, names, recent_calls, strict=True):
        questions = questions_for(config, cloud)
        calls_per_image = len(cloud.views) * len(questions)
        of_service = answered_images[first : first + calls_per_image]
        first += calls_per_image
        answered = sum(len(images) for images in of_service)
        calls = max(image_count * calls_per_image - answered, 0)
        has_negatives = any(question.is_negative for question in questions)
        rate = effective_rate(cloud)
        estimate = Estimate(
            name,
            images=image_count,
            answered=answered,
            calls=calls,
            usd=calls * call_price(cloud),
            minutes=seconds_needed(calls, rate, cloud.per_day, recent) / 60,
            rate=rate,
            at_most=has_negatives or (bool(estimates) and mode != "fuse"),
            views=len(cloud.views),
            questions=len(questions),
        )
        estimates.append(estimate)
    return estimates


def seconds_needed(calls: int, rate: float, per_day: int | None, today: int) -> float:
    """Return the duration of ``calls`` at ``rate`` per second.

    ``per_day`` limits the calls in any 24 hours, of which ``today`` have been made.
    """
    if per_day is None:
        return calls / rate
    calls_after_today = calls - max(per_day - today, 0)
    if calls_after_today <= 0:
        return calls / rate
    days = math.ceil(calls_after_today / per_day)
    calls_on_last_day = calls_after_today - (days - 1) * per_day
    return max(calls / rate, days * SECONDS_PER_DAY + calls_on_last_day / rate)


def print_estimate(cloud: Cloud, estimate: Estimate) -> None:
    """Print a service's estimate, and the limits that would stop the run before its end."""
    from coin_ray.cloud.services import call_price

    price = call_price(cloud)
    renderings = f" in {estimate.views} views" if estimate.views > 1 else ""
    if estimate.questions > 1:
        renderings += f", {estimate.questions} questions about each"
    at_most = "at most " if estimate.at_most else ""
    duration = f"{_format_minutes(estimate.minutes)} at {estimate.rate:g} calls/s"
    if cloud.batch:
        duration = "in batches, within a day"
    print(
        f"\n{estimate.cloud}: {estimate.images} images{renderings},"
        f" {estimate.answered} answered already, {at_most}{estimate.calls} calls to"
        f" make, ${estimate.usd:.2f} at ${price:g} each, {duration}"
    )
    if cloud.per_day is not None and estimate.calls > cloud.per_day:
        print(
            f"cloud.per_day = {cloud.per_day} will stop the run once a day; rerun the"
            " same command to continue"
        )
    if cloud.max_usd is not None and estimate.usd > cloud.max_usd:
        affordable_calls = int(cloud.max_usd / price)
        print(
            f"cloud.max_usd = {cloud.max_usd:g} would stop the run after about"
            f" {affordable_calls} calls"
        )
    if cloud.max_calls is not None and estimate.calls > cloud.max_calls:
        print(f"cloud.max_calls = {cloud.max_calls} would stop the run before the end")


def effective_rate(cloud: Cloud) -> float:
    """Return the calls per second within the limits of a cloud or its local emulation."""
    from coin_ray.cloud.accounts import governor_limits

    rate = governor_limits(cloud).rate
    if cloud.serve in EMULATED_CLOUDS and cloud.serve_latency:
        return min(rate, cloud.in_flight / cloud.serve_latency)
    return rate


def _format_minutes(minutes: float) -> str:
    if minutes < MINUTES_PER_DAY:
        return f"{minutes:.1f} minutes"
    return f"{minutes / MINUTES_PER_DAY:.1f} days"


def _count_images(config: PipelineConfig, images: Step, root: str) -> int:
    """Return the images that the clouds are asked about: train and test."""
    manifest = images.read_manifest(root)
    if manifest is not None:
        counts = manifest.metrics["count"]
        in_both = manifest.metrics.get("in_both", 0)
        return int(counts["train"] + counts["test"] - in_both)
    if isinstance(config.data, DemoScenes):
        return config.data.train + config.data.test
    from coin_ray.data.formats import list_image_files

    files: list[str] = []
    for folder in (config.data.images, config.data.test):
        if folder:
            files += list_image_files(storage.absolute_uri(folder))
    return len(set(files) if config.data.same_images else files)


def _open_existing_journal(root: str) -> Journal | None:
    """Return the root's journal; None if there is none, which is not created."""
    from coin_ray.cloud.journal.opening import open_journal

    uri = storage.join(root, "journal")
    return open_journal(uri) if storage.exists(uri) else None


def _count_recent_calls(config: PipelineConfig, journal: Journal | None) -> list[int]:
    """Return the calls of each service in the last 24 hours."""
    from coin_ray.cloud.accounts import account_name
    from coin_ray.cloud.services import adapter_for

    if journal is None:
        return [0] * len(config.services)
    yesterday = time.time() - SECONDS_PER_DAY
    counts = []
    for cloud in config.services:
        account = account_name(cloud, _endpoint(cloud), adapter_for(cloud))
        counts.append(len(journal.call_starts(account, yesterday)))
    return counts


def _answered_images(
    config: PipelineConfig,
    steps: Mapping[str, Step],
    root: str,
    journal: Journal | None,
) -> list[set[str]]:
    """Return, for each cloud and question, the URIs of the run's images that the journal
    has answers to.

    An answer counts if it was given for the same classes, model and threshold.
    """
    from coin_ray.cloud.journal.keys import TASK
    from coin_ray.cloud.question_client import questions_for

    call_count = sum(len(questions_for(config, cloud)) for cloud in config.clouds)
    answered_images: list[set[str]] = [set() for _ in range(call_count)]
    config = with_found_range(config, steps["images"].folder(root))
    image_table = storage.join(steps["images"].folder(root), "images.parquet")
    if journal is None or not storage.exists(image_table):
        return answered_images
    clients = _offline_clients(config, journal)
    table = storage.read_table(image_table)
    is_asked = [split != "val" for split in table["split"].to_pylist()]
    asked = table.filter(is_asked).select(["uri", "image_id"])
    uris: list[str] = asked["uri"].to_pylist()
    image_ids: list[str] = asked["image_id"].to_pylist()
    journal_keys: Sequence[str] = journal.keys()
    answered_keys = {key for key in journal_keys if not key.endswith(TASK)}
    unmatched_keys = set(answered_keys)
    for client, images in zip(clients, answered_images, strict=True):
        if client.rendering[1] != PLAIN_RENDERING:
            continue
        for uri, image_id in zip(uris, image_ids, strict=True):
            key = client.key_of_unchanged_file(image_id)
            if key in answered_keys:
                images.add(uri)
                unmatched_keys.discard(key)
    unknown_uris = [
        uri for uri in uris if any(uri not in images for images in answered_images)
    ]
    if not unmatched_keys or not unknown_uris:
        return answered_images
    # the key of a file that is not sent as it is takes decoding and encoding it
    digests = _open_sent_digests(config, root)
    for uri in unknown_uris:
        if not unmatched_keys:
            break
        keys = _rendered_keys(uri, clients, config.intensity_range, digests)
        for key, images in zip(keys, answered_images, strict=False):
            if key in answered_keys:
                images.add(uri)
        unmatched_keys -= set(keys)
    digests.save()
    return answered_images


def _open_sent_digests(config: PipelineConfig, root: str) -> SentDigests:
    """Return the known digests of the run's images as they are sent."""
    from coin_ray.data.listing import list_versions
    from coin_ray.runs.sent_digests import SentDigests

    versions: dict[str, str] = {}
    if isinstance(config.data, Folder):
        with suppress(OSError):
            versions = list_versions(config.data, root)
    return SentDigests(root, versions)


def print_other_answers(config: PipelineConfig, images: pa.Table, root: str) -> None:
    """Print a line if the journal has answers, and none of them is about these images
    with these settings: they would all be asked, and paid, again.

    ``images``: columns ``image_id`` and ``uri``.
    """
    from coin_ray.cloud.journal.keys import TASK
    from coin_ray.cloud.journal.opening import open_journal

    journal_folder = storage.join(root, "journal")
    if not storage.exists(journal_folder):
        return
    journal = open_journal(journal_folder)
    journal_keys: Sequence[str] = journal.keys()
    keys = {key for key in journal_keys if not key.endswith(TASK)}
    is_for_others = bool(keys) and not _has_answer(config, images, journal, keys)
    journal.close()
    if is_for_others:
        print(
            f"collect: the {len(keys)} answers on record are for other settings (address,"
            " classes, model, score_min or renderings) and do not count: every image"
            " is asked",
            flush=True,
        )


def recorded_keys(
    config: PipelineConfig, image_id: str, uri: str, journal: Journal
) -> list[str]:
    """Return the keys of the journal's answers about an image with these settings, one
    at most for each cloud and rendering.
    """
    clients = _offline_clients(config, journal)
    unchanged = [
        client.key_of_unchanged_file(image_id)
        for client in clients
        if client.rendering[1] == PLAIN_RENDERING
    ]
    rendered = _rendered_keys(uri, clients, config.intensity_range)
    keys = dict.fromkeys([*unchanged, *rendered])
    answered = set(journal.keys())
    return [key for key in keys if key in answered]


def _has_answer(
    config: PipelineConfig, images: pa.Table, journal: Any, keys: set[str]
) -> bool:
    """Return whether one of the keys belongs to one of the images. Only the first are
    rendered, since they are asked about first.
    """
    clients = _offline_clients(config, journal)
    for client in clients:
        if client.rendering[1] == PLAIN_RENDERING and any(
            client.key_of_unchanged_file(image_id.as_py()) in keys
            for image_id in images["image_id"]
        ):
            return True
    first_uris = images["uri"].slice(0, SAMPLED_IMAGES).to_pylist()
    return any(
        not keys.isdisjoint(_rendered_keys(uri, clients, config.intensity_range))
        for uri in first_uris
    )


def _offline_clients(config: PipelineConfig, journal: Any) -> list[CloudClient]:
    """Return clients that are used for their journal keys only: one for each question
    to each cloud.
    """
    from coin_ray.cloud.accounts import governor_limits
    from coin_ray.cloud.governor import Governor, LocalGovernor
    from coin_ray.cloud.question_client import question_clients

    clients = []
    for cloud in config.clouds:
        governor = LocalGovernor(Governor(governor_limits(cloud)))
        clients += question_clients(config, cloud, _endpoint(cloud), journal, governor)
    return clients


def _rendered_keys(
    uri: str,
    clients: Sequence[CloudClient],
    intensity_range: tuple[float, float] | None,
    known_digests: SentDigests | None = None,
) -> list[str]:
    """Return the journal key of an image for each cloud; none if it can not be read.
    ``known_digests``: those of images that need not be read, to which others are added.
    """
    from coin_ray.cloud.renderings import render_image
    from coin_ray.errors import InputError
    from coin_ray.runs.sent_digests import encoder_name

    encoder = encoder_name()
    renderings = [
        f"{client.rendering_name} {intensity_range} {encoder}" for client in clients
    ]
    digests = known_digests.find(uri, renderings) if known_digests else None
    if digests is None:
        try:
            file = storage.read_bytes(uri)
            digests = [
                client.sent_digest(
                    render_image(file, *client.rendering, intensity_range)
                )
                for client in clients
            ]
        except (InputError, FileNotFoundError):
            return []
        if known_digests is not None:
            known_digests.add(uri, renderings, digests)
    return [
        client.key_of_unchanged_file(digest)
        for client, digest in zip(clients, digests, strict=True)
    ]


def _endpoint(cloud: Cloud) -> str:
    from coin_ray.cloud.services import adapter_for, endpoint_for

    return endpoint_for(cloud, adapter_for(cloud)) or LOCAL_URL
