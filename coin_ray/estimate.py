"""What a collection would ask and cost, before a cent is spent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from coin_ray import storage
from coin_ray.config import Cloud, DemoScenes, PipelineConfig
from coin_ray.steps import Step


@dataclass(frozen=True)
class Estimate:
    """``answered``: images whose answer the journal or a finished batch already has."""

    images: int
    answered: int
    calls: int
    usd: float
    minutes: float


def estimate(config: PipelineConfig, steps: Mapping[str, Step], root: str) -> Estimate:
    """Counts for the images of the run. If they have not been listed yet, files are counted without opening them."""
    images = _count_images(config, steps["images"], root)
    answered = _answered(config, steps, root)
    calls = max(images - answered, 0)
    cloud = config.cloud
    pace = min(cloud.rate, cloud.in_flight / cloud.serve_latency if cloud.serve != "none" and cloud.serve_latency else cloud.rate)
    return Estimate(images, answered, calls, calls * cloud.usd_per_call, calls / pace / 60)


def print_estimate(cloud: Cloud, figures: Estimate) -> None:
    print(
        f"\n{figures.images} images, {figures.answered} answered already, {figures.calls} calls to make, "
        f"${figures.usd:.2f} at ${cloud.usd_per_call:g} each, {figures.minutes:.1f} minutes at {cloud.rate:g} calls/s"
    )
    if cloud.max_usd is not None and figures.usd > cloud.max_usd:
        print(f"cloud.max_usd = {cloud.max_usd:g} would stop the run after about {int(cloud.max_usd / cloud.usd_per_call)} calls")
    if cloud.max_calls is not None and figures.calls > cloud.max_calls:
        print(f"cloud.max_calls = {cloud.max_calls} would stop the run before the end")


def _count_images(config: PipelineConfig, step: Step, root: str) -> int:
    from coin_ray.stages.images import image_files

    manifest = step.manifest(root)
    if manifest is not None:
        counts = manifest["metrics"]["count"]
        return int(counts["train"] + counts["test"])
    data = config.data
    if isinstance(data, DemoScenes):
        return data.train + data.test
    return sum(len(image_files(storage.absolute(place))) for place in (data.images, data.test) if place)


def _answered(config: PipelineConfig, steps: Mapping[str, Step], root: str) -> int:
    """Images of this run with an answer in the journal (asked with the same classes, model and threshold)."""
    from coin_ray.cloud.client import CloudClient, limits
    from coin_ray.cloud.journal import Journal
    from coin_ray.cloud.limiter import Governor, LocalGovernor
    from coin_ray.data.canonical import canonical_image
    from coin_ray.errors import InputError

    place = storage.join(root, "journal")
    listed = storage.join(steps["images"].folder(root), "images.parquet")
    if not storage.exists(place) or not storage.exists(listed):
        return 0
    journal = Journal.open(place)
    governor = LocalGovernor(Governor(limits(config.cloud)))
    client = CloudClient(config.cloud, config.classes, config.cloud.url or "http://127.0.0.1", journal, governor)
    found = 0
    rows = storage.read_table(listed).select(["uri", "split"]).to_pylist()
    for uri in (row["uri"] for row in rows if row["split"] != "val"):
        try:
            found += journal.get(client.key(canonical_image(storage.read_bytes(uri), config.cloud.max_side))) is not None
        except (InputError, FileNotFoundError):
            continue
    return found
