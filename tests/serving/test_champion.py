from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

from coin_ray.commands.main import main
from coin_ray.errors import ConfigError, InputError
from coin_ray.predictors.student import write_exported_student
from coin_ray.serving.application import ServeSettings, create_replica_app
from coin_ray.serving.champion import ChampionFollower, StudentRegistry
from tests.builders import CLASSES, tiny_detector
from tests.images import jpeg
from tests.serving.helpers import detect_request, run_server

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def exports(
    student_folder: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str]:
    """Two students; the second has learned other classes than the first."""
    folder = str(tmp_path_factory.mktemp("exports") / "second")
    classes = ("cat", "traffic light", "ship")
    write_exported_student(tiny_detector(seed=1, score_min=0.01), classes, folder)
    return student_folder, folder


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all: MLflow takes long to create it."""
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"


@pytest.fixture
def registry(database: str, request: pytest.FixtureRequest) -> StudentRegistry:
    """A registered model for this test alone."""
    return StudentRegistry(request.node.name[:40], database)


def _champion_settings(registry: StudentRegistry, **changes: Any) -> ServeSettings:
    return ServeSettings(
        serve="champion", models=(registry.name,), registry=registry.uri, **changes
    )


def test_a_registered_export_is_the_champion_until_the_next_one(
    registry: StudentRegistry, exports: tuple[str, str]
) -> None:
    assert [registry.register(folder) for folder in exports] == ["1", "2"]
    assert registry.version() == "2"
    first, second = registry.load("1"), registry.load("2")
    assert (first.name, first.classes) == (f"{registry.name}/1", CLASSES)
    assert (second.name, second.classes[-1]) == (f"{registry.name}/2", "ship")


def test_without_a_champion_a_server_does_not_start(
    registry: StudentRegistry, tmp_path: Path
) -> None:
    message = r"no .*@champion in the registry .*coin-ray serve register"
    with pytest.raises(ConfigError, match=message):
        create_replica_app(_champion_settings(registry))
    without_model = ServeSettings(serve="champion", registry=registry.uri)
    with pytest.raises(ConfigError, match="models=NAME"):
        create_replica_app(without_model)
    with pytest.raises(InputError, match="is no trained detector"):
        registry.register(str(tmp_path))


def test_the_command_registers_an_export(
    registry: StudentRegistry,
    exports: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--name", registry.name, "--registry", registry.uri]
    assert main(["serve", "register", exports[0], *options]) == 0
    assert capsys.readouterr().out == f"{registry.name} version 1 is the champion\n"
    assert main(["serve", "register", "absent", *options]) == 2


class UnreliableRegistry(StudentRegistry):
    """Unreachable at the first request, with a broken version at the next two."""

    requests = 0

    def version(self) -> str:
        UnreliableRegistry.requests += 1
        if self.requests == 1:
            raise ConfigError("unreachable")
        return "2"

    def load(self, version: str) -> Any:
        if self.requests < 4:
            raise InputError("broken")
        return "student 2"


def test_a_broken_version_or_an_unreachable_registry_keeps_the_current_model() -> None:
    swapped: list[Any] = []
    errors: list[int] = []

    async def run() -> None:
        follower = ChampionFollower(UnreliableRegistry("harbour"), "1", every=0.001)
        following = follower.follow(swapped.append, lambda: errors.append(1))
        task = asyncio.create_task(following)
        while not swapped:
            await asyncio.sleep(0.001)
        assert follower.version == "2"
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 20))
    assert swapped == ["student 2"]
    assert len(errors) == 3


def test_a_swap_under_load_drops_no_request(
    registry: StudentRegistry, exports: tuple[str, str]
) -> None:
    """Clients ask about classes that both students know, without a pause, while the
    second becomes the champion."""
    registry.register(exports[0])
    first, second = f"{registry.name}/1", f"{registry.name}/2"
    body = detect_request(jpeg(), CLASSES[:2])
    answers: list[tuple[int, str]] = []

    async def ask_until_swapped(http: httpx.AsyncClient) -> None:
        while [model for _, model in answers].count(second) < 20:
            response = await http.post("/v1/detect", json=body)
            answers.append((response.status_code, response.json().get("model", "")))

    async def swap_under_load(url: str) -> str:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            assert (await http.get("/health")).json()["model"] == first
            clients = [asyncio.create_task(ask_until_swapped(http)) for _ in range(6)]
            while len(answers) < 20:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(registry.register, exports[1])
            await asyncio.wait_for(asyncio.gather(*clients), 120)
            return (await http.get("/metrics")).text

    with run_server(create_replica_app(_champion_settings(registry, every=0.2))) as url:
        metrics = asyncio.run(swap_under_load(url))
    assert {status for status, _ in answers} == {200}
    assert {model for _, model in answers} == {first, second}
    assert f'coin_model{{model="{second}"}} 1.0' in metrics
    assert "coin_model_swaps_total 1.0" in metrics
