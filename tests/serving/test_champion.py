from __future__ import annotations

import asyncio
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from coin_ray.errors import ConfigError, InputError
from coin_ray.predictors.student import write_exported
from coin_ray.serving import champion as champion_module
from coin_ray.serving.application import Arguments, asgi_app
from coin_ray.serving.champion import Champion, Registry
from tests.builders import CLASSES, tiny_detector
from tests.serving.running import running
from tests.serving.test_local_cloud import call, jpeg

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two students; the second has learned other classes than the first."""
    folder = tmp_path_factory.mktemp("exports")
    for seed, classes in enumerate((CLASSES, ("cat", "traffic light", "ship"))):
        write_exported(
            tiny_detector(seed=seed, score_min=0.01), classes, str(folder / str(seed))
        )
    return [str(folder / "0"), str(folder / "1")]


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One for all: MLflow takes long to make it."""
    return f"sqlite:///{tmp_path_factory.mktemp('registry')}/mlflow.db"


@pytest.fixture
def registry(database: str, request: pytest.FixtureRequest) -> Registry:
    """A model of the test's own."""
    return Registry(request.node.name[:40], database)


def test_a_registered_export_is_the_champion_and_the_next_one_takes_its_place(
    registry: Registry, exports: list[str]
) -> None:
    assert [registry.register(folder) for folder in exports] == ["1", "2"]
    assert registry.version() == "2"
    first, second = registry.load("1"), registry.load("2")
    assert (first.name, first.classes) == (f"{registry.name}/1", CLASSES)
    assert (second.name, second.classes[-1]) == (f"{registry.name}/2", "ship")


def test_without_a_champion_a_server_does_not_start(
    registry: Registry, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"no .*@champion in the registry .*python -m coin_ray\.serving\.champion",
    ):
        asgi_app(
            Arguments(serve="champion", models=(registry.name,), registry=registry.uri)
        )
    with pytest.raises(ConfigError, match="models=NAME"):
        asgi_app(Arguments(serve="champion", registry=registry.uri))
    with pytest.raises(InputError, match="is no export"):
        registry.register(str(tmp_path))


def test_the_command_registers_an_export(
    registry: Registry,
    exports: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(
        sys,
        "argv",
        ["champion", exports[0], "--name", registry.name, "--registry", registry.uri],
    )
    assert champion_module.main() == 0
    assert capsys.readouterr().out == f"{registry.name} version 1 is the champion\n"
    monkeypatch.setattr(
        sys,
        "argv",
        ["champion", "absent", "--name", registry.name, "--registry", registry.uri],
    )
    assert champion_module.main() == 2


def test_a_broken_version_or_a_registry_that_is_away_leaves_the_present_model(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Shaky(Registry):
        def version(self) -> str:
            looks.append("look")
            if len(looks) == 1:
                raise ConfigError("away")
            return "2"

        def load(self, version: str) -> Any:
            if len(looks) < 4:
                raise InputError("broken")
            return "student 2"

    looks: list[str] = []
    swapped: list[Any] = []
    failed: list[int] = []

    async def run() -> None:
        follower = Champion(Shaky("harbour"), "1", every=0.001)
        task = asyncio.create_task(
            follower.follow(swapped.append, lambda: failed.append(1))
        )
        while not swapped:
            await asyncio.sleep(0.001)
        assert follower.version == "2"
        task.cancel()

    asyncio.run(asyncio.wait_for(run(), 20))
    assert (swapped, len(failed)) == (["student 2"], 3)


def test_a_swap_under_load_drops_no_request(
    registry: Registry, exports: list[str]
) -> None:
    """Clients ask about classes that both students know, without a pause, while the
    second becomes the champion."""
    registry.register(exports[0])
    first, second = f"{registry.name}/1", f"{registry.name}/2"
    question = call(jpeg(), CLASSES[:2])
    answers: list[tuple[int, str]] = []

    async def client(http: httpx.AsyncClient) -> None:
        while sum(model.endswith("/2") for _, model in answers) < 20:
            response = await http.post("/v1/detect", json=question)
            answers.append((response.status_code, response.json().get("model", "")))

    async def run(url: str) -> str:
        async with httpx.AsyncClient(base_url=url, timeout=60) as http:
            assert (await http.get("/health")).json()["model"] == first
            clients = [asyncio.create_task(client(http)) for _ in range(6)]
            while len(answers) < 20:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(registry.register, exports[1])
            await asyncio.wait_for(asyncio.gather(*clients), 120)
            return (await http.get("/metrics")).text

    with running(
        asgi_app(
            Arguments(
                serve="champion",
                models=(registry.name,),
                registry=registry.uri,
                every=0.2,
            )
        )
    ) as url:
        metrics = asyncio.run(run(url))
    assert {status for status, _ in answers} == {200}
    assert {model for _, model in answers} == {first, second}
    assert f'coin_model{{model="{second}"}} 1.0' in metrics
    assert "coin_model_swaps_total 1.0" in metrics
