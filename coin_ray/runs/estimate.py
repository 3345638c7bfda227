"""What a collection would ask and cost, before a cent is spent."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from coin_ray import storage
from coin_ray.config import PLAIN_RENDERING, Cloud, DemoScenes, PipelineConfig
from coin_ray.runs.steps import Step
from coin_ray.serving.launch import EMULATED_CLOUDS

if TYPE_CHECKING:
    from coin_ray.cloud.client import CloudClient

MINUTES_SHOWN = 1440


@dataclass(frozen=True)
class Estimate:
    """What one service would be asked, in all its views. ``answered``: calls whose
    answer the journal has; ``at_most``: calls that may not be needed.

    ``rate``: calls per second within the cloud's limits.
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


def estimate(
    config: PipelineConfig, steps: Mapping[str, Step], root: str
) -> list[Estimate]:
    """For each service. If the images of the run have not been listed yet, files are
    counted without opening them.
    """
    from coin_ray.cloud.ensemble import cloud_names

    images = _count_images(config, steps["images"], root)
    on_record = _on_record(config, steps, root)
    mode = config.ensemble.mode if config.more_clouds else "fuse"
    if mode == "failover":
        on_record = [set[str]().union(*on_record)] * len(on_record)
    answers, figures = iter(on_record), list[Estimate]()
    for cloud, name, today in zip(
        config.services,
        cloud_names(config.services),
        _asked_today(config, root),
        strict=True,
    ):
        answered = sum(len(found) for found in islice(answers, len(cloud.views)))
        calls, rate = max(images * len(cloud.views) - answered, 0), pace(cloud)
        minutes = seconds_needed(calls, rate, cloud.per_day, today) / 60
        at_most = bool(figures) and mode != "fuse"
        figures.append(
            Estimate(
                name,
                images,
                answered,
                calls,
                calls * cloud.usd_per_call,
                minutes,
                rate,
                at_most,
                len(cloud.views),
            )
        )
    return figures


def seconds_needed(calls: int, rate: float, per_day: int | None, today: int) -> float:
    """Time for ``calls`` at ``rate`` a second, of which 24 hours allow ``per_day``;
    ``today`` were made in the last 24.
    """
    later = 0 if per_day is None else calls - max(per_day - today, 0)
    if per_day is None or later <= 0:
        return calls / rate
    days = math.ceil(later / per_day)
    return max(calls / rate, days * 86_400 + (later - (days - 1) * per_day) / rate)


def print_estimate(cloud: Cloud, figures: Estimate) -> None:
    minutes = (
        f"{figures.minutes:.1f} minutes"
        if figures.minutes < MINUTES_SHOWN
        else f"{figures.minutes / 1440:.1f} days"
    )
    views = f" in {figures.views} views" if figures.views > 1 else ""
    print(
        f"\n{figures.cloud}: {figures.images} images{views}, {figures.answered} answered already, {'at most ' * figures.at_most}"
        f"{figures.calls} calls to make, ${figures.usd:.2f} at ${cloud.usd_per_call:g} each, {minutes} at {figures.rate:g} calls/s"
    )
    if cloud.per_day is not None and figures.calls > cloud.per_day:
        print(
            f"cloud.per_day = {cloud.per_day} will stop the run once a day; the same command goes on"
        )
    if cloud.max_usd is not None and figures.usd > cloud.max_usd:
        print(
            f"cloud.max_usd = {cloud.max_usd:g} would stop the run after about {int(cloud.max_usd / cloud.usd_per_call)} calls"
        )
    if cloud.max_calls is not None and figures.calls > cloud.max_calls:
        print(f"cloud.max_calls = {cloud.max_calls} would stop the run before the end")


def pace(cloud: Cloud) -> float:
    """Calls per second within the limits of a cloud, or of the local server that stands
    for one.
    """
    from coin_ray.cloud.client import governor_limits

    rate = governor_limits(cloud).rate
    return (
        min(rate, cloud.in_flight / cloud.serve_latency)
        if cloud.serve in EMULATED_CLOUDS and cloud.serve_latency
        else rate
    )


def _count_images(config: PipelineConfig, step: Step, root: str) -> int:
    from coin_ray.stages.images import list_image_files

    manifest = step.manifest(root)
    if manifest is not None:
        counts = manifest["metrics"]["count"]
        return int(
            counts["train"] + counts["test"] - manifest["metrics"].get("in_both", 0)
        )
    data = config.data
    if isinstance(data, DemoScenes):
        return data.train + data.test
    files = [
        uri
        for place in (data.images, data.test)
        if place
        for uri in list_image_files(storage.absolute_uri(place))
    ]
    return len(set(files) if data.same_images else files)


def _asked_today(config: PipelineConfig, root: str) -> list[int]:
    """Calls of each service in the last 24 hours."""
    from coin_ray.cloud.client import account_name
    from coin_ray.cloud.journal.opening import open_journal
    from coin_ray.cloud.services import adapter_for

    place = storage.join(root, "journal")
    if not storage.exists(place):
        return [0] * len(config.services)
    journal = open_journal(place)
    accounts = [
        account_name(cloud, url, adapter_for(cloud))
        for cloud, url in zip(config.services, _urls(config.services), strict=True)
    ]
    return [len(journal.call_starts(account, time.time() - 86_400)) for account in accounts]


def _on_record(
    config: PipelineConfig, steps: Mapping[str, Step], root: str
) -> list[set[str]]:
    """For each cloud, the images of this run with an answer in the journal (asked with
    the same classes, model and threshold).
    """
    from coin_ray.cloud.client import CloudClient, governor_limits
    from coin_ray.cloud.governor import Governor, LocalGovernor
    from coin_ray.cloud.journal.keys import TASK
    from coin_ray.cloud.journal.opening import open_journal

    found: list[set[str]] = [set() for _ in config.clouds]
    place = storage.join(root, "journal")
    listed = storage.join(steps["images"].folder(root), "images.parquet")
    if not storage.exists(place) or not storage.exists(listed):
        return found
    journal = open_journal(place)
    clients = [
        CloudClient(
            cloud, config.classes, url, journal, LocalGovernor(Governor(governor_limits(cloud)))
        )
        for cloud, url in zip(config.clouds, _urls(config.clouds), strict=True)
    ]
    rows = [
        row for row in storage.read_table(listed).to_pylist() if row["split"] != "val"
    ]
    answered = set(filter(lambda key: not key.endswith(TASK), journal.keys()))
    waiting = set(answered)
    for row, images, client in (
        (r, f, c) for r in rows for f, c in zip(found, clients, strict=True)
    ):
        if (
            client.view[1] == PLAIN_RENDERING
            and (key := client.key_of_file(row["image_id"])) in answered
        ):
            images.add(row["uri"])
            waiting.discard(key)
    for row in rows:  # what is not sent as it is must be made ready to be known
        if waiting and not all(row["uri"] in images for images in found):
            waiting -= _recognise(row["uri"], clients, found, answered)
    return found


def _recognise(
    uri: str,
    clients: Sequence[CloudClient],
    found: Sequence[set[str]],
    answered: set[str],
) -> set[str]:
    """Adds the image to those ``found`` that each cloud has answered; returns the keys
    of its answers.
    """
    from coin_ray.cloud.renderings import image_in_view
    from coin_ray.errors import InputError

    try:
        data = storage.read_bytes(uri)
        keys = [client.key(image_in_view(data, *client.view)) for client in clients]
    except (InputError, FileNotFoundError):
        return set()
    for images, key in zip(found, keys, strict=True):
        if key in answered:
            images.add(uri)
    return answered.intersection(keys)


def _urls(clouds: Sequence[Cloud]) -> list[str]:
    from coin_ray.cloud.services import adapter_for, endpoint_for

    return [
        endpoint_for(cloud, adapter_for(cloud)) or "http://127.0.0.1"
        for cloud in clouds
    ]
