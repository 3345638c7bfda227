"""The services there are: how each is spoken to, where it answers, and what is checked
before a call is paid.

An adapter is imported when it is asked for.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from coin_ray import storage
from coin_ray.cloud.label_map import LabelMap
from coin_ray.cloud.protocol import Adapter, Capabilities
from coin_ray.config import Cloud
from coin_ray.data.canonical import CanonicalImage, canonical_image
from coin_ray.errors import ConfigError, ImageRejected, InputError

SHRINK_MAX = 0.9
SHRINK_MARGIN = 0.95


@dataclass(frozen=True, slots=True)
class Offer:
    """One service. ``token_env``: the variable its own tools read; ``per_minute``: the
    limit its documentation names.
    """

    adapter: Callable[[Cloud], Adapter]
    token_env: str | None = None
    per_minute: float | None = None


def _http(_: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.reference import ReferenceAdapter

    return ReferenceAdapter()


def _dino_x(_: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.dds import DdsAdapter

    return DdsAdapter("dino-x")


def _grounding_dino(_: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.dds import DdsAdapter

    return DdsAdapter("grounding-dino")


def _google_vision(_: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.google_vision import GoogleVisionAdapter

    return GoogleVisionAdapter()


def _rekognition(_: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.rekognition import RekognitionAdapter

    return RekognitionAdapter()


def _azure_vision(_: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.azure_vision import AzureVisionAdapter

    return AzureVisionAdapter()


def _hf_endpoint(_: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.hf_endpoint import HfEndpointAdapter

    return HfEndpointAdapter()


def _roboflow(_: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.roboflow import RoboflowAdapter

    return RoboflowAdapter()


def _openai_vlm(cloud: Cloud) -> Adapter:
    if cloud.coordinates == "unknown":
        raise ConfigError(
            "openai-vlm needs --cloud.coordinates xyxy_1000, yxyx_1000 or xyxy_pixels:"
            " how a model writes boxes differs between models, and a wrong guess gives"
            " wrong boxes without an error"
        )
    from coin_ray.cloud.adapters.openai_vlm import OpenAiVlmAdapter

    return OpenAiVlmAdapter(cloud.coordinates)


def _gemini(_: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.gemini import GeminiAdapter

    return GeminiAdapter()


OFFERS: dict[str, Offer] = {
    "http": Offer(_http),
    "dino-x": Offer(_dino_x, "DDS_API_TOKEN", per_minute=600),
    "grounding-dino": Offer(_grounding_dino, "DDS_API_TOKEN", per_minute=600),
    "google-vision": Offer(_google_vision, "GOOGLE_VISION_API_KEY", per_minute=1800),
    "rekognition": Offer(_rekognition),
    "azure-vision": Offer(_azure_vision, "AZURE_VISION_KEY"),
    "hf-endpoint": Offer(_hf_endpoint, "HF_TOKEN"),
    "roboflow": Offer(_roboflow, "ROBOFLOW_API_KEY"),
    "openai-vlm": Offer(_openai_vlm, "OPENAI_API_KEY"),
    "gemini": Offer(_gemini, "GEMINI_API_KEY"),
}


def adapter_for(cloud: Cloud) -> Adapter:
    """The adapter of ``cloud.service``. Raises ``ConfigError`` for a setting that it
    needs.
    """
    return OFFERS[cloud.service].adapter(cloud)


def endpoint_for(cloud: Cloud, adapter: Adapter) -> str:
    """Where the service answers; empty if a local server is to be started. Raises
    ``ConfigError`` without an address.
    """
    if cloud.serve != "none" and cloud.service != "http":
        raise ConfigError(
            f"the local server (cloud.serve {cloud.serve}) does not speak"
            f" {cloud.service}: give --cloud.serve none, or --cloud.service http"
        )
    url = cloud.url or adapter.capabilities.url
    if not url and cloud.serve == "none":
        raise ConfigError(
            f"{cloud.service} has no address of its own: give --cloud.url https://...,"
            " where yours answers"
        )
    if "{region}" in url and not re.fullmatch(r"[a-z0-9-]+", cloud.region):
        raise ConfigError(
            f"cloud.region must be an AWS region like us-east-1; got {cloud.region!r}"
        )
    return url.replace("{region}", cloud.region)


def models_digest(cloud: Cloud) -> str:
    """Digest [16 hexadecimal digits] of the files that a local server answers from;
    empty where it has none at hand (a name on the hub).
    """
    models = {
        "onnx": cloud.onnx_models,
        "checkpoint": (cloud.model,),
        "transformers": (cloud.model,),
    }.get(cloud.serve, ())
    contents = hashlib.sha256()
    files = [
        file
        for model in models
        if storage.exists(model)
        for file in storage.list_files(model) or [model]
    ]
    for file in files:
        contents.update(storage.digest(file).encode())
    return contents.hexdigest()[:16] if files else ""


def check_clouds(clouds: Sequence[Cloud], classes: Sequence[str]) -> None:
    """Settings that a service needs, before anything is started. Raises
    ``ConfigError``.
    """
    for cloud in clouds:
        adapter = adapter_for(cloud)
        endpoint_for(cloud, adapter)
        check_askable(cloud, classes, adapter.capabilities)


def label_map_for(cloud: Cloud, classes: Sequence[str]) -> LabelMap | None:
    """The map named by ``cloud.label_map``, if any. Raises ``ConfigError`` for a file
    that can't be used.
    """
    if cloud.label_map is None:
        return None
    from coin_ray.cloud.label_map import load_label_map

    return load_label_map(cloud.label_map, classes, cloud.service)


def token_variable(cloud: Cloud) -> str | None:
    """Name of the environment variable with the token."""
    return cloud.token_env or OFFERS[cloud.service].token_env


def calls_per_minute(cloud: Cloud) -> float | None:
    """What the configuration says, or else the service's documentation."""
    return (
        cloud.per_minute
        if cloud.per_minute is not None
        else OFFERS[cloud.service].per_minute
    )


def side_max(cloud: Cloud, capabilities: Capabilities) -> int:
    """Longer side, in pixels, of the images that are sent."""
    return min(cloud.max_side, capabilities.max_side)


def check_askable(
    cloud: Cloud, classes: Sequence[str], capabilities: Capabilities
) -> None:
    """Whether the service can be asked this at all. Raises ``ConfigError``."""
    if capabilities.max_classes is not None and len(classes) > capabilities.max_classes:
        raise ConfigError(
            f"{capabilities.name} can be asked for at most {capabilities.max_classes}"
            f" classes, got {len(classes)}: give fewer --classes"
        )
    if cloud.token_env and capabilities.auth is None:
        raise ConfigError(f"{capabilities.name} takes no token: remove cloud.token_env")
    if cloud.token_env and capabilities.auth is not None and capabilities.auth.sigv4:
        raise ConfigError(
            f"{capabilities.name} is signed with AWS_ACCESS_KEY_ID and"
            " AWS_SECRET_ACCESS_KEY: remove cloud.token_env"
        )


def fitted(
    image: CanonicalImage, capabilities: Capabilities, max_side: int
) -> CanonicalImage:
    """The image as it is sent: at most ``max_side`` pixels long and small enough a
    file. Raises ``ImageRejected`` if that can't be.
    """
    longer = max(image.width, image.height)
    side = min(longer, max_side)
    sent = image if side == longer else _smaller(image, side)
    while (
        len(sent.data) > capabilities.max_bytes
        and min(sent.width, sent.height) >= capabilities.min_side
        and side > 1
    ):
        side = int(
            side
            * min(
                SHRINK_MAX,
                SHRINK_MARGIN * math.sqrt(capabilities.max_bytes / len(sent.data)),
            )
        )
        sent = _smaller(image, side)
    if (
        len(sent.data) > capabilities.max_bytes
        or min(sent.width, sent.height) < capabilities.min_side
    ):
        raise ImageRejected(
            f"the image of {image.original[0]} x {image.original[1]} pixels would be"
            f" sent as {sent.width} x {sent.height}; {capabilities.name} takes at least"
            f" {capabilities.min_side} pixels on each side and at most"
            f" {capabilities.max_bytes} bytes"
        )
    return sent


def _smaller(image: CanonicalImage, side: int) -> CanonicalImage:
    try:
        smaller = canonical_image(image.data, max(side, 1))
    except InputError as error:
        raise ImageRejected(f"the image can't be made smaller: {error}") from None
    shown = image.shown and (
        image.shown[0] * smaller.width / image.width,
        image.shown[1] * smaller.height / image.height,
    )
    return replace(
        smaller,
        original=image.original,
        image_id=image.image_id,
        shown=shown,
        mirrored=image.mirrored,
    )
