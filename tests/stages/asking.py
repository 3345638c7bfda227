"""A program that asks a service about all images of a folder, to be killed on the way:
python -m tests.stages.asking URL IMAGES JOURNAL RUN ACTORS."""

from __future__ import annotations

import sys
from dataclasses import replace

import pyarrow as pa

from coin_ray import storage
from coin_ray.config import Cloud
from coin_ray.config.presets import folder
from tests.cloud_actors import ask_cloud_actors

PRICE = 0.002


def ask(url: str, images: str, journal: str, run: str, actors: str) -> pa.Table:
    """Return the rows of all images in the folder ``images``, asked about by so many
    actors.
    """
    cloud = Cloud(url=url, usd_per_call=PRICE, in_flight=8, rate=1000.0)
    config = replace(folder(), classes=("car", "bus", "dog"), cloud=cloud)
    config = replace(config, collect=replace(config.collect, labeler="none"))
    uris = storage.list_files(images, ".jpg")
    rows = [{"image_id": str(number), "uri": uri} for number, uri in enumerate(uris)]
    return ask_cloud_actors(int(actors), rows, config, [url], journal, run=run)


if __name__ == "__main__":
    ask(*sys.argv[1:])
