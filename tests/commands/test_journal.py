"""``coin-ray journal drop`` and answers on record for other settings."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image

from coin_ray import storage, tables
from coin_ray.cloud.journal.base import AnswerRecord, Journal
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.commands.main import main
from coin_ray.config import Cloud, PipelineConfig
from coin_ray.config.presets import folder
from coin_ray.config.yaml_files import to_yaml
from coin_ray.runs.estimate import _offline_clients, print_other_answers
from coin_ray.runs.lease import hold_root
from coin_ray.runs.steps import Manifest, read_reopened
from coin_ray.stages.collecting.parts import PART_SCHEMA, CollectedParts

NAMES = ("one.jpg", "two.jpg", "three.png")
ANSWER = AnswerRecord(b'{"boxes": []}', cost_usd=0.015, time=1e9, service="http")


@dataclass
class Root:
    """A root whose journal has an answer about each of three images, and whose
    collection is finished.
    """

    path: Path
    config: PipelineConfig
    images: list[dict[str, Any]]
    keys: list[str]

    @property
    def uri(self) -> str:
        return str(self.path)

    def journal(self) -> Journal:
        return open_journal(storage.join(self.uri, "journal"))

    def answered(self) -> set[str]:
        journal = self.journal()
        answered = set(journal.keys())
        journal.close()
        return answered

    @property
    def collect(self) -> str:
        return storage.join(self.uri, "steps", "collect-0123")

    def drop(self, answer: str) -> int:
        return main(["journal", "drop", "--root", self.uri, answer])


def _config(**settings: Any) -> PipelineConfig:
    cloud = Cloud(**{"url": "https://detector.example.com", **settings})
    return replace(folder(), classes=("car", "bus"), cloud=cloud)


def _keys(config: PipelineConfig, image: dict[str, Any], journal: Journal) -> list[str]:
    from coin_ray.cloud.renderings import render_image

    file = Path(image["uri"]).read_bytes()
    clients = _offline_clients(config, journal)
    return [client.key(render_image(file, *client.rendering)) for client in clients]


def _write_images(photos: Path) -> list[dict[str, Any]]:
    photos.mkdir()
    images = []
    for number, name in enumerate(NAMES):
        stream = io.BytesIO()
        kind = "PNG" if name.endswith("png") else "JPEG"
        Image.new("RGB", (64, 48), (60 * number, 0, 0)).save(stream, kind)
        (photos / name).write_bytes(stream.getvalue())
        image_id = hashlib.sha256(stream.getvalue()).hexdigest()
        images.append({"image_id": image_id, "uri": str(photos / name)})
    return images


def _part(images: Sequence[dict[str, Any]]) -> pa.Table:
    row = dict.fromkeys(PART_SCHEMA.names) | {
        "boxes": [[0.0, 0.0, 9.0, 9.0]],
        "scores": [0.5],
        "status": "ok",
        "calls": 1,
        "cost_usd": 0.015,
    }
    rows = [row | {"image_id": image["image_id"]} for image in images]
    return pa.Table.from_pylist(rows, schema=PART_SCHEMA)


def _write_root(tmp_path: Path, config: PipelineConfig) -> Root:
    path = tmp_path / "root"
    images = _write_images(tmp_path / "photos")
    root = Root(path, config, images, [])
    rows = [{"width": 64, "height": 48, "split": "train"} | image for image in images]
    storage.write_table(
        str(path / "steps" / "images-4567" / "images.parquet"),
        pa.Table.from_pylist(rows, schema=tables.IMAGES),
    )
    storage.write_bytes(str(path / "config.yaml"), to_yaml(config).encode())
    journal = root.journal()
    for image in images:
        for key in _keys(config, image, journal):
            journal.attempt(key, 0.015)
            journal.put(key, ANSWER)
            root.keys.append(key)
    journal.close()
    storage.write_table(f"{root.collect}/parts/0.parquet", _part(images))
    manifest = Manifest("collect", "0123", metrics={"calls": {"failed": 0}})
    storage.write_json(f"{root.collect}/manifest.json", manifest.to_json())
    return root


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return _write_root(tmp_path, _config())


@pytest.mark.parametrize("form", ["path", "file name", "image_id", "key"])
@pytest.mark.parametrize("number", [0, 2])
def test_one_answer_is_dropped_and_its_image_is_asked_again(
    form: str, number: int, root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    image, key = root.images[number], root.keys[number]
    names = {
        "path": image["uri"],
        "file name": NAMES[number],
        "image_id": image["image_id"],
        "key": key,
    }
    assert root.drop(names[form]) == 0
    output = capsys.readouterr().out
    assert key in output
    assert "2001-09-09 01:46 UTC, $0.0150" in output
    assert image["uri"] in output
    assert root.answered() == set(root.keys) - {key}
    parts = CollectedParts(storage.join(root.collect, "parts"))
    others = {i["image_id"] for i in root.images} - {image["image_id"]}
    assert set(parts.answered_ids.to_pylist()) == others
    assert not parts.refused_ids.to_pylist()
    former = read_reopened(root.collect)
    assert former is not None
    assert former.metrics["calls"]["failed"] == 1
    assert not storage.exists(f"{root.collect}/manifest.json")


def test_an_equal_answer_that_comes_later_counts_also_after_compaction(
    root: Root,
) -> None:
    assert root.drop(NAMES[0]) == 0
    assert root.drop(NAMES[1]) == 0
    assert read_reopened(root.collect).metrics["calls"]["failed"] == 2  # type: ignore[union-attr]
    journal = root.journal()
    assert journal.spent()[0] == 3, "what was paid stays paid"
    assert journal.get(root.keys[0]) is None
    journal.put(root.keys[0], ANSWER)
    assert journal.get(root.keys[0]) == ANSWER
    journal.close()
    for _ in range(2):
        assert root.answered() == {root.keys[0], root.keys[2]}
        assert main(["journal", "verify", "--root", root.uri]) == 0
        assert main(["journal", "compact", "--root", root.uri]) == 0


def test_never_several_by_accident(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = _write_root(tmp_path, _config(views=("plain", "mirrored")))
    assert root.drop(NAMES[0]) == 2
    message = capsys.readouterr().err
    assert all(key in message for key in root.keys[:2])
    assert root.answered() == set(root.keys)
    assert root.drop(root.keys[1]) == 0
    assert root.answered() == set(root.keys) - {root.keys[1]}


@pytest.mark.parametrize("name", ["four.jpg", "0" * 64, "", "."])
def test_a_name_of_nothing_is_refused(
    name: str, root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    assert root.drop(name) == 2
    assert "neither a key" in capsys.readouterr().err
    assert root.answered() == set(root.keys)


def test_an_answer_for_other_settings_needs_its_key(
    root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    config = _config(url="https://other.example.com")
    storage.write_bytes(f"{root.uri}/config.yaml", to_yaml(config).encode())
    assert root.drop(NAMES[0]) == 2
    assert "no answer about" in capsys.readouterr().err
    assert root.drop(root.keys[0]) == 0
    assert "no image of this root" in capsys.readouterr().out
    assert root.answered() == set(root.keys[1:])


def test_a_root_in_use_is_left_alone(
    root: Root, capsys: pytest.CaptureFixture[str]
) -> None:
    with hold_root(root.uri):
        assert root.drop(NAMES[0]) == 2
    assert "belongs to another run" in capsys.readouterr().err
    assert root.answered() == set(root.keys)


@pytest.mark.parametrize(
    ("settings", "classes", "told"),
    [
        ({}, ("car", "bus"), False),
        ({"rate": 1.0}, ("car", "bus"), False),
        ({"url": "https://other.example.com"}, ("car", "bus"), True),
        ({"score_min": 0.3}, ("car", "bus"), True),
        ({}, ("car", "bus", "dog"), True),
    ],
)
def test_answers_on_record_for_other_settings_are_told(
    settings: dict[str, Any],
    classes: tuple[str, ...],
    told: bool,
    root: Root,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = replace(_config(**settings), classes=classes)
    images = pa.Table.from_pylist(root.images)
    print_other_answers(config, images, root.uri)
    output = capsys.readouterr().out
    assert output.count("\n") == told
    assert ("the 3 answers on record are for other settings" in output) == told
