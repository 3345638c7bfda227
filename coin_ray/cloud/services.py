"""The supported services: their adapters, addresses and limits, and the checks of
settings before a call is paid.

An adapter is imported when it is first used.
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

BATCH_PRICE_SHARE = 0.5
"""Price of a request by a batch endpoint, as a share of its price alone."""
SHRINK_MAX = 0.9
"""A file that is too large is shrunk at least by this factor."""
SHRINK_MARGIN = 0.95
"""Factor below the side that would just fit if size grew with the area."""


@dataclass(frozen=True, slots=True)
class ServiceSpec:
    """One service. ``token_env``: the variable that its own tools read; ``per_minute``:
    the limit of calls in its documentation.
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


def _roboflow(cloud: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.roboflow import RoboflowAdapter

    return RoboflowAdapter(cloud.secret_in == "body")


def _roboflow_sam3(cloud: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.roboflow_sam3 import RoboflowSam3Adapter

    return RoboflowSam3Adapter(cloud.secret_in == "body")


def _t_rex(cloud: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.t_rex import TRexAdapter
    from coin_ray.cloud.exemplars import read_exemplars

    if not cloud.exemplars:
        raise ConfigError(
            "t-rex is shown the classes: give --cloud.exemplars PATH, people's boxes on"
            " other images (an export of a review, or a labelled folder)"
        )
    return TRexAdapter(read_exemplars(cloud.exemplars))


def _moondream(_: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.moondream import MoondreamAdapter

    return MoondreamAdapter()


def _openai_vlm(cloud: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.model_families import UNKNOWN_FAMILY, find_family
    from coin_ray.cloud.adapters.model_options import ModelOptions
    from coin_ray.cloud.adapters.openai_vlm import OpenAiVlmAdapter

    options = ModelOptions.from_config(cloud)
    family = find_family(cloud.model)
    if cloud.coordinates != "unknown":
        # the image is sent as it is: the setting may be about a server of one's own
        family = replace(UNKNOWN_FAMILY, refused_fields=family.refused_fields)
        return OpenAiVlmAdapter(cloud.coordinates, options, family)
    if family.coordinates is None:
        raise ConfigError(
            f"openai-vlm knows no model like {cloud.model!r}: give"
            " --cloud.coordinates xyxy_1000, yxyx_1000, xyxy_pixels, xyxy_ratio or"
            " xyxy_percent. How a model writes boxes differs between models, and a"
            " wrong guess gives wrong boxes without an error"
        )
    return OpenAiVlmAdapter(family.coordinates, options, family)


def _anthropic(cloud: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.anthropic import AnthropicAdapter
    from coin_ray.cloud.adapters.model_options import ModelOptions

    return AnthropicAdapter(ModelOptions.from_config(cloud))


def _gemini(cloud: Cloud) -> Adapter:
    from coin_ray.cloud.adapters.gemini import GeminiAdapter
    from coin_ray.cloud.adapters.model_options import ModelOptions

    return GeminiAdapter(ModelOptions.from_config(cloud))


SERVICES: dict[str, ServiceSpec] = {
    "http": ServiceSpec(_http),
    "dino-x": ServiceSpec(_dino_x, "DDS_API_TOKEN", per_minute=600),
    "grounding-dino": ServiceSpec(_grounding_dino, "DDS_API_TOKEN", per_minute=600),
    "google-vision": ServiceSpec(
        _google_vision, "GOOGLE_VISION_API_KEY", per_minute=1800
    ),
    "rekognition": ServiceSpec(_rekognition),
    "azure-vision": ServiceSpec(_azure_vision, "AZURE_VISION_KEY"),
    "hf-endpoint": ServiceSpec(_hf_endpoint, "HF_TOKEN"),
    "roboflow": ServiceSpec(_roboflow, "ROBOFLOW_API_KEY"),
    "openai-vlm": ServiceSpec(_openai_vlm, "OPENAI_API_KEY"),
    "gemini": ServiceSpec(_gemini, "GEMINI_API_KEY"),
    "anthropic": ServiceSpec(_anthropic, "ANTHROPIC_API_KEY"),
    "roboflow-sam3": ServiceSpec(_roboflow_sam3, "ROBOFLOW_API_KEY"),
    "t-rex": ServiceSpec(_t_rex, "DDS_API_TOKEN", per_minute=600),
    "moondream": ServiceSpec(_moondream, "MOONDREAM_API_KEY"),
}


def adapter_for(cloud: Cloud) -> Adapter:
    """Return the adapter of ``cloud.service``. Raises ``ConfigError`` if a setting that
    it needs is missing.
    """
    return SERVICES[cloud.service].adapter(cloud)


def endpoint_for(cloud: Cloud, adapter: Adapter) -> str:
    """Return the service's address; empty if a local server is to be started. Raises
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
            f"{cloud.service} has no public address: give --cloud.url https://..., the"
            " address of your own deployment"
        )
    if "{region}" in url and not re.fullmatch(r"[a-z0-9-]+", cloud.region):
        raise ConfigError(
            f"cloud.region must be an AWS region like us-east-1; got {cloud.region!r}"
        )
    return url.replace("{region}", cloud.region)


def models_digest(cloud: Cloud) -> str:
    """Return the digest [16 hexadecimal digits] of the files that a local server
    answers from; empty if none is a local file (a name on the hub).
    """
    models_by_server: dict[str, tuple[str, ...]] = {
        "onnx": cloud.onnx_models,
        "checkpoint": (cloud.model,),
        "transformers": (cloud.model,),
    }
    digest = hashlib.sha256()
    has_files = False
    for model in models_by_server.get(cloud.serve, ()):
        if not storage.exists(model):
            continue
        for file in storage.list_files(model) or [model]:
            digest.update(storage.sha256(file).encode())
            has_files = True
    return digest.hexdigest()[:16] if has_files else ""


def check_clouds(clouds: Sequence[Cloud], classes: Sequence[str]) -> None:
    """Check the settings that each service needs, before anything is started. Raises
    ``ConfigError``.
    """
    for cloud in clouds:
        adapter = adapter_for(cloud)
        endpoint_for(cloud, adapter)
        check_service_settings(cloud, classes, adapter.capabilities)


def label_map_for(cloud: Cloud, classes: Sequence[str]) -> LabelMap | None:
    """Return the map named by ``cloud.label_map``, if any. Raises ``ConfigError`` for a
    file that can't be used.
    """
    if cloud.label_map is None:
        return None
    from coin_ray.cloud.label_map import load_label_map

    return load_label_map(cloud.label_map, classes, cloud.service)


def token_variable(cloud: Cloud) -> str | None:
    """Return the name of the environment variable with the token."""
    return cloud.token_env or SERVICES[cloud.service].token_env


def call_price(cloud: Cloud) -> float:
    """Return the USD that one call counts as: less by a batch endpoint."""
    return cloud.usd_per_call * (BATCH_PRICE_SHARE if cloud.batch else 1)


def calls_per_minute(cloud: Cloud) -> float | None:
    """Return the limit of the configuration, or else of the service's documentation."""
    if cloud.per_minute is not None:
        return cloud.per_minute
    return SERVICES[cloud.service].per_minute


def longest_side(cloud: Cloud, capabilities: Capabilities) -> int:
    """Return the longest side, in pixels, of the images that are sent."""
    return min(cloud.max_side, capabilities.max_side)


def check_service_settings(
    cloud: Cloud, classes: Sequence[str], capabilities: Capabilities
) -> None:
    """Check that the service supports these settings. Raises ``ConfigError``."""
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


def shrink_to_limits(
    image: CanonicalImage, capabilities: Capabilities, max_side: int
) -> CanonicalImage:
    """Return the image as it is sent: at most ``max_side`` pixels long and small enough
    a file. Raises ``ImageRejected`` if it can't be shrunk to that.
    """
    longer = max(image.width, image.height)
    side = min(longer, max_side, _side_of_pixels(image, capabilities.max_pixels))
    sent = image if side == longer else _resize(image, side)
    while (
        len(sent.data) > capabilities.max_bytes
        and min(sent.width, sent.height) >= capabilities.min_side
        and side > 1
    ):
        factor = SHRINK_MARGIN * math.sqrt(capabilities.max_bytes / len(sent.data))
        side = int(side * min(SHRINK_MAX, factor))
        sent = _resize(image, side)
    is_too_large = len(sent.data) > capabilities.max_bytes
    is_too_small = min(sent.width, sent.height) < capabilities.min_side
    if is_too_large or is_too_small:
        raise ImageRejected(
            f"the image of {image.original[0]} x {image.original[1]} pixels would be"
            f" sent as {sent.width} x {sent.height}; {capabilities.name} takes at least"
            f" {capabilities.min_side} pixels on each side and at most"
            f" {capabilities.max_bytes} bytes"
        )
    return sent


def _side_of_pixels(image: CanonicalImage, max_pixels: int | None) -> int:
    """Return the longer side in pixels at which the image has at most ``max_pixels``."""
    longer, pixels = max(image.width, image.height), image.width * image.height
    if max_pixels is None or pixels <= max_pixels:
        return longer
    return math.floor(longer * math.sqrt(max_pixels / pixels))


def _resize(image: CanonicalImage, side: int) -> CanonicalImage:
    try:
        smaller = canonical_image(image.data, max(side, 1))
    except InputError as error:
        raise ImageRejected(f"the image can't be made smaller: {error}") from None
    visible_size = None
    if image.visible_size is not None:
        visible_width, visible_height = image.visible_size
        visible_size = (
            visible_width * smaller.width / image.width,
            visible_height * smaller.height / image.height,
        )
    return replace(
        smaller,
        original=image.original,
        image_id=image.image_id,
        visible_size=visible_size,
        mirrored=image.mirrored,
    )
