"""What an adaptation of 10^4 to 10^8 images takes, on paper: ``python -m
coin_ray.commands.capacity --images 1e6 --rate 20 --gpus 1``.

Calls, cost, hours, storage and memory by stage, and what breaks first. Constants
measured on two CPU cores are marked so; what is scaled from them by floating-point
operations (another network, another size, a GPU) is extrapolated. docs/scale.md.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import tyro
from rich.console import Console
from rich.table import Table

from coin_ray import storage
from coin_ray.cloud.client import governor_limits
from coin_ray.config import Detector, PipelineConfig, TrainingConfig
from coin_ray.config.presets import PRESETS
from coin_ray.errors import ConfigError
from coin_ray.runs.estimate import seconds_needed

GIB = float(2**30)
HOUR = 3600.0

ASK_SECONDS = 0.005
"""CPU of the cloud actor per image, without decoding. Measured."""
CHECK_SECONDS_PER_MEGAPIXEL = 0.003
"""CPU to check a JPEG that is sent as it is. Measured on a 1200 x 900 JPEG."""
DECODE_SECONDS_PER_MEGAPIXEL = 0.0105
"""CPU to decode a JPEG. Measured on a 1200 x 900 JPEG."""
LABEL_SECONDS, LABEL_FLOPS = 0.018, 0.79e9
"""One core, the tiny CLIP, 192 px, 22 boxes. Seconds measured, operations counted."""
PROPAGATE_SECONDS, DISTILL_SECONDS, STEP_FLOPS = 0.25, 0.33, 18.0e9
"""One core, 8 images of 192 px, one view, 16 RoIs. Seconds measured, operations
counted, backward as twice forward."""
READERS = 4
"""Threads that load the images of a step (``coin_ray.data.examples.READ_THREADS``)."""
IMAGE_THREADS = 4
"""Threads with which the driver looks at every image file, once."""
EXAMPLE_BYTES = 44
"""One training image in memory of a training process: the numbers of its rows in four
tables, and the order of two epochs. Counted."""
IMAGE_ROW_BYTES = 1330
"""One image in the driver while files are listed and looked at: their names, ids and
splits. Measured."""
MERGE_BYTES = 970
"""One image in the driver while the parts of collect are merged: ids, states, costs and
places. Measured."""
PREDICT_BYTES = 700
"""One image in the driver while separate predicts and separates. Measured."""
DRIVER_BYTES, DRIVER_ROWS = 200 * 2**20, 4 * 4096
"""What the driver needs of memory whatever the number of images: for groups of rows on
their way to a file, and four copies of a block
(``coin_ray.stages.collecting.parts.BLOCK_ROWS``). Measured with 22 x 8 boxes x classes.
"""
INDEX_BYTES = {"disk": 330, "object": 490 + 160}
"""One answer in an open journal's memory: its place and, on an object store, what it
cost. Measured."""
ATTEMPT_BYTES = 190
"""One attempt in a journal on disk. Measured; on an object store it is an empty object.
"""
OBJECT_SECONDS = 0.04
"""To read one small object. Assumed."""
FILE_SECONDS = 0.0005
"""To read one small file. Assumed."""
MERGE_SECONDS = 0.00022
"""CPU to read the row of an image from its part, to put it in order and to write it.
Measured."""
KEYS_PER_SECOND = 5000.0
"""Names of objects that a listing gives. Assumed."""
USD_PER_WRITE = 0.005 / 1000
"""Price of writing an object on S3, standard class. Vendor's list price, not kept up to
date."""
MEMORY_SHARE = 0.8
"""Share of a machine's memory that tables may take."""

Store = Literal["object", "disk"]


@dataclass(frozen=True)
class Tower:
    """Operations of a visual tower: up to stride 16 by input pixel, and its last stage
    by cell of a RoI's map.
    """

    shared_per_pixel: float
    regional_per_cell: float
    pooling: float
    """Of a crop's attention pool."""
    channels: int
    """Of the shared features."""


TOWERS = {
    "coin_tiny": Tower(11_466, 1.03e6, 18.8e6, 384),
    "RN50": Tower(167_856, 11.8e6, 1.49e9, 1024),
}
"""Counted with ``torch.utils.flop_counter``; a multiplication with its addition is two
operations."""
CLIP_SIDE = {"coin_tiny": 4, "RN50": 14}
"""Side of the map of a RoI, or a crop, in CLIP's own labels."""
CUT_SECONDS = 0.0001
"""CPU to cut a box out and to stretch it. Measured."""


@dataclass(frozen=True)
class Question:
    """What is to be adapted, with which limits, on which machines."""

    images: float = 1e6
    """Images that the cloud is asked about."""
    views: int = 1
    """Calls for each image (cloud.views)."""
    preset: Literal["demo", "folder"] = "folder"
    """Where steps, batch and networks come from."""
    rate: float = 20.0
    """Calls per second that the service allows (cloud.rate)."""
    in_flight: int = 64
    """Calls under way at once (cloud.in-flight)."""
    latency: float = 0.5
    """Seconds until the service answers."""
    per_day: int | None = None
    """Calls in 24 hours that the service allows (cloud.per-day)."""
    usd_per_call: float = 0.002
    image_mb: float = 0.3
    """Megabytes (10^6) of an image file."""
    megapixels: float = 1.0
    boxes: int = 22
    """Boxes per image in the cloud's answer."""
    classes: int = 8
    gpus: int = 1
    """GPUs for training, one per worker; one of them labels, all of them predict. 0:
    everything on CPUs."""
    gpu_tflops: float = 10.0
    """10^12 operations a second that a GPU sustains here. Assumed: no GPU has run this
    yet."""
    usd_per_gpu_hour: float = 1.0
    cpus: int = 8
    """CPUs of the labelers without a GPU, one labeler each; also those of one machine
    that trains without one."""
    head_gib: float = 16.0
    """Memory of the machine on which the job's own process runs."""
    node_gib: float = 32.0
    """Memory of a machine that works."""
    store: Store = "object"
    """Where the root of the run lies."""
    patience_days: float = 7.0
    """A step that takes longer counts as broken."""

    def __post_init__(self) -> None:
        positive = (
            "images",
            "views",
            "rate",
            "in_flight",
            "latency",
            "megapixels",
            "classes",
            "gpu_tflops",
            "cpus",
            "head_gib",
            "node_gib",
        )
        for name in (*positive, "patience_days"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be positive; got {getattr(self, name)}")
        for name in ("usd_per_call", "image_mb", "boxes", "gpus", "usd_per_gpu_hour"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(
                    f"{name} must not be negative; got {getattr(self, name)}"
                )
        if self.per_day is not None and self.per_day < 1:
            raise ConfigError(
                f"per_day must be at least 1, or left out; got {self.per_day}"
            )

    @property
    def calls(self) -> float:
        return self.images * self.views

    @property
    def config(self) -> PipelineConfig:
        """The preset with this service's limits."""
        preset = PRESETS[self.preset]()
        cloud = replace(
            preset.cloud,
            rate=self.rate,
            in_flight=self.in_flight,
            per_day=self.per_day,
            usd_per_call=self.usd_per_call,
        )
        return replace(preset, cloud=cloud)


@dataclass(frozen=True)
class Stage:
    """One step: wall-clock hours, what limits it, GPU hours, and memory in GiB of the
    process that needs most.
    """

    name: str
    hours: float
    limit: str
    gpu_hours: float
    gib: float


@dataclass(frozen=True)
class Storage:
    """Bytes (10^9) at rest, objects, and what writing them costs."""

    images_gb: float
    journal_gb: float
    tables_gb: float
    objects: int
    usd_writes: float


@dataclass(frozen=True)
class Wall:
    """From ``images`` on something no longer works as it is; ``knob`` moves the wall."""

    name: str
    images: float
    knob: str


@dataclass(frozen=True)
class Plan:
    """The answer to a question. ``epochs``: how often the student sees each image."""

    images: int
    calls: int
    usd_calls: float
    usd_gpus: float
    hours: float
    gpu_hours: float
    epochs: float
    stages: tuple[Stage, ...]
    storage: Storage
    walls: tuple[Wall, ...]

    @property
    def reached(self) -> tuple[Wall, ...]:
        """Walls in the way of so many images, the nearest first."""
        return tuple(wall for wall in self.walls if wall.images < self.images)


def plan(question: Question) -> Plan:
    """Hours, cost, storage and memory of every step that grows with the images or with
    the training.
    """
    config = question.config
    stages = (
        _images(question),
        _collect(question),
        _propagate(question),
        _separate(question),
        _distill(question),
    )
    gpu_hours = sum(stage.gpu_hours for stage in stages)
    fit = config.distill.fit
    return Plan(
        images=round(question.images),
        calls=round(question.calls),
        usd_calls=question.calls * question.usd_per_call,
        usd_gpus=gpu_hours * question.usd_per_gpu_hour,
        hours=sum(stage.hours for stage in stages),
        gpu_hours=gpu_hours,
        epochs=fit.steps * fit.batch / question.images,
        stages=stages,
        storage=storage_needed(question),
        walls=walls(question),
    )


# -- throughput


def collect_rates(question: Question) -> dict[str, float]:
    """Images per second that each part of a collection lets through; the smallest
    counts.
    """
    asking = ASK_SECONDS + CHECK_SECONDS_PER_MEGAPIXEL * question.megapixels
    rates = {
        "rate": governor_limits(question.config.cloud).rate / question.views,
        "latency": question.in_flight / question.latency / question.views,
        "cloud actor": 1 / asking / question.views,
    }
    if question.config.collect.labeler != "none":
        rates["labelers"] = (1 if question.gpus else question.cpus) / label_seconds(
            question
        )
    return rates


def label_seconds(question: Question, labeler: str = "") -> float:
    """Of one labeler (the preset's unless named) per image: decoding, then CLIP on a
    GPU or one core, once with RoIs or on each crop.
    """
    config = question.config
    tower, side = _tower(config), CLIP_SIDE[_network(config)]
    regional = question.boxes * tower.regional_per_cell * side**2
    decoding = DECODE_SECONDS_PER_MEGAPIXEL * question.megapixels
    if (labeler or config.collect.labeler) == "roi":
        return decoding + _inference_seconds(
            question,
            tower.shared_per_pixel * view_pixels(config.detector) + regional,
            cores=1,
        )
    crops = question.boxes * (tower.shared_per_pixel * (16 * side) ** 2 + tower.pooling)
    return (
        decoding
        + question.boxes * CUT_SECONDS
        + _inference_seconds(question, crops + regional, cores=1)
    )


def predict_seconds(question: Question) -> float:
    """Per image, of one process that predicts."""
    config = question.config
    operations = forward_flops(config, config.detector.proposals_test)
    return DECODE_SECONDS_PER_MEGAPIXEL * question.megapixels + _inference_seconds(
        question, operations, cores=question.cpus
    )


def predictors(question: Question) -> int:
    """Processes that predict: one on each GPU that trains, or one on the machine that
    trains without.
    """
    return workers_of(question, question.config.distill.fit) if question.gpus else 1


def _inference_seconds(question: Question, operations: float, cores: int) -> float:
    if question.gpus:
        return operations / (question.gpu_tflops * 1e12)
    return operations / LABEL_FLOPS * LABEL_SECONDS / cores


def view_pixels(detector: Detector) -> float:
    """Of an image with sides 4 : 3, as the detector sees it."""
    return detector.short_side * min(detector.short_side * 4 / 3, detector.long_side)


def forward_flops(config: PipelineConfig, regions: int) -> float:
    """Operations of the detector on one image with so many RoIs: tower, RPN's 3 x 3
    convolution, last stage.
    """
    tower, detector = _tower(config), config.detector
    pixels = view_pixels(detector)
    rpn = 2 * 9 * tower.channels * detector.rpn_width * pixels / 256
    return (
        tower.shared_per_pixel * pixels
        + rpn
        + regions * tower.regional_per_cell * detector.roi_size**2
    )


def _network(config: PipelineConfig) -> str:
    name = config.clip.model.rsplit("/", 1)[-1].removesuffix(".json")
    if config.detector.backbone != "clip" or name not in TOWERS:
        raise ConfigError(
            f"operations are known of {', '.join(TOWERS)}, not of"
            f" {config.detector.backbone} {name}"
        )
    return name


def _tower(config: PipelineConfig) -> Tower:
    return TOWERS[_network(config)]


def workers_of(question: Question, fit: TrainingConfig) -> int:
    """As many GPUs as a batch can be shared among; one worker without."""
    return max(
        (n for n in range(1, question.gpus + 1) if fit.batch % n == 0), default=1
    )


def step_seconds(
    question: Question, fit: TrainingConfig, operations: float, measured: float
) -> dict[str, float]:
    """Of one training step by what may limit it: computing, or loading images beside it
    with ``READ_THREADS`` threads.
    """
    workers = workers_of(question, fit)
    own_rate = STEP_FLOPS / measured * question.cpus
    computing = operations / (
        workers * question.gpu_tflops * 1e12 if question.gpus else own_rate
    )
    decoding = fit.batch / workers * DECODE_SECONDS_PER_MEGAPIXEL * question.megapixels
    reading = (
        fit.batch
        / workers
        * (OBJECT_SECONDS if question.store == "object" else FILE_SECONDS)
    )
    return {
        "computing": computing,
        "loading": decoding / min(READERS, question.cpus) + reading / READERS,
    }


# -- stages


def _images(question: Question) -> Stage:
    reading = OBJECT_SECONDS if question.store == "object" else FILE_SECONDS
    per_image = (
        reading + DECODE_SECONDS_PER_MEGAPIXEL * question.megapixels
    ) / IMAGE_THREADS
    return Stage(
        "images",
        question.images * per_image / HOUR,
        "reading",
        0.0,
        driver_gib(question, IMAGE_ROW_BYTES),
    )


def _collect(question: Question) -> Stage:
    rates = collect_rates(question)
    slowest = min(rates, key=lambda name: rates[name])
    asking = seconds_needed(
        round(question.calls), rates[slowest] * question.views, question.per_day, 0
    )
    by_day = (
        question.per_day is not None
        and asking > question.images / rates[slowest] * 1.001
    )
    hours = (asking + compile_seconds(question)) / HOUR
    gpu_hours = (
        hours if question.gpus and question.config.collect.labeler != "none" else 0.0
    )
    return Stage(
        "collect",
        hours,
        "calls per day" if by_day else slowest,
        gpu_hours,
        driver_gib(question, MERGE_BYTES),
    )


def compile_seconds(question: Question) -> float:
    """To list the journal twice, and to merge the parts into one table."""
    listing = (
        2 * 2 * question.calls / KEYS_PER_SECOND if question.store == "object" else 0.0
    )
    return listing + question.images * merge_seconds(question)


def merge_seconds(question: Question) -> float:
    """For each image: its part is read twice, several parts at once, and its row put in
    order.
    """
    part = (
        2 * OBJECT_SECONDS / storage.READ_THREADS if question.store == "object" else 0.0
    )
    return MERGE_SECONDS + part / question.config.collect.batch


def _propagate(question: Question) -> Stage:
    config = question.config
    views = 2 if config.propagate.views == "both" else 1
    operations = (
        3
        * config.propagate.fit.batch
        * views
        * forward_flops(config, config.detector.roi_batch)
    )
    parts = step_seconds(question, config.propagate.fit, operations, PROPAGATE_SECONDS)
    return _training("propagate", question, config.propagate.fit, [(1.0, parts)])


def _distill(question: Question) -> Stage:
    """The teacher looks at the images too from the burn-up on."""
    config, fit = question.config, question.config.distill.fit
    student = 3 * fit.batch * forward_flops(config, config.detector.roi_batch)
    teacher = fit.batch * forward_flops(config, config.detector.proposals_test)
    alone = min(config.distill.burn_up / fit.steps, 1.0)
    before = step_seconds(question, fit, student, DISTILL_SECONDS)
    after = step_seconds(question, fit, student + teacher, DISTILL_SECONDS)
    return _training("distill", question, fit, [(alone, before), (1 - alone, after)])


def _training(
    name: str,
    question: Question,
    fit: TrainingConfig,
    phases: Sequence[tuple[float, dict[str, float]]],
) -> Stage:
    """``phases``: share of the steps, and seconds of one by what may limit it; loading
    goes on beside computing.
    """
    seconds = sum(share * max(parts.values()) for share, parts in phases) * fit.steps
    last = phases[-1][1]
    limit = max(("computing", "loading"), key=lambda part: last[part])
    gpus = workers_of(question, fit) if question.gpus else 0
    return Stage(
        name,
        seconds / HOUR,
        limit,
        seconds / HOUR * gpus,
        driver_gib(question, EXAMPLE_BYTES),
    )


def _separate(question: Question) -> Stage:
    hours, several = (
        question.images * predict_seconds(question) / HOUR,
        predictors(question),
    )
    limit = f"{several} GPUs predict" if several > 1 else "one process predicts"
    return Stage(
        "separate",
        hours / several,
        limit,
        hours if question.gpus else 0.0,
        driver_gib(question, PREDICT_BYTES),
    )


# -- memory and storage


def arrow_bytes(question: Question) -> float:
    """One image's answer with CLIP's opinion in an Arrow table, or without compression
    in Parquet.

    Measured: 1.4, 3.0, 16 kB for 10 x 8, 22 x 8, 22 x 80 boxes x classes.
    """
    return 200 + question.boxes * (36 + 4.0 * (2 * question.classes + 7))


def driver_gib(question: Question, per_image: float) -> float:
    """Of the driver in a step that holds so much for each image."""
    return (constant_bytes(question) + question.images * per_image) / GIB


def constant_bytes(question: Question) -> float:
    """Of the driver, whatever the number of images."""
    return DRIVER_BYTES + DRIVER_ROWS * arrow_bytes(question)


DRIVER_HOLDS = {
    "images": IMAGE_ROW_BYTES,
    "collect": MERGE_BYTES,
    "separate": PREDICT_BYTES,
    "distill": EXAMPLE_BYTES,
}
"""What each step needs of the driver's memory, in bytes per image."""


def answer_bytes(question: Question) -> float:
    """One answer with each class's scores in the journal, packed. Measured: 1.0, 1.8,
    10.5 kB for numbers without any pattern.
    """
    return 380 + question.boxes * (20 + 5.5 * question.classes)


def storage_needed(question: Question) -> Storage:
    """Parts and tables of collect and separate; a journal's attempts are objects of
    their own on an object store.
    """
    n, k = question.images, question.classes
    tables = 5 * 200 + question.boxes * (5 * 36 + 4.0 * (7 * k + 31))
    attempts = ATTEMPT_BYTES if question.store == "disk" else 0
    objects = (
        2 * question.calls + n / question.config.collect.batch
        if question.store == "object"
        else 0.0
    )
    journal = question.calls * (answer_bytes(question) + attempts) / 1e9
    return Storage(
        n * question.image_mb / 1e3,
        journal,
        n * tables / 1e9,
        round(objects),
        objects * USD_PER_WRITE,
    )


# -- what breaks


def walls(question: Question) -> tuple[Wall, ...]:
    """What stops working at how many images, the nearest first."""
    fit = question.config.distill.fit
    patience = question.patience_days * 24 * HOUR
    rates = collect_rates(question)
    slowest = min(rates, key=lambda name: rates[name])
    per_second = (
        rates[slowest]
        if question.per_day is None
        else min(rates[slowest], question.per_day / question.views / (24 * HOUR))
    )
    head = max(MEMORY_SHARE * question.head_gib * GIB - constant_bytes(question), 0.0)
    hungriest = max(DRIVER_HOLDS, key=lambda step: DRIVER_HOLDS[step])
    found = [
        Wall(
            "images are paid for and never trained on",
            fit.steps * fit.batch,
            "distill.fit.steps, distill.fit.batch",
        ),
        Wall(
            f"the driver's tables fill its memory, first in {hungriest}",
            head / DRIVER_HOLDS[hungriest],
            "a head with more memory",
        ),
        Wall(
            f"collect takes over {question.patience_days:g} days",
            patience * per_second,
            _collect_knob(question, slowest),
        ),
        Wall(
            f"separate takes over {question.patience_days:g} days",
            patience * predictors(question) / predict_seconds(question),
            (
                "detector.proposals-test, detector.roi-size, more GPUs"
                " (distill.fit.workers)"
                if question.gpus
                else "distill.fit.gpu"
            ),
        ),
        Wall(
            "an hour to merge the parts of collect",
            HOUR / merge_seconds(question),
            "collect.batch",
        ),
        Wall(
            "the journal's index fills a node",
            MEMORY_SHARE
            * question.node_gib
            * GIB
            / INDEX_BYTES[question.store]
            / question.views,
            "several runs, one for each part of the images",
        ),
    ]
    return tuple(sorted(found, key=lambda wall: wall.images))


def _collect_knob(question: Question, slowest: str) -> str:
    if question.per_day is not None and question.per_day / question.views / (
        24 * HOUR
    ) <= min(collect_rates(question).values()):
        return "the service's quota, more-clouds"
    return {
        "rate": "cloud.rate: a higher quota",
        "latency": "cloud.in-flight",
        "cloud actor": (
            "none: one process asks; several runs, one for each part of the images"
        ),
        "labelers": (
            "detector.short-side, a faster GPU"
            if question.gpus
            else "collect.labeler-gpus, more CPUs when it starts"
        ),
    }[slowest]


# -- showing it


SCALE = (1e4, 1e5, 1e6, 1e7, 1e8)


@dataclass(frozen=True)
class Command(Question):
    """A question and how the answer is shown."""

    json: bool = False
    """Print JSON."""
    scale: bool = False
    """For 10^4 to 10^8 images instead of ``--images``."""


def parse(arguments: Sequence[str]) -> Command:
    """The question of a command line. Impossible numbers end the program with what is
    wrong and exit code 2.
    """
    return tyro.cli(
        Command,
        prog="python -m coin_ray.commands.capacity",
        description=__doc__,
        args=list(arguments),
    )


def as_json(found: Plan) -> dict[str, object]:
    """A plan as plain values; ``reached`` names the walls that are in the way."""
    return dataclasses.asdict(found) | {
        "reached": [wall.name for wall in found.reached]
    }


def main(arguments: Sequence[str]) -> int:
    """Print the plan; returns the exit code."""
    command = parse(arguments)
    plans = [
        plan(replace(command, images=n))
        for n in (SCALE if command.scale else (command.images,))
    ]
    if command.json:
        content = [as_json(found) for found in plans]
        print(json.dumps(content if command.scale else content[0], indent=2))
        return 0
    console = Console()
    for table in (
        _overview(plans),
        *([] if command.scale else [_by_stage(plans[0])]),
        _by_wall(plans[-1]),
    ):
        console.print(table)
    return 0


AMOUNTS: dict[str, Callable[[Plan], float]] = {
    "USD for calls": lambda p: p.usd_calls,
    "hours": lambda p: p.hours,
    "GPU hours": lambda p: p.gpu_hours,
    "USD for GPUs": lambda p: p.usd_gpus,
    "epochs": lambda p: p.epochs,
    "GB images": lambda p: p.storage.images_gb,
    "GB journal": lambda p: p.storage.journal_gb,
    "GB tables": lambda p: p.storage.tables_gb,
    "objects": lambda p: p.storage.objects,
    "USD to write them": lambda p: p.storage.usd_writes,
    "GiB of the driver": lambda p: max(stage.gib for stage in p.stages),
}


def _overview(plans: Sequence[Plan]) -> Table:
    table = Table(
        "images",
        *(f"{p.images:,}" if p.images < 1e7 else f"{p.images:.0e}" for p in plans),
        title="what it takes",
    )
    for name, amount in AMOUNTS.items():
        table.add_row(name, *(_number(amount(p)) for p in plans))
    return table


def _by_stage(found: Plan) -> Table:
    table = Table(
        "step", "hours", "limited by", "GPU hours", "GiB of the driver", title="by step"
    )
    for stage in found.stages:
        table.add_row(
            stage.name,
            _number(stage.hours),
            stage.limit,
            _number(stage.gpu_hours),
            _number(stage.gib),
        )
    return table


def _by_wall(found: Plan) -> Table:
    """Walls that are not reached are shown dim."""
    table = Table(
        "from images", "what breaks", "what moves it", title="what breaks first"
    )
    for wall in found.walls:
        table.add_row(
            _number(wall.images),
            wall.name,
            wall.knob,
            style="dim" if wall not in found.reached else None,
        )
    return table


def _number(value: float) -> str:
    return (
        f"{value:.1e}"
        if value >= 1e7
        else f"{value:,.0f}"
        if value >= 100
        else f"{value:.3g}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
