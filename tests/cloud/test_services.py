from __future__ import annotations

import asyncio
import io
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any, get_args

import httpx
import numpy as np
import pytest
from PIL import Image

from coin_ray.cloud.accounts import governor_limits
from coin_ray.cloud.adapters.reference import ReferenceAdapter
from coin_ray.cloud.client import CloudClient
from coin_ray.cloud.governor import Governor, LocalGovernor
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.protocol import Capabilities
from coin_ray.cloud.services import (
    SERVICES,
    adapter_for,
    check_service_settings,
    endpoint_for,
    longest_side,
    shrink_to_limits,
    token_variable,
)
from coin_ray.commands import arguments as cli
from coin_ray.config import Cloud, ServiceName
from coin_ray.data.canonical import CanonicalImage, canonical_image
from coin_ray.errors import AuthError, ConfigError, ImageRejected

from .cases import CASES, Case
from .conftest import HarnessBuilder, InBodyAdapter, labelled_folder
from .emulator import PROVIDERS, Emulator, scene
from .emulator import app as emulated

ALL = get_args(ServiceName)
ADDRESS = "https://mine.example.com"
FOLDER = ("folder", "--images", "pictures", "--classes", "person,dog")


@cache
def _exemplars() -> str:
    folder = Path(tempfile.mkdtemp(prefix="exemplars"))
    return labelled_folder(folder, {"one": [("car", "0.5 0.5 0.2 0.5")]})


def _cloud_config(service: str, **settings: Any) -> Cloud:
    if service == "t-rex":
        settings["exemplars"] = (_exemplars(),)
    return Cloud(**{"service": service, "coordinates": "xyxy_1000", **settings})


def test_every_service_is_offered() -> None:
    assert set(SERVICES) == set(ALL)


@pytest.mark.parametrize("service", ALL)
def test_adapters_and_addresses(service: str) -> None:
    adapter = adapter_for(_cloud_config(service))
    assert adapter.capabilities.name
    assert endpoint_for(_cloud_config(service, url=ADDRESS), adapter) == ADDRESS
    if adapter.capabilities.url:
        assert endpoint_for(_cloud_config(service), adapter).startswith("https://")
        assert "{" not in endpoint_for(_cloud_config(service), adapter)
    else:
        with pytest.raises(ConfigError, match=r"--cloud\.url"):
            endpoint_for(_cloud_config(service), adapter)


@pytest.mark.parametrize(
    "service", ["http", "azure-vision", "hf-endpoint", "openai-vlm"]
)
def test_services_that_every_user_has_elsewhere(service: str) -> None:
    assert adapter_for(_cloud_config(service)).capabilities.url == ""


def test_names_of_adapters_differ() -> None:
    """Names must differ, since they are part of the journal's key."""
    names = [adapter_for(_cloud_config(service)).capabilities.name for service in ALL]
    assert len(set(names)) == len(names)


def test_a_local_server_needs_no_address_and_speaks_the_reference_format() -> None:
    assert endpoint_for(Cloud(serve="demo"), ReferenceAdapter()) == ""
    with pytest.raises(ConfigError, match="does not speak azure-vision"):
        endpoint_for(Cloud(service="azure-vision", serve="demo"), ReferenceAdapter())


def test_the_region_of_rekognition() -> None:
    adapter = adapter_for(_cloud_config("rekognition"))
    default_region = endpoint_for(_cloud_config("rekognition"), adapter)
    assert default_region == "https://rekognition.us-east-1.amazonaws.com"
    ireland = endpoint_for(_cloud_config("rekognition", region="eu-west-1"), adapter)
    assert ireland == "https://rekognition.eu-west-1.amazonaws.com"
    for region in ("", "evil.example.com/", "eu west"):
        with pytest.raises(ConfigError, match=r"cloud\.region"):
            endpoint_for(_cloud_config("rekognition", region=region), adapter)


def test_coordinates_must_be_said() -> None:
    with pytest.raises(ConfigError, match=r"--cloud\.coordinates"):
        adapter_for(Cloud(service="openai-vlm", url=ADDRESS))


def test_coordinates_change_the_journal_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret-token")
    keys = set()
    for coordinates in ("xyxy_1000", "yxyx_1000", "xyxy_pixels"):
        config = _cloud_config("openai-vlm", url=ADDRESS, coordinates=coordinates)
        governor = LocalGovernor(Governor(governor_limits(config)))
        journal = open_journal(str(tmp_path))
        client = CloudClient(config, ("car",), ADDRESS, journal, governor)
        keys.add(client.key(_noise_image(64, 48)))
    assert len(keys) == 3


@pytest.mark.parametrize(("service", "side"), [("http", 20_000), ("dino-x", 1536)])
def test_a_local_server_gets_images_as_large_as_configured(
    service: str, side: int
) -> None:
    capabilities = adapter_for(_cloud_config(service)).capabilities
    large = _cloud_config(service, max_side=20_000)
    assert longest_side(large, capabilities) == side
    assert longest_side(_cloud_config(service), capabilities) == min(4096, side)


def test_an_unknown_service() -> None:
    with pytest.raises(ConfigError, match="dino-x"):
        Cloud(service="dino-y")  # type: ignore[arg-type]


TOKENS = {
    "http": None,
    "rekognition": None,
    "dino-x": "DDS_API_TOKEN",
    "grounding-dino": "DDS_API_TOKEN",
    "google-vision": "GOOGLE_VISION_API_KEY",
    "azure-vision": "AZURE_VISION_KEY",
    "hf-endpoint": "HF_TOKEN",
    "roboflow": "ROBOFLOW_API_KEY",
    "openai-vlm": "OPENAI_API_KEY",
    "gemini": "GEMINI_API_KEY",
    "anthropic": "ANTHROPIC_API_KEY",
    "roboflow-sam3": "ROBOFLOW_API_KEY",
    "t-rex": "DDS_API_TOKEN",
    "moondream": "MOONDREAM_API_KEY",
}


@pytest.mark.parametrize("service", ALL)
def test_variables_of_tokens(
    service: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert token_variable(_cloud_config(service)) == TOKENS[service]
    assert token_variable(_cloud_config(service, token_env="MINE")) == "MINE"
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_SECRET_ACCESS_KEY",
        "AWS_SESSION_TOKEN",
        *filter(None, TOKENS.values()),
    ):
        monkeypatch.delenv(name, raising=False)
    config = _cloud_config(service, url=ADDRESS)

    def build_client() -> CloudClient:
        governor = LocalGovernor(Governor(governor_limits(config)))
        journal = open_journal(str(tmp_path))
        return CloudClient(config, ("car",), ADDRESS, journal, governor)

    variable = "AWS_ACCESS_KEY_ID" if service == "rekognition" else TOKENS[service]
    if variable is None:
        build_client()
        return
    with pytest.raises(ConfigError, match=variable):
        build_client()
    for name in (variable, "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "secret-token")
    client = build_client()
    if adapter_for(config).capabilities.health_path is None:
        asyncio.run(client.check())


PROVIDER_NAMES = {"http": "reference", "dino-x": "dds", "grounding-dino": "dds"}
PROVIDER_NAMES |= {"t-rex": "dds"}


@pytest.mark.parametrize("service", [s for s in ALL if s != "moondream"])
def test_a_refused_key_is_named_by_its_variable(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIDANOTHER")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    monkeypatch.delenv("AWS_SESSION_TOKEN", raising=False)
    variable = TOKENS[service]
    if variable is not None:
        monkeypatch.setenv(variable, "a-wrong-secret")
    config = _cloud_config(service, url=ADDRESS)
    emulator = Emulator(PROVIDERS)

    async def run() -> None:
        client = CloudClient(
            config,
            ("car",),
            emulator.url(PROVIDER_NAMES.get(service, service)),
            open_journal(str(tmp_path)),
            LocalGovernor(Governor(governor_limits(config))),
            transport=emulator.transport(),
        )
        await client.answer(_noise_image(320, 240))

    with pytest.raises(AuthError) as refusal:
        asyncio.run(run())
    message = str(refusal.value)
    expected = f"environment variable {variable} (set) and is sent in"
    if service == "rekognition":
        expected = (
            "signed for the region us-east-1 with the environment variables"
            " AWS_ACCESS_KEY_ID (set), AWS_SECRET_ACCESS_KEY (set), AWS_SESSION_TOKEN"
            " (not set)"
        )
    elif variable is None:
        expected = "No key was sent"
    assert message.count(expected) == 1, message
    assert "a-wrong-secret" not in message


def test_limits_of_a_service() -> None:
    default = governor_limits(Cloud())
    assert (default.per_minute, default.rate) == (None, 50)
    dino_x = governor_limits(_cloud_config("dino-x"))
    assert (dino_x.per_minute, dino_x.rate) == (600, 10)
    lower = governor_limits(_cloud_config("dino-x", per_minute=60.0, per_day=7))
    assert (lower.per_minute, lower.per_day) == (60, 7)
    higher = governor_limits(_cloud_config("dino-x", per_minute=6000.0))
    assert higher.rate == 50
    for name, number in (("per_minute", 0.0), ("per_minute", -1.0), ("per_day", 0)):
        with pytest.raises(ConfigError, match=rf"{name} must be positive"):
            Cloud(**{name: number})  # type: ignore[arg-type]


CAPABILITIES = Capabilities(
    "some", open_vocabulary=True, per_class_scores=False, idempotent=False
)


def test_too_many_classes(build_harness: HarnessBuilder) -> None:
    few = InBodyAdapter({"max_classes": 2})
    with pytest.raises(ConfigError, match="at most 2 classes, got 3"):
        build_harness(httpx.Response(200), adapter=few)
    check_service_settings(Cloud(), ("a", "b"), few.capabilities)


@pytest.mark.parametrize("service", ["rekognition"])
def test_a_token_that_would_not_be_used(service: str) -> None:
    with pytest.raises(ConfigError, match=r"remove cloud\.token_env"):
        check_service_settings(
            _cloud_config(service, token_env="X"),
            ("a",),
            adapter_for(_cloud_config(service)).capabilities,
        )


def test_another_label_map_is_not_another_question(
    build_harness: HarnessBuilder, tmp_path: Path
) -> None:
    file = tmp_path / "map.yaml"
    file.write_text("service: http\nmap:\n  sedan: car\n")
    harness = build_harness(httpx.Response(200))
    mapped_harness = build_harness(httpx.Response(200), label_map=str(file))
    assert harness.client._query.labels is None
    assert mapped_harness.client._query.labels.find(["Sedan"]) == (0, 1.0)
    image = _noise_image(64, 48)
    assert harness.client.key(image) == mapped_harness.client.key(image)


def test_a_label_map_for_another_service(
    build_harness: HarnessBuilder, tmp_path: Path
) -> None:
    file = tmp_path / "map.yaml"
    file.write_text("service: rekognition\nmap:\n  sedan: car\n")
    with pytest.raises(ConfigError, match="rekognition"):
        build_harness(httpx.Response(200), label_map=str(file))


def _noise_image(width: int, height: int, max_side: int = 4096) -> CanonicalImage:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (height, width, 3), np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "PNG")
    return canonical_image(sink.getvalue(), max_side)


def _capabilities_with(**limits: int) -> Capabilities:
    return Capabilities(
        "some", open_vocabulary=True, per_class_scores=False, idempotent=False, **limits
    )  # type: ignore[arg-type]


def test_an_image_that_fits_is_sent_as_it_is() -> None:
    image = _noise_image(64, 48)
    assert shrink_to_limits(image, CAPABILITIES, 4096) is image


@pytest.mark.parametrize(
    ("max_side", "max_bytes"),
    [(100, 10**7), (400, 20_000), (100, 3000), (400, 120_000)],
)
@pytest.mark.parametrize("size", [(400, 200), (200, 400), (400, 20)])
def test_images_are_made_to_fit(
    size: tuple[int, int], max_side: int, max_bytes: int
) -> None:
    image = _noise_image(*size)
    try:
        capabilities = _capabilities_with(max_bytes=max_bytes, min_side=4)
        sent = shrink_to_limits(image, capabilities, max_side)
    except ImageRejected:
        assert size == (400, 20)
        return
    assert max(sent.width, sent.height) <= max_side
    assert len(sent.data) <= max_bytes
    assert min(sent.width, sent.height) >= 4
    assert (sent.original, sent.image_id) == (image.original, image.image_id)
    assert sent.media_type == "image/jpeg"
    with Image.open(io.BytesIO(sent.data)) as opened:
        assert opened.size == (sent.width, sent.height)
    assert sent.width / sent.height == pytest.approx(size[0] / size[1], rel=0.2)
    if len(image.data) > max_bytes and max_side == 400:
        assert len(sent.data) > max_bytes / 3  # no smaller than need be


@pytest.mark.parametrize(
    "limits",
    [
        {"min_side": 50},
        {"max_bytes": 10},
        {"max_bytes": 10, "min_side": 1},
        {"max_bytes": 700, "min_side": 30},
    ],
)
def test_images_that_can_not_be_sent(limits: dict[str, int]) -> None:
    with pytest.raises(ImageRejected, match="64 x 48") as caught:
        shrink_to_limits(_noise_image(64, 48), _capabilities_with(**limits), 4096)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("equals", [False, True])
@pytest.mark.parametrize(
    ("cloud", "service", "url"),
    [
        ("dino-x", "dino-x", ""),
        ("https://c.example.com", "http", "https://c.example.com"),
    ],
)
def test_the_cloud_by_name_or_address(
    cloud: str, service: str, url: str, equals: bool
) -> None:
    cloud_arguments = [f"--cloud={cloud}"] if equals else ["--cloud", cloud]
    for arguments in (
        (*FOLDER, *cloud_arguments),
        ("folder", *cloud_arguments, *FOLDER[1:]),
    ):
        config = cli.parse_run_arguments(arguments)[0].cloud
        assert (config.service, config.url) == (service, url)


def test_a_service_at_another_address() -> None:
    arguments = [*FOLDER, "--cloud", "hf-endpoint"]
    arguments += ["--cloud.url", ADDRESS, "--cloud.per-minute", "30"]
    config = cli.parse_run_arguments(arguments)[0].cloud
    assert (config.service, config.url) == ("hf-endpoint", ADDRESS)
    assert config.per_minute == 30


UNUSABLE_CLOUDS = [
    (("--cloud", "dino-y"), "dino-x, grounding-dino"),
    (("--cloud=detector.example.com",), "neither an address"),
    (("--cloud", ""), "neither an address"),
    (("--cloud",), "neither an address"),
    (("--cloud", "http"), "which cloud"),
    (("--cloud", "azure-vision"), r"--cloud\.url"),
    (("--cloud", "openai-vlm", "--cloud.url", ADDRESS), r"--cloud\.coordinates"),
    (("--cloud", "dino-x", "--cloud.serve", "demo"), "does not speak dino-x"),
    (("--cloud", "rekognition", "--cloud.region", "nowhere!"), r"cloud\.region"),
]


@pytest.mark.parametrize(("cloud_arguments", "message"), UNUSABLE_CLOUDS)
def test_clouds_that_can_not_be_used(
    cloud_arguments: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        cli.parse_run_arguments((*FOLDER, *cloud_arguments))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["folder", "--settings"]])
def test_help_imports_no_adapter(arguments: list[str]) -> None:
    code = f"""
import sys
import tempfile
from functools import cache
from coin_ray.commands import arguments
try:
    arguments.parse_run_arguments({arguments!r})
except SystemExit as end:
    assert not end.code
heavy = {{"torch", "httpx", "ray", "botocore"}}
heavy |= {{"coin_ray.cloud.client", "coin_ray.cloud.adapters.dds"}}
print(sorted(heavy & set(sys.modules)))
"""
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert process.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_client_and_a_service(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signature, path, task and polls are as the service requires, from the first request
    to an answer that is never paid again.
    """
    monkeypatch.setenv("CLOUD_TOKEN", emulated.TOKEN)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", emulated.AWS_KEY_ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", emulated.AWS_SECRET)
    monkeypatch.setenv("AWS_SESSION_TOKEN", emulated.AWS_SESSION)
    auth = case.adapter.capabilities.auth
    assert auth is not None
    server = Emulator(PROVIDERS)
    config = Cloud(
        url=server.url(case.provider), token_env=None if auth.sigv4 else "CLOUD_TOKEN"
    )
    image = canonical_image(
        scene([0, 2], [(20, 30, 220, 200), (300, 100, 500, 380)], (600, 400)), 4096
    )

    async def run() -> list[Any]:
        async def no_sleep(seconds: float) -> None:
            await asyncio.sleep(0)

        governor = LocalGovernor(Governor(governor_limits(config)))
        journal = open_journal(str(tmp_path))
        client = CloudClient(
            config,
            case.query().classes,
            config.url,
            journal,
            governor,
            case.adapter,
            transport=server.transport(),
            sleep=no_sleep,
        )
        client._query = client._replies._query = case.query()
        await client.check()
        return [await client.answer(image), await client.answer(image)]

    first, second = asyncio.run(run())
    assert (first.error, first.status, first.calls) == (None, "ok", 1)
    assert second.status == "cached"
    assert sorted(first.raw.class_scores.argmax(1).tolist()) == [0, 2]
    assert server.billed[case.provider] == 1
