from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from coin_ray.commands.detector import (
    DetectorOptions,
    parse_detector_arguments,
    train_detector,
)
from coin_ray.config import Tracking
from coin_ray.config.co_detr import tiny
from coin_ray.config.detector_presets import DETECTOR_PRESETS, REAL_TIME_PRESETS, small
from coin_ray.config.detector_training import DetectorConfig
from coin_ray.data import formats
from coin_ray.errors import CoinError, ConfigError, InputError
from coin_ray.predictors.co_detr import CoDetrPredictor
from coin_ray.predictors.loading import open_predictor
from coin_ray.runs.detector_graph import build_detector_steps
from coin_ray.stages.common.detector_checks import check_labelled_images
from coin_ray.training.supervised import SupervisedTraining
from tests.labelled_folder import CLASSES, write_image_records
from tests.models.co_detr.transformers_networks import save_network as fast_folder


@pytest.fixture(scope="module")
def format_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The same images in every format that can be written."""
    root = tmp_path_factory.mktemp("data")
    train_records, val_records = (
        write_image_records(root / "raw", 8, 1),
        write_image_records(root / "raw", 4, 2),
    )
    places = {}
    for name in ("coco", "voc", "yolo", "kitti", "bdd100k"):
        places[name], places[f"{name} val"] = (
            str(root / name),
            str(root / f"{name}-val"),
        )
        formats.write_dataset(train_records, places[name], name)
        formats.write_dataset(val_records, places[f"{name} val"], name)
    places["plain"] = str(root / "raw")
    return places


def _config(data: str, val: str = "", steps: int = 4, **changes: Any) -> DetectorConfig:
    fit = replace(small().fit, steps=steps, batch=2, warmup=0, checkpoint_every=2)
    defaults = {
        "classes": CLASSES,
        "short_side": 48,
        "long_side": 64,
        "tracking": Tracking(enabled=False),
        "fit": fit,
    } | changes
    return replace(small(), data=data, val=val, **defaults)


@pytest.mark.parametrize("name", ["coco", "voc", "yolo", "kitti", "bdd100k"])
def test_every_format_is_checked_before_training(
    name: str, format_folders: dict[str, str]
) -> None:
    counts = check_labelled_images(
        _config(f"{name}:{format_folders[name]}", format_folders[f"{name} val"])
    )
    assert counts["train"] == {"images": 8, "cat": 8, "dog": 4}
    assert counts["val"] == {"images": 4, "cat": 4, "dog": 2}


def test_a_coco_folder_is_trained_on_evaluated_and_written_as_one_file(
    format_folders: dict[str, str], tmp_path: Path
) -> None:
    settings = _config(
        f"coco:{format_folders['coco']}",
        format_folders["coco val"],
        tracking=Tracking(enabled=True),
    )
    summary = train_detector(settings, DetectorOptions(str(tmp_path), dry_run=False))
    figures = summary["evaluate"]["val"]
    assert figures["images"] == 4
    assert all(0 <= figures[name] <= 1 for name in ("voc_ap50", "coco_ap50", "coco_ap"))
    assert set(figures["voc_ap50_by_class"]) == set(CLASSES)
    assert summary["train"]["boxes"] == 12
    assert open_predictor(str(tmp_path / "co_detr.pt")).classes == CLASSES
    assert json.loads((tmp_path / "summary.json").read_text())["model"] == str(
        tmp_path / "co_detr.pt"
    )
    assert not list(tmp_path.rglob("state.pt")), (
        "the optimizer's state is gone once the weights are written"
    )
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    runs = mlflow.search_runs(search_all_experiments=True)
    assert {"images", "train", "evaluate"} <= set(runs["tags.mlflow.runName"])
    assert runs["metrics.val/voc_ap50"].notna().any()
    assert runs["metrics.decoder"].notna().any()


def test_a_killed_training_goes_on_from_its_checkpoint_and_ends_with_the_same_weights(
    format_folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = _config(format_folders["coco"], format_folders["coco val"], steps=5)
    train_detector(settings, DetectorOptions(str(tmp_path / "whole"), dry_run=False))
    original, trained_steps = SupervisedTraining.train_step, []

    def dying(self: SupervisedTraining, batch: Any, step: int) -> Any:
        trained_steps.append(step)
        if step == 3:
            raise KeyboardInterrupt
        return original(self, batch, step)

    monkeypatch.setattr(SupervisedTraining, "train_step", dying)
    with pytest.raises(KeyboardInterrupt):
        train_detector(
            settings, DetectorOptions(str(tmp_path / "killed"), dry_run=False)
        )
    monkeypatch.setattr(
        SupervisedTraining,
        "train_step",
        lambda self, batch, step: (
            trained_steps.append(step),
            original(self, batch, step),
        )[1],
    )
    train_detector(settings, DetectorOptions(str(tmp_path / "killed"), dry_run=False))
    assert trained_steps == [0, 1, 2, 3, 2, 3, 4]
    whole, killed = (
        torch.load(tmp_path / name / "co_detr.pt", weights_only=True)["weights"]
        for name in ("whole", "killed")
    )
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
    trained_steps.clear()
    train_detector(settings, DetectorOptions(str(tmp_path / "killed"), dry_run=False))
    assert not trained_steps, "a finished run trains nothing"


def test_a_dry_run_says_what_it_would_do_and_does_nothing(
    format_folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train_detector(
        _config(format_folders["voc"], format_folders["voc val"]),
        DetectorOptions(str(tmp_path / "run"), dry_run=True),
    )
    printed = capsys.readouterr().out
    assert "train: 8 annotated images; boxes: cat 8, dog 4" in printed
    assert "training: 4 steps of 2 images, 1.0 epochs, heads: atss" in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("ship", ["heads", "agreement"])
def test_heads_that_are_shipped_are_evaluated_each_and_all_together(
    ship: Any, format_folders: dict[str, str], tmp_path: Path
) -> None:
    settings = _config(
        format_folders["coco"],
        format_folders["coco val"],
        steps=2,
        ship=ship,
        co_detr=tiny(auxiliary=("rcnn", "atss")),
    )
    figures = train_detector(settings, DetectorOptions(str(tmp_path), dry_run=False))[
        "evaluate"
    ]["val"]
    assert set(figures["heads"]) == {"decoder", "rcnn", "atss", "agreement"}
    reported = "decoder" if ship == "heads" else "agreement"
    assert figures["heads"][reported] == {
        name: value for name, value in figures.items() if name != "heads"
    }
    predictor = open_predictor(str(tmp_path / "co_detr.pt"))
    assert isinstance(predictor, CoDetrPredictor)
    assert predictor.reported == reported


@pytest.mark.parametrize("model", ["rt-detr-v2", "d-fine"])
def test_a_fast_detector_is_trained_with_the_head_and_left_as_transformers_own_folder(
    model: Any,
    format_folders: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("transformers")
    from coin_ray.predictors.transformers_detectors import load_transformers

    network = fast_folder(tmp_path / "before", model, classes=5)
    settings = _config(
        format_folders["coco"],
        format_folders["coco val"],
        model=model,
        network=network,
        average=0.9,
    )
    figures = train_detector(
        settings, DetectorOptions(str(tmp_path / "run"), dry_run=False)
    )
    assert 0 <= figures["evaluate"]["val"]["coco_ap"] <= 1
    (curve,) = (tmp_path / "run").glob("steps/train-*/curve.json")
    assert {"decoder", "atss"} <= set(json.loads(curve.read_text())[-1])
    network_folder = tmp_path / "run" / model
    assert (
        f"--cloud.serve transformers --cloud.model {network_folder}"
        in capsys.readouterr().out
    )
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} == {
        file.name for file in network_folder.iterdir()
    }
    served = load_transformers(str(network_folder))
    assert served.classes == CLASSES
    boxes, scores = served.detect(Image.new("RGB", (64, 48)), ("dog",), 0.0)
    assert len(boxes) == len(scores) > 0


def test_what_cannot_be_trained_on_is_told_before_anything_is_written(
    format_folders: dict[str, str], tmp_path: Path
) -> None:
    cases: dict[str, DetectorConfig] = {
        r"no box of zebra in 8 annotated images; its classes are cat, dog": _config(
            format_folders["coco"], classes=("cat", "zebra")
        ),
        r"no box of cat, dog in 0 annotated images": _config(format_folders["plain"]),
        r"the folder is in the format voc, not coco": _config(
            f"coco:{format_folders['voc']}"
        ),
        r"--val .*: no box of cat, dog in 0 annotated images": _config(
            format_folders["coco"], format_folders["plain"]
        ),
        r"no such folder": _config("/nowhere"),
        r"has no .* for 'test'": _config(f"{format_folders['voc']}#test"),
        r"of another network": _config(
            format_folders["coco"],
            backbone=replace(
                DETECTOR_PRESETS["r50"]().backbone, weights=_weights(tmp_path)
            ),
        ),
    }
    for message, settings in cases.items():
        with pytest.raises(CoinError, match=message):
            train_detector(
                settings, DetectorOptions(str(tmp_path / "run"), dry_run=False)
            )
    assert not (tmp_path / "run").exists()


def _weights(folder: Path) -> str:
    torch.save({"conv1.weight": torch.zeros(1)}, folder / "other.pt")
    return str(folder / "other.pt")


def test_the_command_line_reads_names_and_settings() -> None:
    parsed_config, options = parse_detector_arguments(
        [
            "--model",
            "co-detr",
            "--data",
            "coco:/data#train",
            "--classes",
            "person,traffic light",
            "--root",
            "/runs/a",
            "--epochs",
            "3",
            "--drops",
        ]
    )
    assert parsed_config.classes == ("person", "traffic light")
    assert (
        parsed_config.preset,
        parsed_config.backbone.name,
        parsed_config.epochs,
    ) == (
        "r50",
        "resnet50",
        3,
    )
    assert parsed_config.pipeline.data.images == "/data#train"  # type: ignore[union-attr]
    assert options == DetectorOptions("/runs/a", dry_run=False)
    demo, _ = parse_detector_arguments(
        [
            "--data",
            "demo-source",
            "--co-detr.auxiliary",
            "rcnn",
            "atss",
            "--fit.steps",
            "7",
        ]
    )
    assert (demo.preset, demo.co_detr.auxiliary, demo.fit.steps, len(demo.classes)) == (
        "tiny",
        ("rcnn", "atss"),
        7,
        8,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--classes", "cat"], "which images"),
        (["--data", "/data"], "which classes"),
        (["--data", "demo", "--classes", "cat"], "the demo's classes are bird, bug"),
        (["--data", "demo-source", "--val", "/x"], "leave --val and --test out"),
        (
            ["--model", "d-fine", "--preset", "r50", "--data", "/data"],
            "--preset r50 is a Co-DETR; --model d-fine takes --network",
        ),
    ],
)
def test_impossible_settings_are_told(arguments: list[str], message: str) -> None:
    with pytest.raises((ConfigError, InputError), match=message):
        parse_detector_arguments(arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accumulate": 3}, "accumulate 3 must divide a worker's batch"),
        ({"epochs": 5.0, "drops": (11.0,)}, "must lie within 5"),
        ({"average": 1.0}, "average must lie in"),
        ({"short_side": 300}, "short_side must be positive and not exceed long_side"),
        ({"network": "a/b"}, "--network goes with --model rt-detr-v2 or d-fine"),
        ({"model": "d-fine"}, "--model d-fine needs --network"),
        (
            {"model": "d-fine", "network": "a/b", "ship": "heads"},
            "saves transformers' own folder",
        ),
        (
            {"model": "d-fine", "network": "a/b", "co_detr": tiny()},
            "with the ATSS head alone",
        ),
        (
            {"ship": "heads", "co_detr": tiny(auxiliary=())},
            "ship heads needs heads that are trained",
        ),
        (
            {"ship": "agreement", "co_detr": tiny(auxiliary_losses=False)},
            "ship agreement needs heads that are trained",
        ),
    ],
)
def test_impossible_values_are_told(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(small(), **changes)


def test_epochs_are_steps_over_the_images_there_are() -> None:
    fit = DETECTOR_PRESETS["r50"]().training_over(16_000)
    assert (fit.steps, fit.milestones, fit.factors) == (12_000, (11_000,), (0.1,))
    assert small().training_over(5) == small().fit


@pytest.mark.parametrize("name", [*DETECTOR_PRESETS, *REAL_TIME_PRESETS])
def test_presets_are_named_by_their_key(name: str) -> None:
    assert (DETECTOR_PRESETS | REAL_TIME_PRESETS)[name]().preset == name


def test_a_fast_detector_is_chosen_by_its_model_and_its_network() -> None:
    parsed_config, options = parse_detector_arguments(
        [
            "--model",
            "d-fine",
            "--network",
            "/nets/a",
            "--data",
            "/data",
            "--classes",
            "cat",
        ]
    )
    assert (
        parsed_config.model,
        parsed_config.network,
        parsed_config.co_detr.auxiliary,
        options.root[-11:],
    ) == ("d-fine", "/nets/a", ("atss",), "runs/d-fine")
    alone, _ = parse_detector_arguments(
        [
            "--model",
            "rt-detr-v2",
            "--data",
            "/data",
            "--classes",
            "cat",
            "--co-detr.auxiliary",
        ]
    )
    assert (alone.network, alone.co_detr.auxiliary) == ("PekingU/rtdetr_v2_r18vd", ())


def test_what_is_shipped_and_which_network_is_trained_identify_a_training() -> None:
    plain = _config("/data")
    others = [
        replace(plain, ship="heads"),
        replace(plain, model="d-fine", network="a/b"),
        replace(plain, model="d-fine", network="a/c"),
    ]
    prints = {
        build_detector_steps(changed)["train"].fingerprint
        for changed in (plain, *others)
    }
    assert len(prints) == 4
