"""Estimate what an adaptation of 10^4 to 10^8 images takes: calls, cost, hours, storage
and memory by stage, and which limit is met first.

Constants measured on two CPU cores are marked so; what is scaled from them by
floating-point operations (another network, another size, a GPU) is extrapolated.
docs/scale.md compares the estimates with runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from coin_ray import storage
from coin_ray.cloud.accounts import governor_limits
from coin_ray.config import Detector, Distill, PipelineConfig, TrainingConfig
from coin_ray.config.fields import require
from coin_ray.config.presets import PRESETS
from coin_ray.config.students import is_region_student
from coin_ray.errors import ConfigError
from coin_ray.runs.estimate import seconds_needed

GIB = float(2**30)
HOUR = 3600.0

QUERY_SECONDS = 0.001
"""CPU of a cloud actor per image, whatever its size. Measured."""
SEND_SECONDS_PER_MEGAPIXEL = 0.0014
"""CPU to hash, encode and send a JPEG that is sent as it is. Measured on a 1200 x 900
JPEG."""
DECODE_SECONDS_PER_MEGAPIXEL = 0.0105
"""CPU to decode a JPEG. Measured on a 1200 x 900 JPEG."""
LABEL_SECONDS, LABEL_FLOPS = 0.018, 0.79e9
"""One core, the tiny CLIP, 192 px, 22 boxes. Seconds measured, operations counted."""
YOLOX_FLOPS = {
    "yolox-nano": (416, 1.08e9),
    "yolox-tiny": (416, 6.45e9),
    "yolox-s": (640, 26.8e9),
    "yolox-m": (640, 73.8e9),
    "yolox-l": (640, 155.6e9),
    "yolox-x": (640, 281.9e9),
}
"""Side of the square input and operations for it, as published with the models."""
PROPAGATE_SECONDS, DISTILL_SECONDS, STEP_FLOPS = 0.25, 0.33, 18.0e9
"""One core, 8 images of 192 px, one view, 16 RoIs. Seconds measured, operations
counted, backward as twice forward."""
READ_THREADS = 4
"""Threads that load the images of a step (``coin_ray.data.examples.READ_THREADS``)."""
IMAGE_THREADS = 4
"""Threads with which the driver reads every image file, once."""
EXAMPLE_BYTES = 44
"""One training image in memory of a training process: the numbers of its rows in four
tables, and the order of two epochs. Counted."""
IMAGE_ROW_BYTES = 1330
"""One image in the driver while files are listed and read: their names, ids and
splits. Measured."""
MERGE_BYTES = 970
"""One image in the driver while the parts of collect are merged: ids, states, costs and
locations. Measured."""
PREDICT_BYTES = 700
"""One image in the driver while separate predicts and separates. Measured."""
DRIVER_BYTES, DRIVER_ROWS = 200 * 2**20, 4 * 4096
"""Memory of the driver whatever the number of images: groups of rows on
their way to a file, and four copies of a block
(``coin_ray.stages.collecting.parts.MERGE_BLOCK_ROWS``). Measured with 22 x 8 boxes x classes.
"""
INDEX_BYTES = {"disk": 330, "object": 490 + 160}
"""One answer in an open journal's memory: its location and, on an object store, its
cost. Measured."""
ATTEMPT_BYTES = 190
"""One attempt in a journal on disk. Measured; on an object store it is an empty object.
"""
OBJECT_SECONDS = 0.04
"""Time to read one small object. Assumed."""
FILE_SECONDS = 0.0005
"""Time to read one small file. Assumed."""
MERGE_SECONDS = 0.00022
"""CPU to read the row of an image from its part, to put it in order and to write it.
Measured."""
KEYS_PER_SECOND = 5000.0
"""Names of objects in a second of a listing. Assumed."""
USD_PER_WRITE = 0.005 / 1000
"""Price of writing an object on S3, standard class. Vendor's list price, not kept up to
date."""
MEMORY_SHARE = 0.8
"""Share of a machine's memory that tables may take."""

Store = Literal["object", "disk"]


@dataclass(frozen=True)
class TowerOperations:
    """Operations of a visual tower: up to stride 16 by input pixel, and its last stage
    by cell of a RoI's map.
    """

    shared_per_pixel: float
    regional_per_cell: float
    pooling: float
    """Operations of a crop's attention pool."""
    channels: int
    """Channels of the shared features."""


TOWERS = {
    "coin_tiny": TowerOperations(11_466, 1.03e6, 18.8e6, 384),
    "RN50": TowerOperations(167_856, 11.8e6, 1.49e9, 1024),
}
"""Counted with ``torch.utils.flop_counter``; a multiplication with its addition is two
operations."""
CLIP_SIDE = {"coin_tiny": 4, "RN50": 14}
"""Side of the map of a RoI, or a crop, in CLIP's own labels."""
CUT_SECONDS = 0.0001
"""CPU to cut a box out and to stretch it. Measured."""


@dataclass(frozen=True)
class CapacityInputs:
    """What is to be adapted, with which limits, on which machines."""

    images: float = 1e6
    """Images sent to the cloud."""
    views: int = 1
    """Calls for each image (cloud.views)."""
    preset: Literal["demo", "folder"] = "folder"
    """Where steps, batch and networks come from."""
    rate: float = 20.0
    """Calls per second that the service allows (cloud.rate)."""
    in_flight: int = 64
    """Calls in flight at once (cloud.in-flight)."""
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
    actors: int = 1
    """Processes that ask the cloud (collect.actors), each on a core of its own."""
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
            "actors",
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
class StageCapacity:
    """One step: wall-clock hours, what limits it, GPU hours, and memory in GiB of the
    process that needs most.
    """

    name: str
    hours: float
    limit: str
    gpu_hours: float
    gib: float


@dataclass(frozen=True)
class StorageCapacity:
    """Bytes (10^9) at rest, objects, and what writing them costs."""

    images_gb: float
    journal_gb: float
    tables_gb: float
    objects: int
    usd_writes: float


@dataclass(frozen=True)
class ScalingLimit:
    """Above this number of ``images`` something no longer works as it is;
    ``mitigation`` raises the limit.
    """

    name: str
    images: float
    mitigation: str


@dataclass(frozen=True)
class CapacityPlan:
    """What an adaptation takes. ``epochs``: how often the student sees each image."""

    images: int
    calls: int
    usd_calls: float
    usd_gpus: float
    hours: float
    gpu_hours: float
    epochs: float
    stages: tuple[StageCapacity, ...]
    storage: StorageCapacity
    limits: tuple[ScalingLimit, ...]

    @property
    def exceeded_limits(self) -> tuple[ScalingLimit, ...]:
        """Limits below so many images, the lowest first."""
        return tuple(limit for limit in self.limits if limit.images < self.images)


def plan_capacity(inputs: CapacityInputs) -> CapacityPlan:
    """Estimate hours, cost, storage and memory of every step that grows with the images
    or with the training.
    """
    training = inputs.config.distill.fit
    stages = (
        _plan_images(inputs),
        _plan_collect(inputs),
        _plan_propagate(inputs),
        _plan_separate(inputs),
        _plan_distill(inputs),
    )
    gpu_hours = sum(stage.gpu_hours for stage in stages)
    return CapacityPlan(
        images=round(inputs.images),
        calls=round(inputs.calls),
        usd_calls=inputs.calls * inputs.usd_per_call,
        usd_gpus=gpu_hours * inputs.usd_per_gpu_hour,
        hours=sum(stage.hours for stage in stages),
        gpu_hours=gpu_hours,
        epochs=training.steps * training.batch / inputs.images,
        stages=stages,
        storage=estimate_storage(inputs),
        limits=find_scaling_limits(inputs),
    )


# -- throughput


def collection_rates(inputs: CapacityInputs) -> dict[str, float]:
    """Return the images per second that each part of a collection lets through; the
    smallest counts.
    """
    cpu_seconds = QUERY_SECONDS + SEND_SECONDS_PER_MEGAPIXEL * inputs.megapixels
    rates = {
        "rate": governor_limits(inputs.config.cloud).rate / inputs.views,
        "latency": inputs.in_flight / inputs.latency / inputs.views,
        "cloud actors": inputs.actors / cpu_seconds / inputs.views,
    }
    if inputs.config.collect.labeler != "none":
        labelers = 1 if inputs.gpus else inputs.cpus
        rates["labelers"] = labelers / label_seconds(inputs)
    return rates


def label_seconds(inputs: CapacityInputs, labeler: str = "") -> float:
    """Return the seconds per image of one labeler (the preset's unless named):
    decoding, then CLIP on a GPU or one core, once with RoIs or on each crop.
    """
    config = inputs.config
    tower, side = _tower(config), CLIP_SIDE[_network(config)]
    roi_flops = inputs.boxes * tower.regional_per_cell * side**2
    decoding = DECODE_SECONDS_PER_MEGAPIXEL * inputs.megapixels
    if (labeler or config.collect.labeler) == "roi":
        flops = tower.shared_per_pixel * detector_pixels(config.detector) + roi_flops
        return decoding + _inference_seconds(inputs, flops, cores=1)
    crop_flops = tower.shared_per_pixel * (16 * side) ** 2 + tower.pooling
    flops = inputs.boxes * crop_flops + roi_flops
    cutting = inputs.boxes * CUT_SECONDS
    return decoding + cutting + _inference_seconds(inputs, flops, cores=1)


def predict_seconds(inputs: CapacityInputs) -> float:
    """Return the seconds per image of one process that predicts."""
    config = inputs.config
    flops = forward_flops(config, config.detector.proposals_test)
    decoding = DECODE_SECONDS_PER_MEGAPIXEL * inputs.megapixels
    return decoding + _inference_seconds(inputs, flops, cores=inputs.cpus)


def count_predictors(inputs: CapacityInputs) -> int:
    """Return the number of processes that predict: one on each GPU that trains, or one
    on the machine that trains without.
    """
    return count_workers(inputs, inputs.config.distill.fit) if inputs.gpus else 1


def _inference_seconds(inputs: CapacityInputs, flops: float, cores: int) -> float:
    if inputs.gpus:
        return flops / (inputs.gpu_tflops * 1e12)
    return flops / LABEL_FLOPS * LABEL_SECONDS / cores


def _read_seconds(inputs: CapacityInputs) -> float:
    """Return the time to read one small file where the root of the run is."""
    return OBJECT_SECONDS if inputs.store == "object" else FILE_SECONDS


def detector_pixels(detector: Detector) -> float:
    """Return the pixels of an image with sides 4 : 3 at the detector's input size."""
    return detector.short_side * min(detector.short_side * 4 / 3, detector.long_side)


def forward_flops(config: PipelineConfig, regions: int) -> float:
    """Return the operations of the detector on one image with so many RoIs: tower,
    RPN's 3 x 3 convolution, last stage.
    """
    tower, detector = _tower(config), config.detector
    pixels = detector_pixels(detector)
    rpn = 2 * 9 * tower.channels * detector.rpn_width * pixels / 256
    roi_flops = regions * tower.regional_per_cell * detector.roi_size**2
    return tower.shared_per_pixel * pixels + rpn + roi_flops


def detector_student_flops(distill: Distill) -> float:
    """Return the operations of a student that was a detector before on one image."""
    name = distill.student
    require(
        name in YOLOX_FLOPS,
        f"operations are known of {', '.join(YOLOX_FLOPS)}, not of {name}",
    )
    side, flops = YOLOX_FLOPS[name]
    return flops * ((distill.student_side or side) / side) ** 2


def _network(config: PipelineConfig) -> str:
    name = config.clip.model.rsplit("/", 1)[-1].removesuffix(".json")
    if config.detector.backbone != "clip" or name not in TOWERS:
        raise ConfigError(
            f"operations are known of {', '.join(TOWERS)}, not of"
            f" {config.detector.backbone} {name}"
        )
    return name


def _tower(config: PipelineConfig) -> TowerOperations:
    return TOWERS[_network(config)]


def count_workers(inputs: CapacityInputs, training: TrainingConfig) -> int:
    """Return the largest number of GPUs that divides the batch; 1 without GPUs."""
    divisors = [n for n in range(1, inputs.gpus + 1) if training.batch % n == 0]
    return max(divisors, default=1)


def step_seconds(
    inputs: CapacityInputs, training: TrainingConfig, flops: float, measured: float
) -> dict[str, float]:
    """Return the seconds of one training step by what may limit it: computing, or
    loading images at the same time with ``READ_THREADS`` threads.
    """
    workers = count_workers(inputs, training)
    if inputs.gpus:
        computing = flops / (workers * inputs.gpu_tflops * 1e12)
    else:
        computing = flops / (STEP_FLOPS / measured * inputs.cpus)
    images = training.batch / workers
    decoding = images * DECODE_SECONDS_PER_MEGAPIXEL * inputs.megapixels
    reading = images * _read_seconds(inputs)
    loading = decoding / min(READ_THREADS, inputs.cpus) + reading / READ_THREADS
    return {"computing": computing, "loading": loading}


# -- stages


def _plan_images(inputs: CapacityInputs) -> StageCapacity:
    decoding = DECODE_SECONDS_PER_MEGAPIXEL * inputs.megapixels
    seconds_per_image = (_read_seconds(inputs) + decoding) / IMAGE_THREADS
    hours = inputs.images * seconds_per_image / HOUR
    gib = driver_gib(inputs, IMAGE_ROW_BYTES)
    return StageCapacity("images", hours, "reading", 0.0, gib)


def _plan_collect(inputs: CapacityInputs) -> StageCapacity:
    rates = collection_rates(inputs)
    slowest = min(rates, key=lambda name: rates[name])
    calls_per_second = rates[slowest] * inputs.views
    query_seconds = seconds_needed(
        round(inputs.calls), calls_per_second, inputs.per_day, 0
    )
    unlimited_seconds = inputs.images / rates[slowest]
    is_limited_by_day = (
        inputs.per_day is not None and query_seconds > unlimited_seconds * 1.001
    )
    hours = (query_seconds + compile_seconds(inputs)) / HOUR
    labels_on_gpu = inputs.gpus and inputs.config.collect.labeler != "none"
    return StageCapacity(
        "collect",
        hours,
        "calls per day" if is_limited_by_day else slowest,
        hours if labels_on_gpu else 0.0,
        driver_gib(inputs, MERGE_BYTES),
    )


def compile_seconds(inputs: CapacityInputs) -> float:
    """Return the time to list the journal twice, and to merge the parts into one table."""
    listing = 0.0
    if inputs.store == "object":
        listing = 2 * 2 * inputs.calls / KEYS_PER_SECOND
    return listing + inputs.images * merge_seconds(inputs)


def merge_seconds(inputs: CapacityInputs) -> float:
    """Return the time per image to read its part twice, several parts at once, and to
    put its row in order.
    """
    reading = 0.0
    if inputs.store == "object":
        reading = 2 * OBJECT_SECONDS / storage.READ_THREADS
    return MERGE_SECONDS + reading / inputs.config.collect.batch


def _plan_propagate(inputs: CapacityInputs) -> StageCapacity:
    config, training = inputs.config, inputs.config.propagate.fit
    augmentations = 2 if config.propagate.views == "both" else 1
    image_flops = forward_flops(config, config.detector.roi_batch)
    flops = 3 * training.batch * augmentations * image_flops
    limits = step_seconds(inputs, training, flops, PROPAGATE_SECONDS)
    return _plan_training("propagate", inputs, training, [(1.0, limits)])


def _plan_distill(inputs: CapacityInputs) -> StageCapacity:
    """Estimate the distillation; after the burn-up the teacher predicts too."""
    config, training = inputs.config, inputs.config.distill.fit
    if not is_region_student(config.distill.student):
        flops = 3 * training.batch * detector_student_flops(config.distill)
        limits = step_seconds(inputs, training, flops, DISTILL_SECONDS)
        return _plan_training("distill", inputs, training, [(1.0, limits)])
    student = 3 * training.batch * forward_flops(config, config.detector.roi_batch)
    teacher = training.batch * forward_flops(config, config.detector.proposals_test)
    burn_up = min(config.distill.burn_up / training.steps, 1.0)
    before = step_seconds(inputs, training, student, DISTILL_SECONDS)
    after = step_seconds(inputs, training, student + teacher, DISTILL_SECONDS)
    phases = [(burn_up, before), (1 - burn_up, after)]
    return _plan_training("distill", inputs, training, phases)


def _plan_training(
    name: str,
    inputs: CapacityInputs,
    training: TrainingConfig,
    phases: Sequence[tuple[float, dict[str, float]]],
) -> StageCapacity:
    """Estimate a training. ``phases``: share of the steps, and seconds of one step by
    what may limit it; images are loaded while the last ones are computed.
    """
    mean_step = sum(share * max(limits.values()) for share, limits in phases)
    hours = mean_step * training.steps / HOUR
    last_limits = phases[-1][1]
    limit = max(("computing", "loading"), key=lambda name: last_limits[name])
    gpus = count_workers(inputs, training) if inputs.gpus else 0
    gib = driver_gib(inputs, EXAMPLE_BYTES)
    return StageCapacity(name, hours, limit, hours * gpus, gib)


def _plan_separate(inputs: CapacityInputs) -> StageCapacity:
    hours = inputs.images * predict_seconds(inputs) / HOUR
    predictors = count_predictors(inputs)
    return StageCapacity(
        "separate",
        hours / predictors,
        f"{predictors} GPUs predict" if predictors > 1 else "one process predicts",
        hours if inputs.gpus else 0.0,
        driver_gib(inputs, PREDICT_BYTES),
    )


# -- memory and storage


def arrow_bytes(inputs: CapacityInputs) -> float:
    """Return the size of one image's answer with CLIP's opinion in an Arrow table, or
    without compression in Parquet.

    Measured: 1.4, 3.0, 16 kB for 10 x 8, 22 x 8, 22 x 80 boxes x classes.
    """
    return 200 + inputs.boxes * (36 + 4.0 * (2 * inputs.classes + 7))


def driver_gib(inputs: CapacityInputs, bytes_per_image: float) -> float:
    """Return the driver's memory in a step that holds so much for each image."""
    return (constant_bytes(inputs) + inputs.images * bytes_per_image) / GIB


def constant_bytes(inputs: CapacityInputs) -> float:
    """Return the driver's memory whatever the number of images."""
    return DRIVER_BYTES + DRIVER_ROWS * arrow_bytes(inputs)


DRIVER_BYTES_PER_IMAGE = {
    "images": IMAGE_ROW_BYTES,
    "collect": MERGE_BYTES,
    "separate": PREDICT_BYTES,
    "distill": EXAMPLE_BYTES,
}
"""Memory of the driver in each step, in bytes per image."""


def answer_bytes(inputs: CapacityInputs) -> float:
    """Return the size of one answer with each class's scores in the journal, packed.

    Measured: 1.0, 1.8, 10.5 kB for numbers without any pattern.
    """
    return 380 + inputs.boxes * (20 + 5.5 * inputs.classes)


def estimate_storage(inputs: CapacityInputs) -> StorageCapacity:
    """Estimate parts and tables of collect and separate, and the journal; its attempts
    are objects of their own on an object store.
    """
    table_bytes = 5 * 200 + inputs.boxes * (5 * 36 + 4.0 * (7 * inputs.classes + 31))
    attempt_bytes, objects = ATTEMPT_BYTES, 0.0
    if inputs.store == "object":
        attempt_bytes = 0
        objects = 2 * inputs.calls + inputs.images / inputs.config.collect.batch
    journal_gb = inputs.calls * (answer_bytes(inputs) + attempt_bytes) / 1e9
    return StorageCapacity(
        inputs.images * inputs.image_mb / 1e3,
        journal_gb,
        inputs.images * table_bytes / 1e9,
        round(objects),
        objects * USD_PER_WRITE,
    )


# -- scaling limits


def find_scaling_limits(inputs: CapacityInputs) -> tuple[ScalingLimit, ...]:
    """Return what stops working above how many images, the lowest first."""
    training = inputs.config.distill.fit
    limits = (
        ScalingLimit(
            "images are paid for and never trained on",
            training.steps * training.batch,
            "distill.fit.steps, distill.fit.batch",
        ),
        _memory_limit(inputs),
        _collect_limit(inputs),
        _separate_limit(inputs),
        ScalingLimit(
            "an hour to merge the parts of collect",
            HOUR / merge_seconds(inputs),
            "collect.batch",
        ),
        _journal_limit(inputs),
    )
    return tuple(sorted(limits, key=lambda limit: limit.images))


def _memory_limit(inputs: CapacityInputs) -> ScalingLimit:
    usable_bytes = MEMORY_SHARE * inputs.head_gib * GIB - constant_bytes(inputs)
    step, bytes_per_image = max(
        DRIVER_BYTES_PER_IMAGE.items(), key=lambda step_bytes: step_bytes[1]
    )
    return ScalingLimit(
        f"the driver's tables fill its memory, first in {step}",
        max(usable_bytes, 0.0) / bytes_per_image,
        "a head with more memory",
    )


def _collect_limit(inputs: CapacityInputs) -> ScalingLimit:
    rates = collection_rates(inputs)
    slowest = min(rates, key=lambda name: rates[name])
    images_per_second, mitigation = rates[slowest], _raise_rate(inputs, slowest)
    if inputs.per_day is not None:
        quota = inputs.per_day / inputs.views / (24 * HOUR)
        if quota <= images_per_second:
            images_per_second = quota
            mitigation = "the service's quota, more-clouds"
    return ScalingLimit(
        f"collect takes over {inputs.patience_days:g} days",
        inputs.patience_days * 24 * HOUR * images_per_second,
        mitigation,
    )


def _raise_rate(inputs: CapacityInputs, slowest: str) -> str:
    """Return what makes the slowest part of a collection faster."""
    if slowest == "rate":
        return "cloud.rate: a higher quota"
    if slowest == "latency":
        return "cloud.in-flight"
    if slowest == "cloud actors":
        return "collect.actors"
    if inputs.gpus:
        return "detector.short-side, a faster GPU"
    return "collect.labeler-gpus, more CPUs when it starts"


def _separate_limit(inputs: CapacityInputs) -> ScalingLimit:
    mitigation = "distill.fit.gpu"
    if inputs.gpus:
        mitigation = (
            "detector.proposals-test, detector.roi-size, more GPUs"
            " (distill.fit.workers)"
        )
    patience = inputs.patience_days * 24 * HOUR
    return ScalingLimit(
        f"separate takes over {inputs.patience_days:g} days",
        patience * count_predictors(inputs) / predict_seconds(inputs),
        mitigation,
    )


def _journal_limit(inputs: CapacityInputs) -> ScalingLimit:
    usable_bytes = MEMORY_SHARE * inputs.node_gib * GIB
    answers = usable_bytes / INDEX_BYTES[inputs.store]
    return ScalingLimit(
        "the journal's index fills a node",
        answers / inputs.views,
        "several runs, one for each part of the images",
    )
