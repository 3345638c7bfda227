"""A program that asks a service about all images of a folder, to be killed on the way:
asking.py URL IMAGES JOURNAL RUN."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

import pyarrow as pa

from coin_ray import storage
from coin_ray.config import Cloud
from coin_ray.config.presets import folder
from coin_ray.stages.collecting.cloud_actor import CloudActor

PRICE = 0.002


def ask(url: str, images: str, journal: str, run: str) -> pa.Table:
    """Return the rows of all images in the folder ``images``."""
    cloud = Cloud(url=url, usd_per_call=PRICE, in_flight=8, rate=1000.0)
    config = replace(folder(), classes=("car", "bus", "dog"), cloud=cloud)
    config = replace(config, collect=replace(config.collect, labeler="none"))
    uris = storage.list_files(images, ".jpg")
    rows = [{"image_id": str(number), "uri": uri} for number, uri in enumerate(uris)]

    async def answer() -> pa.Table:
        actor = CloudActor(config, [url], journal, run=run)
        return await actor(pa.Table.from_pylist(rows))

    return asyncio.run(answer())


if __name__ == "__main__":
    ask(*sys.argv[1:])
