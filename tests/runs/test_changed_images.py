"""Every run compares the files of its images with those that were read."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coin_ray import storage
from coin_ray.config import Cloud, DemoScenes, Folder, PipelineConfig, Tracking
from coin_ray.data.inspect import Inspection, inspect_image
from coin_ray.data.listing import LISTING_FILE, list_versions
from coin_ray.errors import InputError
from coin_ray.runs.changed_images import find_changes, reopen_if_changed
from coin_ray.runs.runner import print_plan, run_missing_steps, run_pipeline
from coin_ray.runs.steps import Context, Metrics, Step
from coin_ray.stages import images


@pytest.fixture(autouse=True)
def _inspect_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def inspect(uris: Iterator[str], _: int) -> Iterator[Inspection]:
        return map(inspect_image, uris)

    monkeypatch.setattr(images, "inspect_images", inspect)


class _Run:
    """A run of three steps: images, a collection and one that reads both."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder / "photos", str(folder / "root")
        self.data = Folder(images=str(self.folder))
        self.config = PipelineConfig("folder", ("cat",), self.data, Cloud(serve="demo"))
        image_step = Step("images", "images", self.data)
        collect = Step("collect", "collect", "c", (image_step,))
        train = Step("train", "train", "t", (image_step, collect))
        self.steps = (image_step, collect, train)
        self.done: list[str] = []

    def write(self, name: str, seed: int) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(seed).integers(0, 255, (30, 40, 3), np.uint8)
        Image.fromarray(pixels).save(path)
        return path

    def __call__(self) -> list[str]:
        """Run what is to do; return the names of the steps that were done."""
        self.done = []
        reopen_if_changed(self.steps, self.root)
        run_missing_steps(
            self.steps,
            self.config,
            self.root,
            work={
                "images": self._read_images,
                "collect": self._collect,
                "train": self._train,
            },
        )
        return self.done

    def _read_images(self, context: Context[PipelineConfig]) -> Metrics:
        self.done.append("images")
        return images.run(context)

    def _collect(self, context: Context[PipelineConfig]) -> Metrics:
        self.done.append("collect")
        storage.write_bytes(storage.join(context.folder, "parts", "0.parquet"), b"1")
        storage.write_bytes(storage.join(context.folder, "cloud.parquet"), b"1")
        return {}

    def _train(self, context: Context[PipelineConfig]) -> Metrics:
        self.done.append("train")
        checkpoint = storage.join(context.folder, "checkpoint")
        assert not storage.exists(checkpoint), "training goes on with other images"
        storage.write_bytes(checkpoint, b"1")
        return {}

    def image_names(self) -> list[str]:
        uri = storage.join(self.steps[0].folder(self.root), "images.parquet")
        uris: Sequence[str] = storage.read_table(uri)["uri"].to_pylist()
        return [os.path.basename(uri) for uri in uris]


ALL = ["images", "collect", "train"]


@pytest.fixture
def finished(tmp_path: Path) -> _Run:
    run = _Run(tmp_path)
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        run.write(name, seed)
    assert run() == ALL
    return run


def test_without_changes_nothing_is_done(finished: _Run) -> None:
    assert finished() == []


def test_a_new_a_gone_and_a_replaced_photo_are_told_and_read(
    finished: _Run, capsys: pytest.CaptureFixture[str]
) -> None:
    finished.write("d.png", 7)
    (finished.folder / "a.png").unlink()
    finished.write("b.png", 8)
    assert finished() == ALL
    log = capsys.readouterr().out
    for text in ("1 new", "d.png", "1 gone", "a.png", "1 changed", "b.png"):
        assert text in log
    assert "made again: collect, train" in log
    assert finished.image_names() == ["b.png", "c.png", "d.png"]
    assert finished() == []


def test_answers_of_the_other_images_stay(finished: _Run) -> None:
    collect = finished.steps[1].folder(finished.root)
    finished.write("d.png", 7)
    reopen_if_changed(finished.steps, finished.root)
    run_missing_steps(finished.steps[:1], finished.config, finished.root)
    assert [path.name for path in Path(collect).rglob("*") if path.is_file()] == [
        "0.parquet"
    ]


@pytest.mark.parametrize("change", ["touched", "hidden", "other file"])
def test_a_change_without_effect_makes_nothing_else_again(
    finished: _Run, change: str
) -> None:
    if change == "touched":
        os.utime(finished.folder / "a.png", (1, 1))
        assert finished() == ["images"]
    elif change == "hidden":
        finished.write(".thumbnails/x.png", 4)
    else:
        (finished.folder / "readme.md").write_text("text")
    assert finished() == []


def test_changed_labels_are_noticed(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.write("images/a.png", 1)
    (run.folder / "data.yaml").write_text("names: [cat]\ntrain: images\n")
    (run.folder / "labels").mkdir()
    labels = run.folder / "labels" / "a.txt"
    labels.write_text("0 .5 .5 .2 .2\n")
    assert run() == ALL
    labels.write_text("0 .5 .5 .2 .25\n")
    assert run() == ALL


def test_a_step_without_a_listing_is_taken_as_unchanged(finished: _Run) -> None:
    listing = Path(finished.steps[0].folder(finished.root)) / LISTING_FILE
    listing.unlink()
    finished.write("d.png", 7)
    assert finished() == []
    assert listing.exists()
    finished.write("e.png", 8)
    assert finished() == ALL


def test_results_stay_if_the_changed_images_can_not_be_used(finished: _Run) -> None:
    for path in finished.folder.iterdir():
        path.write_text("no image")
    with pytest.raises(InputError):
        finished()
    assert finished.steps[2].is_finished(finished.root)
    shutil.rmtree(finished.folder)
    for seed, name in enumerate(("a.png", "b.png", "c.png")):
        finished.write(name, seed)
    assert finished() == ["images"]


def test_a_folder_that_is_not_there_is_told(
    finished: _Run, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(finished.folder)
    assert finished() == []
    assert "images: not compared with their files: no such folder" in (
        capsys.readouterr().out
    )


def test_the_same_command_reads_changed_images(
    finished: _Run, capsys: pytest.CaptureFixture[str]
) -> None:
    config = replace(finished.config, tracking=Tracking(enabled=False))
    steps = {"images": finished.steps[0]}

    def run() -> str:
        run_pipeline(config, steps, finished.root)
        return capsys.readouterr().out

    assert "images: started" not in run()
    finished.write("d.png", 7)
    print_plan(config, steps, finished.root)
    assert "1 new" in capsys.readouterr().out
    log = run()
    assert "1 new" in log
    assert "images: finished in" in log
    (finished.folder / "a.png").write_text("no image any more")
    finished.write("b.png", 9)
    for name in ("c.png", "d.png"):
        (finished.folder / name).write_text("")
    with pytest.raises(InputError, match="3 of 4 images are left out"):
        run()
    assert finished.steps[0].is_finished(finished.root)
    with pytest.raises(InputError, match="3 of 4 images are left out"):
        run()


def test_the_demo_has_no_files_to_compare(tmp_path: Path) -> None:
    assert not find_changes(Step("images", "images", DemoScenes()), str(tmp_path))


def test_the_files_of_the_run_itself_are_not_listed(tmp_path: Path) -> None:
    run = _Run(tmp_path)
    run.write("a.png", 1)
    run.write("runs/one/picture.png", 2)
    versions = list_versions(run.data, str(run.folder / "runs" / "one"))
    assert list(versions) == [str(run.folder / "a.png")]
