"""Settings of the detection APIs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from coin_ray.config.fields import check_fraction, new_field, require, runtime_only

PLAIN_RENDERING = "plain"
RENDERING_OPERATIONS = ("mirrored", "grey", "inverted", "reduced")
"""Operations that render an image for a cloud (``coin_ray.cloud.renderings``)."""

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
    "anthropic",
    "roboflow-sam3",
    "t-rex",
    "moondream",
]

LANGUAGE_MODELS = ("openai-vlm", "gemini", "anthropic")
"""Services that answer with a text."""
MODEL_SETTINGS: dict[str, dict[str, tuple[str, ...]]] = {
    "detail": {
        "openai-vlm": ("low", "high", "original"),
        "gemini": ("low", "medium", "high"),
    },
    "reasoning_effort": {
        "openai-vlm": ("none", "minimal", "low", "medium", "high", "xhigh", "max"),
        "gemini": ("minimal", "low", "medium", "high"),
        "anthropic": ("low", "medium", "high", "xhigh", "max"),
    },
    "label_scores": {
        "openai-vlm": ("logprobs", "agreement"),
        "gemini": ("logprobs", "agreement"),
        "anthropic": ("agreement",),
    },
}
"""Settings of language models, and their values by service."""


@dataclass(frozen=True)
class Cloud:
    """The detection API, how it is reached and what it may cost."""

    service: ServiceName = "http"
    """The wire format; ``http`` is the reference format, for a server of your own
    (docs/cloud-services.md)."""
    url: str = ""
    """Address of the API, for example https://detector.example.com. Empty: start the
    local server named by ``serve``."""
    token_env: str | None = runtime_only(None)
    """Name of the environment variable that holds the token. None: the service's usual
    one, as DDS_API_TOKEN (``http``: no token)."""
    serve: Literal["none", "demo", "onnx", "transformers", "checkpoint"] = "none"
    """Start a local server for this run: the demo's emulated cloud, ONNX detectors
    (``onnx_models``), Grounding DINO or OWLv2 of transformers, or an exported student
    (both: ``model``).
    """
    onnx_models: tuple[str, ...] = ()
    """Paths of ONNX detectors for ``serve onnx``; several are fused by weighted boxes
    fusion."""
    serve_latency: float = runtime_only(0.15)
    """serve demo, onnx: seconds that the local server takes for each response."""
    serve_rate: float = runtime_only(60.0)
    """serve demo, onnx: calls per second above which the local server replies 429."""
    serve_faults: float = runtime_only(0.01)
    """serve demo, onnx: share of calls that the local server fails with 500, 503 or a
    broken body, by a fixed seed."""
    model: str = "default"
    """Model name sent with each call; part of the journal's key. ``default``: the
    service's own default. serve transformers, checkpoint: the model's name on the hub
    or its folder, which must be given.
    """
    secret_in: Literal["header", "body"] = runtime_only("header")
    """roboflow, roboflow-sam3: where the key is sent. Inference servers before 1.5 read
    it from the body alone."""
    exemplars: tuple[str, ...] = new_field(())
    """t-rex: people's boxes on other images, sent with each call to show the classes:
    exports of Label Studio, CVAT or FiftyOne, or labelled folders, as for
    ``corrections``."""
    region: str = "us-east-1"
    """rekognition: the AWS region."""
    coordinates: Literal[
        "unknown",
        "xyxy_1000",
        "yxyx_1000",
        "xyxy_pixels",
        "xyxy_ratio",
        "xyxy_percent",
    ] = "unknown"
    """openai-vlm: how the model writes boxes. Models with the same API differ;
    ``unknown``: by the model's name, which must be in the table of
    docs/cloud-services.md."""
    max_tokens: int | None = runtime_only(None)
    """openai-vlm, gemini, anthropic: tokens that an answer may have. None: the service's
    default, which may be too few for many boxes (anthropic: 8192)."""
    json_schema: bool = runtime_only(True)
    """openai-vlm, gemini, anthropic: send a JSON schema of the answer, unless the
    service refuses it."""
    detail: Literal["default", "low", "medium", "high", "original"] = new_field(
        "default"
    )
    """openai-vlm, gemini: how finely the model reads the image (OpenAI's ``detail``: low,
    high, original; Gemini's media resolution: low, medium, high)."""
    reasoning_effort: Literal[
        "default", "none", "minimal", "low", "medium", "high", "xhigh", "max"
    ] = new_field("default")
    """openai-vlm, gemini, anthropic: how long the model thinks, which is paid for. Models
    accept some of these values."""
    label_scores: Literal["none", "logprobs", "agreement"] = new_field("none")
    """Scores for boxes of language models, which give none. ``logprobs``: openai-vlm,
    gemini: the probabilities of the label's tokens, where the server names them.
    ``agreement``: the share of several renderings or clouds that have the box.
    """
    batch: bool = runtime_only(False)
    """openai-vlm, gemini, anthropic: ask by the service's batch endpoint, at half of
    ``usd_per_call``; answers come within a day. The run waits for them; a run that was
    stopped goes on waiting."""
    batch_on_stop: Literal["keep", "cancel"] = runtime_only("keep")
    """What becomes of jobs under way when the run is stopped with Ctrl-C: the next run
    waits for them, or they are cancelled and answers so far are kept."""
    on_version_change: Literal["warn", "stop"] = runtime_only("warn")
    """What happens when a service's answers name another model or version than those
    before, also of earlier runs in this root."""
    label_map: str | None = None
    """YAML file that maps the service's names to the classes, for services with names
    of their own (docs/label-maps.md)."""
    score_min: float = 0.05
    """Lowest score requested from the service. Kept low: thresholds are applied later,
    without further calls."""
    rate: float = runtime_only(50.0)
    """Calls per second over all workers."""
    per_minute: float | None = runtime_only(None)
    """Calls in any minute, over all workers; they are spread over it. None: the
    service's documented limit, if there is one."""
    per_day: int | None = runtime_only(None)
    """Calls in any 24 hours, those of earlier runs included; then the run stops, and
    the same command continues it later."""
    in_flight: int = runtime_only(16)
    """Concurrent calls over all workers."""
    deadline: float = runtime_only(60.0)
    """Seconds in which one image must be answered, retries included."""
    attempts: int = runtime_only(6)
    """Calls for one image, retries included."""
    usd_per_call: float = runtime_only(0.0)
    max_usd: float | None = runtime_only(None)
    """Cost at which the collection stops; needs ``usd_per_call``."""
    max_calls: int | None = runtime_only(None)
    """Calls at which the collection stops."""
    max_error_share: float = runtime_only(0.2)
    """The collection stops if more than this share of at least 50 images failed."""
    max_side: int = 4096
    """Longer side of the image sent, in pixels. Boxes come back in the original's
    frame."""
    views: tuple[str, ...] = new_field((PLAIN_RENDERING,))
    """Renderings of each image that are sent, one call for each: ``plain``, or some of
    mirrored, grey, inverted and reduced joined by "+", as in inverted+reduced. Their
    detections are fused like those of several clouds.
    """

    def __post_init__(self) -> None:
        services = get_args(ServiceName)
        require(
            self.service in services,
            f"cloud.service must be one of {', '.join(services)}; got {self.service!r}",
        )
        check_fraction("cloud.score_min", self.score_min)
        check_fraction("cloud.max_error_share", self.max_error_share)
        self._check_limits()
        self._check_local_server()
        self._check_renderings()

    def _check_limits(self) -> None:
        require(
            self.rate > 0 and self.in_flight > 0 and self.deadline > 0,
            "cloud.rate, cloud.in_flight and cloud.deadline must be positive",
        )
        for setting in ("per_minute", "per_day"):
            limit = getattr(self, setting)
            require(
                limit is None or limit > 0,
                f"cloud.{setting} must be positive, or left out; got {limit}",
            )
        is_language_model = self.service in LANGUAGE_MODELS
        require(
            self.max_tokens is None or (self.max_tokens > 0 and is_language_model),
            "cloud.max_tokens must be positive, or left out, and only"
            f" {' and '.join(LANGUAGE_MODELS)} have it; got {self.max_tokens} for"
            f" cloud.service {self.service}",
        )
        self._check_language_model()
        self._check_prompts()
        require(
            self.attempts >= 1,
            f"cloud.attempts must be at least 1; got {self.attempts}",
        )

    def _check_prompts(self) -> None:
        require(
            not self.batch or self.service in LANGUAGE_MODELS,
            f"cloud.batch is for {', '.join(LANGUAGE_MODELS)}; {self.service} has no"
            " batch endpoint",
        )
        takes_body = self.service in ("roboflow", "roboflow-sam3")
        require(
            self.secret_in == "header" or takes_body,
            f"cloud.secret_in body is for roboflow and roboflow-sam3; got it for"
            f" cloud.service {self.service}",
        )
        require(
            not self.exemplars or self.service == "t-rex",
            f"cloud.exemplars are for cloud.service t-rex; got"
            f" {' '.join(self.exemplars)} for {self.service}",
        )

    def _check_language_model(self) -> None:
        for setting, services in MODEL_SETTINGS.items():
            default = getattr(type(self), setting)
            chosen = getattr(self, setting)
            allowed = services.get(self.service, ())
            require(
                chosen == default or chosen in allowed,
                f"cloud.{setting} {chosen} is not for cloud.service {self.service};"
                f" expected {default}"
                + (f" or one of {', '.join(allowed)}" if allowed else ""),
            )

    def _check_local_server(self) -> None:
        require(
            not (self.url and self.serve != "none"),
            "give cloud.url or cloud.serve, not both",
        )
        require(
            self.serve != "onnx" or bool(self.onnx_models),
            "cloud.serve onnx needs --cloud.onnx-models PATH [PATH ...]",
        )
        needs_model = self.serve in ("transformers", "checkpoint")
        require(
            not needs_model or self.model not in ("", "default"),
            f"cloud.serve {self.serve} needs --cloud.model: the model's folder, or for"
            " transformers its name on the hub",
        )

    def _check_renderings(self) -> None:
        operations = ", ".join(RENDERING_OPERATIONS)
        for view in self.views:
            is_known = view == PLAIN_RENDERING or all(
                operation in RENDERING_OPERATIONS for operation in view.split("+")
            )
            require(
                is_known,
                f"cloud.views must be {PLAIN_RENDERING}, or some of {operations} joined"
                f" by +; got {view!r}",
            )
        different_views = {frozenset(view.split("+")) for view in self.views}
        require(
            len(different_views) == len(self.views) > 0,
            "cloud.views needs at least one view, and each only once; got"
            f" {' '.join(self.views) or 'none'}",
        )


@dataclass(frozen=True)
class Ensemble:
    """How several clouds (``cloud`` and ``more_clouds``), or views of one, are combined;
    without effect for a single one.
    """

    mode: Literal["fuse", "failover", "cascade"] = "fuse"
    """``fuse``: call all clouds for each image and fuse their boxes. ``failover``: call
    the first that can be reached. ``cascade``: call the first, and the others only for
    images in which CLIP disagrees with it.
    """
    reliability: tuple[float, ...] = ()
    """Weight of each cloud, or of each of its views, in their order. Empty: equal."""
    iou: float = 0.55
    """Boxes of different clouds with at least this IoU are fused into one."""
    doubt_score_min: float = 0.25
    """cascade: boxes with lower scores do not count."""
    doubt_share: float = 0.0
    """cascade: the others are called if CLIP disagrees on the class of more than this
    share of an image's boxes, "background" included."""

    def __post_init__(self) -> None:
        for setting in ("iou", "doubt_score_min", "doubt_share"):
            check_fraction(f"ensemble.{setting}", getattr(self, setting))
        require(self.iou > 0, "ensemble.iou must be positive")
        require(
            all(0 < weight < float("inf") for weight in self.reliability),
            "ensemble.reliability must be positive; leave a useless cloud out",
        )


def with_plain_rendering(cloud: Cloud) -> Cloud:
    """Return the settings that all renderings of a cloud share, with the plain one."""
    return replace(cloud, views=(PLAIN_RENDERING,))


def split_renderings(cloud: Cloud) -> Sequence[Cloud]:
    """Return the cloud once for each of its renderings."""
    if len(cloud.views) == 1:
        return [cloud]
    return [replace(cloud, views=(view,)) for view in cloud.views]
