"""Settings of the detection APIs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from coin_ray.config.fields import check, check_fraction, new_field, runtime_only

PLAIN_RENDERING = "plain"


RENDERING_OPERATIONS = ("mirrored", "grey", "inverted", "reduced")
"""What may be done to an image before a cloud sees it (``coin_ray.cloud.renderings``).
"""


ServiceName = Literal[
    "http",
    "dino-x",
    "grounding-dino",
    "google-vision",
    "rekognition",
    "azure-vision",
    "hf-endpoint",
    "roboflow",
    "openai-vlm",
    "gemini",
]


@dataclass(frozen=True)
class Cloud:
    """The detection API, how it is reached and what it may cost."""

    service: ServiceName = "http"
    """Whose wire format is spoken; ``http`` is the reference one, for a server of your
    own (docs/cloud.md)."""
    url: str = ""
    """Where the API answers, for example https://detector.example.com. Empty: start the
    local server named by ``serve``."""
    token_env: str | None = runtime_only(None)
    """Name of the environment variable that holds the token. None: the service's usual
    one, as DDS_API_TOKEN (``http``: no token)."""
    serve: Literal["none", "demo", "onnx", "transformers", "checkpoint"] = "none"
    """Start a local server for this run: the demo's stand-in, ONNX detectors
    (``onnx_models``), Grounding DINO or OWLv2 of transformers, or an exported student
    (both: ``model``).
    """
    onnx_models: tuple[str, ...] = ()
    """Paths of ONNX detectors for ``serve onnx``; several are fused by weighted boxes.
    """
    serve_latency: float = runtime_only(0.15)
    """serve demo, onnx: seconds the local server pretends to need for each answer."""
    serve_rate: float = runtime_only(60.0)
    """serve demo, onnx: answers per second after which the local server replies 429."""
    serve_faults: float = runtime_only(0.01)
    """serve demo, onnx: share of calls that the local server fails with 500, 503 or a
    broken body, by a fixed seed."""
    model: str = "default"
    """Model name sent with each call; part of the journal's key. ``default``: the
    service's own default. serve transformers, checkpoint: the model's name on the hub
    or its folder, which must be given.
    """
    region: str = "us-east-1"
    """rekognition: the AWS region."""
    coordinates: Literal["unknown", "xyxy_1000", "yxyx_1000", "xyxy_pixels"] = "unknown"
    """openai-vlm: how the model writes boxes. It differs between models behind one API,
    so it must be said."""
    label_map: str | None = None
    """YAML file from the service's names to the classes, for services with names of
    their own (docs/cloud.md)."""
    score_min: float = 0.05
    """Lowest score asked of the service. Kept low: thresholds are applied later, for
    free."""
    rate: float = runtime_only(50.0)
    """Calls per second over all workers."""
    per_minute: float | None = runtime_only(None)
    """Calls in any minute, over all workers; they are spread over it. None: the
    service's documented limit, if there is one."""
    per_day: int | None = runtime_only(None)
    """Calls in any 24 hours, those of earlier runs too; then the run stops, and the
    same command goes on later."""
    in_flight: int = runtime_only(16)
    """Calls under way at once over all workers."""
    deadline: float = runtime_only(60.0)
    """Seconds in which one image must be answered, retries included."""
    attempts: int = runtime_only(6)
    usd_per_call: float = runtime_only(0.0)
    max_usd: float | None = runtime_only(None)
    max_calls: int | None = runtime_only(None)
    max_error_share: float = runtime_only(0.2)
    """Collection stops when more than this share of at least 50 images failed."""
    max_side: int = 4096
    """Longer side of the image sent, in pixels. Boxes come back in the original's
    frame."""
    views: tuple[str, ...] = new_field((PLAIN_RENDERING,))
    """How each image is shown to the service, one call for each: ``plain``, or of
    mirrored, grey, inverted and reduced those joined by "+", as in inverted+reduced.
    What it says of each is fused as if several clouds had been asked.
    """

    def __post_init__(self) -> None:
        check(
            self.service in get_args(ServiceName),
            f"cloud.service must be one of {', '.join(get_args(ServiceName))}; got"
            f" {self.service!r}",
        )
        check_fraction("cloud.score_min", self.score_min)
        check_fraction("cloud.max_error_share", self.max_error_share)
        check(
            self.rate > 0 and self.in_flight > 0 and self.deadline > 0,
            "cloud.rate, in_flight and deadline must be positive",
        )
        windows = (self.per_minute, self.per_day)
        check(
            all(limit is None or limit > 0 for limit in windows),
            "cloud.per_minute and per_day must be positive, or left out",
        )
        check(
            self.attempts >= 1,
            f"cloud.attempts must be at least 1; got {self.attempts}",
        )
        check(
            not (self.url and self.serve != "none"),
            "give cloud.url or cloud.serve, not both",
        )
        check(
            self.serve != "onnx" or bool(self.onnx_models),
            "cloud.serve onnx needs --cloud.onnx-models PATH [PATH ...]",
        )
        for view in self.views:
            known = view == PLAIN_RENDERING or set(view.split("+")) <= set(
                RENDERING_OPERATIONS
            )
            check(
                known,
                f"cloud.views are {PLAIN_RENDERING}, or {', '.join(RENDERING_OPERATIONS)} joined by +; got"
                f" {view!r}",
            )
        different = {frozenset(view.split("+")) for view in self.views}
        check(
            len(different) == len(self.views) > 0,
            "cloud.views needs at least one, each once; got"
            f" {' '.join(self.views) or 'none'}",
        )
        named = self.serve not in ("transformers", "checkpoint") or self.model not in (
            "",
            "default",
        )
        check(
            named,
            f"cloud.serve {self.serve} needs --cloud.model: the model's folder, or for"
            " transformers its name on the hub",
        )


@dataclass(frozen=True)
class Ensemble:
    """How several clouds (``cloud`` and ``more_clouds``), or views of one, are one;
    with a single one nothing of this counts.
    """

    mode: Literal["fuse", "failover", "cascade"] = "fuse"
    """``fuse`` asks all about each image and fuses their boxes; ``failover`` the first
    that can be reached; ``cascade`` the first, and the others only about images in
    which CLIP contradicts it.
    """
    reliability: tuple[float, ...] = ()
    """Weight of each cloud, the first one's first, or of each of its views. Empty: all
    alike."""
    iou: float = 0.55
    """Boxes of different clouds that overlap at least so much are one."""
    doubt_score_min: float = 0.25
    """cascade: boxes that score lower raise no doubt."""
    doubt_share: float = 0.0
    """cascade: the others are asked when CLIP names more than this share of an image's
    boxes otherwise, "background" included."""

    def __post_init__(self) -> None:
        for name in ("iou", "doubt_score_min", "doubt_share"):
            check_fraction(f"ensemble.{name}", getattr(self, name))
        check(self.iou > 0, "ensemble.iou must be positive")
        check(
            all(0 < r < float("inf") for r in self.reliability),
            "ensemble.reliability must be positive; leave a useless cloud out",
        )


def with_plain_rendering(cloud: Cloud) -> Cloud:
    """The same service with the same limits: what all views of a cloud have in common."""
    return replace(cloud, views=(PLAIN_RENDERING,))


def split_renderings(cloud: Cloud) -> Sequence[Cloud]:
    return (
        [replace(cloud, views=(view,)) for view in cloud.views]
        if len(cloud.views) > 1
        else [cloud]
    )
