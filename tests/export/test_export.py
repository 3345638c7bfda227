from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms.v2 import functional as V

from coin_ray.commands.export import check_added_classes, parse_export
from coin_ray.config.presets import demo
from coin_ray.errors import ConfigError, InputError
from coin_ray.export import equality
from coin_ray.export.int8_loss import ModelPair, int8_loss
from coin_ray.predictors.onnx_student import OnnxStudent
from coin_ray.predictors.student import StudentPredictor, load_exported_student
from coin_ray.structures import Detections
from coin_ray.tables import Truth
from tests.builders import CLASSES, detections, tiny_detector
from tests.export.pictures import picture

pytest.importorskip("onnxscript", reason="needs the extra export")
onnx = pytest.importorskip("onnx")
import onnxruntime

from coin_ray.export.graph import Graph
from coin_ray.export.onnx_model import onnx_model
from coin_ray.export.package import (
    Int8Images,
    ExportMeasurements,
    TrainedStudent,
    write_package,
)
from coin_ray.export.resizing import resize

SIZES = ((96, 64), (64, 80), (72, 72), (300, 120), (9, 8), (50, 400), (1, 1))
SUMMARY = {
    "images": {"train": 500, "test": 300},
    "map50": {"cloud": 0.387, "student": 0.459, "oracle": None},
}


WHERE = torch.tensor([[10.0, 10.0, 60.0, 50.0]])
LABELLED = [
    (picture(96, 64, seed), Truth(WHERE, torch.tensor([seed]), torch.tensor([False])))
    for seed in range(3)
]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ExportMeasurements]:
    folder = tmp_path_factory.mktemp("package")
    student = TrainedStudent(tiny_detector(score_min=0.02), CLASSES, (), demo(), SUMMARY)
    training = (picture(96, 64, seed) for seed in range(20, 28))
    return folder, write_package(
        student,
        [picture(*size, seed) for seed, size in enumerate(SIZES)],
        str(folder),
        Int8Images(training, LABELLED),
    )


@pytest.fixture(scope="module")
def session(package: tuple[Path, ExportMeasurements]) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(package[0] / "model.onnx")


@pytest.mark.parametrize("file", ["model.onnx", "model.pt"])
def test_exported_files_find_what_the_model_finds(
    package: tuple[Path, ExportMeasurements], file: str
) -> None:
    found = package[1].equality[file]
    assert (found.images, found.unmatched) == (len(SIZES), 0)
    assert found.detections > 3 * len(SIZES)


@pytest.mark.parametrize("size", [(96, 64), (300, 120)])
def test_a_batch_gives_each_image_its_own_answer(
    session: onnxruntime.InferenceSession, size: tuple[int, int]
) -> None:
    batch = np.stack([np.asarray(picture(*size, seed)) for seed in range(3)])
    together = dict(
        zip(
            ("boxes", "scores", "labels", "image", "probs"),
            session.run(None, {"images": batch}),
            strict=True,
        )
    )
    assert (np.diff(together["scores"]) <= 0).all()
    for number, image in enumerate(batch):
        mine = together["image"] == number
        alone = session.run(None, {"images": image[None]})
        assert len(alone[0]) == mine.sum() > 0
        for name, value in zip(("boxes", "scores", "labels"), alone, strict=False):
            assert np.allclose(together[name][mine], value, atol=1e-3), name


@pytest.mark.parametrize(
    "changes",
    [
        {"roi_samples": 0, "short_side": 700, "long_side": 900, "batch_norm": "live"},
        {"roi_size": 5, "short_side": 600, "long_side": 640, "proposals_test": 120},
        {"detections": 3, "score_min": 0.01},
    ],
)
def test_equal_with_any_way_of_pooling_with_live_norms_and_with_few_detections(
    changes: dict[str, Any],
) -> None:
    detector = tiny_detector(**changes).eval()
    exported = OnnxStudent(onnx_model(detector, CLASSES).SerializeToString())
    found = equality.compare(
        StudentPredictor(CLASSES, detector, detector.config),
        exported,
        [picture(90, 60), picture(64, 64, 1)],
        detector.config.score_min,
    )
    assert found.detections > 0
    assert found.unmatched == 0


@pytest.mark.parametrize(
    ("own", "view", "others"),
    [
        ((300, 200), (256, 171), 0.0),
        ((33, 90), (94, 256), 0.0),
        ((50, 50), (50, 50), 0.0),
        ((640, 480), (60, 45), 2e-4),
        ((1080, 1920), (192, 341), 1e-4),
    ],
)
def test_resizing_equals_pytorch_s(
    own: tuple[int, int], view: tuple[int, int], others: float
) -> None:
    """``others``: share of pixels that may be one grey level off, where many old pixels
    are summed."""
    graph = Graph()
    out = resize(graph, "images", graph.f64(*own), graph.f64(*view))
    kind = onnx.TensorProto.FLOAT
    inputs = [onnx.helper.make_tensor_value_info("images", kind, [1, 3, *own])]
    model = graph.model(
        "resize",
        inputs,
        {out: onnx.helper.make_tensor_value_info("view", kind, [1, 3, *view])},
    )
    image = torch.from_numpy(
        np.random.default_rng(0).integers(0, 256, (3, *own), np.uint8)
    )
    given = {"images": image[None].numpy().astype(np.float32)}
    resized = onnxruntime.InferenceSession(model.SerializeToString()).run(None, given)[
        0
    ][0]
    off = np.abs(resized - V.resize(image, list(view), antialias=True).numpy())
    assert off.max() <= 1
    assert (off > 0).mean() <= others


def test_no_file_holds_a_text_encoder_and_weights_load(
    package: tuple[Path, ExportMeasurements],
) -> None:
    folder = package[0]
    for file in ("model.onnx", "model.int8.onnx"):
        names = {i.name for i in onnx.load(folder / file).graph.initializer}
        assert names
        assert not [
            n
            for n in names
            if "token_embedding" in n or "prompts" in n or "transformer" in n
        ]
    assert load_exported_student(str(folder)).classes == CLASSES
    assert {f.name for f in folder.iterdir()} == {
        "model.onnx",
        "model.pt",
        "model.safetensors",
        "model.json",
        "detect.py",
        "README.md",
        "model.int8.onnx",
    }


BLOCKED = """
import sys, runpy
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("coin_ray", "torch", "torchvision", "onnx", "ray", "open_clip"):
            raise ImportError(f"{name} is not part of the example")
sys.meta_path.insert(0, Block())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("file", ["model.onnx", "model.int8.onnx"])
def test_the_example_runs_both_files_outside_the_package(
    package: tuple[Path, ExportMeasurements], tmp_path: Path, file: str
) -> None:
    image = tmp_path / "image.png"
    picture(96, 64).save(image)
    example = package[0] / "detect.py"
    assert len(example.read_text().splitlines()) <= 30
    command = [
        sys.executable,
        "-I",
        "-c",
        BLOCKED,
        str(example),
        *([] if file == "model.onnx" else [file]),
        str(image),
    ]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    printed = result.stdout.splitlines()[1:]
    expected = OnnxStudent((package[0] / file).read_bytes())(picture(96, 64))
    shown = [
        CLASSES[int(k)]
        for k, s in zip(expected.labels, expected.scores, strict=True)
        if s >= 0.3
    ]
    assert [line[2:22].strip() for line in printed] == shown
    assert shown


def test_the_card_says_who_taught_what_was_measured_and_the_signature(
    package: tuple[Path, ExportMeasurements],
) -> None:
    card = (package[0] / "README.md").read_text()
    for part in (
        "traffic light",
        "| student | 45.9 |",
        "| oracle | - |",
        "seed 0",
        "uint8 [B, H, W, 3]",
        "## Licences",
        "a local server (demo)",
    ):
        assert part in card
    assert "Never trained" not in card


def test_the_loss_reported_of_the_8_bit_file_is_the_loss_measured(
    package: tuple[Path, ExportMeasurements],
) -> None:
    folder, measured = package
    pair = ModelPair(
        *(
            OnnxStudent((folder / file).read_bytes())
            for file in ("model.onnx", "model.int8.onnx")
        )
    )
    again = int8_loss(
        pair,
        [picture(*size, seed) for seed, size in enumerate(SIZES)],
        LABELLED,
        len(CLASSES),
    )
    assert measured.int8 == again
    assert (again.images, again.labelled) == (len(SIZES), len(LABELLED))
    card = (folder / "README.md").read_text()
    assert (
        f"Of {again.detections} detections above .3 in {len(SIZES)} images"
        f" {100 * again.found_again:.1f} % are found again" in card
    )
    assert (
        f"mAP50 {100 * again.map50_int8:.1f} against {100 * again.map50:.1f}"
        f" ({again.points:.2f} points lost" in card
    )


def test_an_export_without_the_8_bit_file_leaves_none_of_an_earlier_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "model.int8.onnx").write_bytes(b"of another student")
    student = TrainedStudent(tiny_detector(), CLASSES, (), demo(), SUMMARY)
    assert write_package(student, [picture(96, 64)], str(tmp_path)).int8 is None
    assert not (tmp_path / "model.int8.onnx").exists()
    assert "model.int8.onnx" not in (tmp_path / "README.md").read_text()


def test_a_difference_is_an_error() -> None:
    ours, theirs = (
        detections(((0, 0, 9, 9), 0, 0.9)),
        detections(((0, 0, 9, 9), 0, 0.898)),
    )
    found = equality.compare(lambda _: ours, lambda _: theirs, [picture(9, 9)], 0.05)
    assert found.unmatched == 2
    with pytest.raises(InputError, match=r"model\.onnx and the model differ: 2 of 1"):
        equality.require("model.onnx", found)


CASES = [
    (detections(((0, 0, 9, 9), 0, 0.9)), 0, 0),
    (detections(((0, 0, 9, 9), 1, 0.9)), 2, 0),
    (detections(((0, 0, 9, 8), 0, 0.9)), 2, 0),
    (detections(((0, 0, 9, 9), 0, 0.9), ((3, 3, 6, 6), 1, 0.0505)), 0, 1),
    (Detections.empty(3), 1, 0),
]


@pytest.mark.parametrize(("theirs", "unmatched", "at_limit"), CASES)
def test_what_counts_as_equal(
    theirs: Detections, unmatched: int, at_limit: int
) -> None:
    ours = detections(((0, 0, 9, 9), 0, 0.9))
    found = equality.compare(lambda _: ours, lambda _: theirs, [picture(9, 9)], 0.05)
    assert (found.unmatched, found.at_limit) == (unmatched, at_limit)


def test_new_names_are_checked_before_anything_runs() -> None:
    asked = parse_export(["demo", "--add-classes", "truck, fire hydrant", "--out", "/x"])
    assert (asked.added_classes, asked.out) == (("truck", "fire hydrant"), "/x")
    for names in (("cat",), ("truck", "Truck"), ("background",)):
        with pytest.raises(ConfigError, match="is a class already"):
            check_added_classes(demo(), names)


def test_a_name_added_by_text_leaves_the_others_boxes_and_shares_their_probability(
    tmp_path: Path,
) -> None:
    from coin_ray.models.faster_rcnn_clip.model import build_detector
    from tests.builders import tiny_clip

    known = tiny_detector(score_min=0.02)
    more = build_detector(tiny_clip(), (*CLASSES, "truck"), known.config, seed=5)
    more.load_state_dict(known.state_dict())
    write_package(
        TrainedStudent(more, (*CLASSES, "truck"), ("truck",), demo(), {}),
        [picture(96, 64)],
        str(tmp_path),
    )
    student = OnnxStudent((tmp_path / "model.onnx").read_bytes())
    assert student.classes == (*CLASSES, "truck")
    probs, before = (
        student.predict(picture(96, 64)).probs,
        StudentPredictor(CLASSES, known.eval(), known.config)(picture(96, 64)).probs,
    )
    assert float(probs[:, 3].max()) > 0
    ratio = lambda p: p[:, 0] / p[:, 1]  # noqa: E731
    assert all(
        bool(torch.isclose(ratio(before), value, rtol=1e-3).any())
        for value in ratio(probs)[:5]
    )
    assert "Never trained:** truck" in (tmp_path / "README.md").read_text()
