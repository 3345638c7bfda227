"""``collect.py views PRESET``: ask about a few images in every view before all are paid
for, and see in which the cloud sees most.

The figure that counts is the mean over images of the best score: no label is needed for
it. How well it ranks views is measured in docs/demo.md. Answers are kept in the run's
journal, so a collection in the view that is chosen does not pay for them again.
"""

from __future__ import annotations

import argparse
import asyncio
import io
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from coin_ray import storage
from coin_ray.cloud.client import Answer, CloudClient
from coin_ray.cloud.journal.journal import Journal
from coin_ray.cloud.protocol import RawDetections
from coin_ray.cloud.renderings import image_in_view
from coin_ray.commands.arguments import parse, reported
from coin_ray.config import PLAIN_RENDERING, PipelineConfig
from coin_ray.data.canonical import CanonicalImage, decode_sent
from coin_ray.errors import CloudError, ConfigError, InputError
from coin_ray.runs.estimate import Estimate, pace, print_estimate
from coin_ray.runs.graph import graph
from coin_ray.runs.steps import execute
from coin_ray.serving.launch import start_services
from coin_ray.stages.collecting.cloud_actor import governors_for, journal_uri
from coin_ray.stages.common.progress import Bar, bar
from coin_ray.stages.common.teacher_outputs import image_rows

VIEWS = (PLAIN_RENDERING, "mirrored", "grey", "inverted", "reduced", "inverted+reduced")
SAMPLE = 40
SEEN_FROM = 0.3
"""Score from which a box counts, and is drawn."""
SHOWN = 6
SIDE, GAP = 240, 16
"""Images in the picture, the longer side of each and what is left between them in
pixels."""
COLOUR = (0, 160, 255)


@dataclass(frozen=True)
class Sureness:
    """What the cloud said in one view. ``best_score``: mean over images of the highest
    score, 0 where nothing was seen; ``boxes``: per image from ``SEEN_FROM`` on;
    ``failed``: images without an answer, which count in neither.
    """

    view: str
    best_score: float
    boxes: float
    failed: int


def main(arguments: Sequence[str], script: str = "collect.py views") -> int:
    """Returns the exit code."""
    return reported(lambda: _pilot(arguments, script))


def sureness(view: str, answers: Sequence[RawDetections | None]) -> Sureness:
    """Of one view's answers; None where there was none."""
    best = [raw.class_scores.max(1, initial=0) for raw in answers if raw is not None]
    seen = [scores.max(initial=0) for scores in best]
    boxes = [int((scores >= SEEN_FROM).sum()) for scores in best]
    return Sureness(
        view,
        float(np.mean(seen)) if seen else 0.0,
        float(np.mean(boxes)) if boxes else 0.0,
        len(answers) - len(best),
    )


def _pilot(arguments: Sequence[str], script: str) -> None:
    parser = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, usage=argparse.SUPPRESS
    )
    own = parser.add_argument_group("options of the comparison")
    own.add_argument(
        "--sample",
        type=int,
        default=SAMPLE,
        help=f"images that are asked about in every view (default {SAMPLE})",
    )
    own.add_argument(
        "--in",
        dest="views",
        nargs="+",
        default=list(VIEWS),
        metavar="VIEW",
        help=f"views (default: {' '.join(VIEWS)})",
    )
    known, rest = parser.parse_known_args(list(arguments))
    config, options = parse(rest, script, f"{__doc__}\n\n{parser.format_help()}")
    if known.sample < 1:
        raise ConfigError(f"--sample must be at least 1; got {known.sample}")
    config = replace(
        config, cloud=replace(config.cloud, views=tuple(known.views)), more_clouds=()
    )
    if options.dry_run:
        calls = known.sample * len(known.views)
        cost, rate = calls * config.cloud.usd_per_call, pace(config.cloud)
        print_estimate(
            config.cloud,
            Estimate(
                config.cloud.service,
                known.sample,
                0,
                calls,
                cost,
                calls / rate / 60,
                rate,
                True,
                len(known.views),
            ),
        )
        return
    compare(config, options.root, known.sample)


def compare(config: PipelineConfig, root: str, sample: int) -> None:
    """Ask about ``sample`` training images in ``config.cloud.views``; print how sure
    the cloud is in each, and leave ROOT/views.png.
    """
    step = graph(config)["images"]
    if step.manifest(root) is None:
        execute(step, config, root)
    rows = image_rows(step.folder(root), "train")
    count = min(sample, len(rows))
    uris = [str(rows[n * len(rows) // count]["uri"]) for n in range(count)]
    answers = asyncio.run(_ask(config, uris, root))
    found = [
        sureness(view, column)
        for view, column in zip(
            config.cloud.views, zip(*answers, strict=True), strict=True
        )
    ]
    place = storage.join(root, "views.png")
    seen = [n for n, row in enumerate(answers) if any(raw is not None for raw in row)]
    shown = seen[:: max(1, -(-len(seen) // SHOWN))]
    storage.write_bytes(
        place, picture(config, [uris[n] for n in shown], [answers[n] for n in shown])
    )
    _print(found, count, place)


async def _ask(
    config: PipelineConfig, uris: Sequence[str], root: str
) -> list[list[RawDetections | None]]:
    """The answers in every view [image][view]. What stops a run stops this, when the
    calls under way have ended.
    """
    journal = Journal.open(journal_uri(root))
    with ExitStack() as running, bar("views", len(uris) * len(config.clouds)) as shown:
        urls = await asyncio.to_thread(start_services, config.clouds, root, running)
        clients = [
            CloudClient(cloud, config.classes, url, journal, governor)
            for cloud, url, governor in zip(
                config.clouds, urls, governors_for(config, urls, journal), strict=True
            )
        ]
        asking = _Asking(asyncio.Semaphore(2 * config.cloud.in_flight), shown)
        try:
            await clients[0].check()
            answers = await asyncio.gather(
                *(asking.answer(client, uri) for uri in uris for client in clients)
            )
        finally:
            await asyncio.gather(*(client.aclose() for client in clients))
    if asking.stopped is not None:
        raise asking.stopped
    said = [None if answer is None else answer.raw for answer in answers]
    return [said[n : n + len(clients)] for n in range(0, len(said), len(clients))]


@dataclass
class _Asking:
    """Calls under way end when one stops the run, since they may be paid; no other
    begins. A file that is gone or damaged has no answer.
    """

    places: asyncio.Semaphore
    shown: Bar
    done: int = 0
    stopped: CloudError | None = None

    async def answer(self, client: CloudClient, uri: str) -> Answer | None:
        async with self.places:
            if self.stopped is not None:
                return None
            try:
                answer = await client.answer(
                    await asyncio.to_thread(_read, uri, *client.view)
                )
            except (InputError, FileNotFoundError):
                return None
            except CloudError as error:
                self.stopped = error
                return None
        self.done += 1
        self.shown.update(self.done)
        return answer


def _read(uri: str, max_side: int, view: str) -> CanonicalImage:
    return image_in_view(storage.read_bytes(uri), max_side, view)


def picture(
    config: PipelineConfig,
    uris: Sequence[str],
    answers: Sequence[Sequence[RawDetections | None]],
) -> bytes:
    """A PNG: a row for each image, a column for each view, the image as it is sent and
    the boxes that were seen in it.
    """
    views = config.cloud.views
    step = SIDE + GAP
    sheet = Image.new("RGB", (step * len(views), GAP + step * len(uris)), "white")
    for column, view in enumerate(views):
        ImageDraw.Draw(sheet).text((column * step + 2, 2), view, "black")
    for row, uri in enumerate(uris):
        data = storage.read_bytes(uri)
        for column, view in enumerate(views):
            sheet.paste(
                _drawn(
                    image_in_view(data, SIDE, view),
                    answers[row][column],
                    config.classes,
                ),
                (column * step, GAP + row * step),
            )
    sink = io.BytesIO()
    sheet.save(sink, "PNG")
    return sink.getvalue()


def _drawn(
    image: CanonicalImage, raw: RawDetections | None, classes: Sequence[str]
) -> Image.Image:
    pixels = decode_sent(image)
    draw = ImageDraw.Draw(pixels)
    if raw is None:
        draw.text((4, 4), "no answer", COLOUR)
        return pixels
    shown = image.shown or (image.width, image.height)
    for box, scores in zip(raw.boxes, raw.class_scores, strict=True):
        if scores.max() >= SEEN_FROM:
            x0, y0, x1, y1 = (
                box / np.array(image.original * 2) * np.array(shown * 2)
            ).tolist()
            x0, x1 = (shown[0] - x1, shown[0] - x0) if image.mirrored else (x0, x1)
            draw.rectangle((x0, y0, x1, y1), outline=COLOUR, width=2)
            draw.text(
                (x0 + 3, y0 + 2),
                f"{classes[int(scores.argmax())]} {scores.max():.2f}",
                COLOUR,
            )
    return pixels


def _print(found: Sequence[Sureness], count: int, place: str) -> None:
    table = Table(title=f"{count} images in {len(found)} views, surest first")
    for name in (
        "view",
        "best score of an image",
        f"boxes from {SEEN_FROM} on",
        "no answer",
    ):
        table.add_column(name, justify="left" if name == "view" else "right")
    ranked = sorted(found, key=lambda one: -one.best_score)
    for one in ranked:
        table.add_row(
            one.view, f"{one.best_score:.3f}", f"{one.boxes:.2f}", str(one.failed or "")
        )
    Console().print(table)
    print(f"The images as they were sent, with the boxes: {place}")
    views = dict.fromkeys([PLAIN_RENDERING, *(one.view for one in ranked[:2])])
    print(
        "Surer is not always right: look at the picture. Then, with one call for each"
        f" view: --cloud.views {' '.join(views)}"
    )
