"""Compare renderings: query the cloud about a few images in each rendering, and see in
which it detects with the highest confidence.

The figure that counts is the mean over images of the best score: no label is needed for
it. How well it ranks renderings is measured in docs/demo.md. Answers are kept in the
run's journal, so a collection with the chosen rendering does not pay for them again.
"""

from __future__ import annotations

import asyncio
import io
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from rich.console import Console
from rich.table import Table

from coin_ray import storage
from coin_ray.cloud.answer import Answer
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.protocol import RawDetections
from coin_ray.cloud.question_client import QuestionClient, create_cloud_client
from coin_ray.cloud.renderings import render_image
from coin_ray.config import PLAIN_RENDERING, PipelineConfig
from coin_ray.data.canonical import CanonicalImage, decode_sent
from coin_ray.errors import CloudError, InputError
from coin_ray.runs.graph import build_steps
from coin_ray.runs.lease import hold_root
from coin_ray.runs.runner import open_tracker, run_missing_steps
from coin_ray.runs.steps import with_found_range
from coin_ray.serving.launch import start_services
from coin_ray.stages.collecting.cloud_actor import journal_uri
from coin_ray.stages.collecting.governors import governors_for
from coin_ray.stages.common.image_tables import read_image_rows
from coin_ray.stages.common.progress import ProgressBar, show_progress

RENDERINGS = (
    PLAIN_RENDERING,
    "mirrored",
    "grey",
    "inverted",
    "reduced",
    "inverted+reduced",
)
SAMPLE_SIZE = 40
MIN_SCORE = 0.3
"""Score from which a box counts, and is drawn."""
SHEET_IMAGES = 6
"""Images in the contact sheet."""
SHEET_SIDE, SHEET_GAP = 240, 16
"""Longer side of an image in the contact sheet, and the gap between two, in pixels."""
BOX_COLOUR = (0, 160, 255)
ImageAnswers = list[RawDetections | None]
"""One image's detections in each rendering; None where there was no answer."""


@dataclass(frozen=True)
class RenderingConfidence:
    """The cloud's confidence in one rendering. ``best_score``: mean over images of the
    highest score, 0 where nothing was detected; ``boxes``: per image from ``MIN_SCORE``
    on; ``failed``: images without an answer, which count in neither.
    """

    rendering: str
    best_score: float
    boxes: float
    failed: int


def measure_confidence(
    rendering: str, answers: Sequence[RawDetections | None]
) -> RenderingConfidence:
    """Return the confidence of one rendering's answers; None where there was none."""
    best_scores = [
        answer.class_scores.max(1, initial=0)
        for answer in answers
        if answer is not None
    ]
    image_scores = [scores.max(initial=0) for scores in best_scores]
    box_counts = [int((scores >= MIN_SCORE).sum()) for scores in best_scores]
    return RenderingConfidence(
        rendering,
        float(np.mean(image_scores)) if image_scores else 0.0,
        float(np.mean(box_counts)) if box_counts else 0.0,
        len(answers) - len(best_scores),
    )


def compare_renderings(config: PipelineConfig, root: str, sample_size: int) -> None:
    """Query the cloud about ``sample_size`` training images in ``config.cloud.views``;
    print the confidence in each, and write ROOT/views.png.
    """
    with hold_root(root):
        _compare_renderings(config, root, sample_size)


def _compare_renderings(config: PipelineConfig, root: str, sample_size: int) -> None:
    step = build_steps(config)["images"]
    run_missing_steps([step], config, root, tracker=open_tracker([step], config, root))
    rows = read_image_rows(step.folder(root), "train")
    config = with_found_range(config, step.folder(root))
    count = min(sample_size, len(rows))
    uris = [str(rows[n * len(rows) // count]["uri"]) for n in range(count)]
    answers = [
        [None if answer is None else answer.raw for answer in image_answers]
        for image_answers in asyncio.run(query_clouds(config, uris, root))
    ]
    by_rendering = zip(*answers, strict=True)
    confidences = [
        measure_confidence(rendering, rendering_answers)
        for rendering, rendering_answers in zip(
            config.cloud.views, by_rendering, strict=True
        )
    ]
    sheet_uri = storage.join(root, "views.png")
    storage.write_bytes(sheet_uri, _draw_sample(config, uris, answers))
    _print_confidences(confidences, count, sheet_uri)


async def query_clouds(
    config: PipelineConfig, uris: Sequence[str], root: str
) -> list[list[Answer | None]]:
    """Return the answers [image][cloud] of ``config.clouds``, None for files that can't
    be used. An error that stops a run stops this, after the calls in flight have ended.
    """
    journal = open_journal(journal_uri(root))
    call_count = len(uris) * len(config.clouds)
    with ExitStack() as running, show_progress("views", call_count) as progress:
        urls = await asyncio.to_thread(start_services, config.clouds, root, running)
        governors = governors_for(config, urls, journal)
        clients = [
            create_cloud_client(config, cloud, url, journal, governor)
            for cloud, url, governor in zip(config.clouds, urls, governors, strict=True)
        ]
        slots = asyncio.Semaphore(2 * config.cloud.in_flight)
        queries = _Queries(slots, progress, config.intensity_range)
        try:
            await clients[0].check()
            answers = await asyncio.gather(
                *(queries.answer(client, uri) for uri in uris for client in clients)
            )
        finally:
            await asyncio.gather(*(client.aclose() for client in clients))
    if queries.stopped_by is not None:
        raise queries.stopped_by
    return [
        list(answers[start : start + len(clients)])
        for start in range(0, len(answers), len(clients))
    ]


@dataclass
class _Queries:
    """Calls in flight end when one stops the run, since they may be paid; no other
    begins. A missing or damaged file has no answer.
    """

    slots: asyncio.Semaphore
    progress: ProgressBar
    intensity_range: tuple[float, float] | None
    answered: int = 0
    stopped_by: CloudError | None = None

    async def answer(
        self, client: CloudClient | QuestionClient, uri: str
    ) -> Answer | None:
        async with self.slots:
            if self.stopped_by is not None:
                return None
            try:
                image = await asyncio.to_thread(
                    _read_rendering, uri, *client.rendering, self.intensity_range
                )
                answer = await client.answer(image)
            except (InputError, FileNotFoundError):
                return None
            except CloudError as error:
                self.stopped_by = error
                return None
        self.answered += 1
        self.progress.update(self.answered)
        return answer


def _read_rendering(
    uri: str,
    max_side: int,
    rendering: str,
    intensity_range: tuple[float, float] | None,
) -> CanonicalImage:
    file = storage.read_bytes(uri)
    return render_image(file, max_side, rendering, intensity_range)


def _draw_sample(
    config: PipelineConfig, uris: Sequence[str], answers: Sequence[ImageAnswers]
) -> bytes:
    """Draw the contact sheet of evenly spaced images that have an answer."""
    drawn = choose_drawn(answers)
    return draw_contact_sheet(
        config, [uris[index] for index in drawn], [answers[index] for index in drawn]
    )


def choose_drawn(answers: Sequence[ImageAnswers]) -> list[int]:
    """Return the indexes of evenly spaced images that have an answer."""
    answered = [
        index
        for index, image_answers in enumerate(answers)
        if any(answer is not None for answer in image_answers)
    ]
    interval = max(1, -(-len(answered) // SHEET_IMAGES))
    return answered[::interval]


def draw_contact_sheet(
    config: PipelineConfig, uris: Sequence[str], answers: Sequence[ImageAnswers]
) -> bytes:
    """Return a PNG: a row for each image, a column for each rendering, the image as it
    is sent and the boxes that were detected in it.
    """
    columns = [(rendering, rendering) for rendering in config.cloud.views]
    return draw_columns(config, uris, answers, columns)


def draw_columns(
    config: PipelineConfig,
    uris: Sequence[str],
    answers: Sequence[ImageAnswers],
    columns: Sequence[tuple[str, str]],
) -> bytes:
    """Return a PNG as ``draw_contact_sheet``. ``columns``: title and rendering of each
    column.
    """
    renderings = [rendering for _, rendering in columns]
    pitch = SHEET_SIDE + SHEET_GAP
    size = (pitch * len(renderings), SHEET_GAP + pitch * len(uris))
    sheet = Image.new("RGB", size, "white")
    title_pen = ImageDraw.Draw(sheet)
    for column, (title, _) in enumerate(columns):
        title_pen.text((column * pitch + 2, 2), title, "black")
    for row, uri in enumerate(uris):
        image_file = storage.read_bytes(uri)
        for column, rendering in enumerate(renderings):
            image = render_image(
                image_file, SHEET_SIDE, rendering, config.intensity_range
            )
            pixels = _draw_detections(image, answers[row][column], config.classes)
            sheet.paste(pixels, (column * pitch, SHEET_GAP + row * pitch))
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()


def _draw_detections(
    image: CanonicalImage, detections: RawDetections | None, classes: Sequence[str]
) -> Image.Image:
    pixels = decode_sent(image)
    pen = ImageDraw.Draw(pixels)
    if detections is None:
        pen.text((4, 4), "no answer", BOX_COLOUR)
        return pixels
    width, height = image.visible_size or (image.width, image.height)
    original = np.array(image.original * 2)
    drawn = np.array((width, height) * 2)
    for box, scores in zip(detections.boxes, detections.class_scores, strict=True):
        if scores.max() < MIN_SCORE:
            continue
        x0, y0, x1, y1 = (box / original * drawn).tolist()
        if image.mirrored:
            x0, x1 = width - x1, width - x0
        pen.rectangle((x0, y0, x1, y1), outline=BOX_COLOUR, width=2)
        label = f"{classes[int(scores.argmax())]} {scores.max():.2f}"
        pen.text((x0 + 3, y0 + 2), label, BOX_COLOUR)
    return pixels


def _print_confidences(
    confidences: Sequence[RenderingConfidence], count: int, sheet_uri: str
) -> None:
    title = f"{count} images in {len(confidences)} renderings, most confident first"
    table = Table(title=title)
    table.add_column("rendering")
    for column in (
        "best score of an image",
        f"boxes from {MIN_SCORE} on",
        "no answer",
    ):
        table.add_column(column, justify="right")
    ranked = sorted(confidences, key=lambda confidence: -confidence.best_score)
    for confidence in ranked:
        table.add_row(
            confidence.rendering,
            f"{confidence.best_score:.3f}",
            f"{confidence.boxes:.2f}",
            str(confidence.failed or ""),
        )
    Console().print(table)
    print(f"The images as they were sent, with the boxes: {sheet_uri}")
    best = [confidence.rendering for confidence in ranked[:2]]
    advised = dict.fromkeys([PLAIN_RENDERING, *best])
    print(
        "Higher confidence is not always right: look at the picture. Then, with one"
        f" call for each rendering: --cloud.views {' '.join(advised)}"
    )
