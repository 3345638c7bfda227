from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as V

import coin_ray
from coin_ray.commands.export import check_added_classes, parse_export
from coin_ray.config.presets import demo
from coin_ray.data.canonical import decode_rgb
from coin_ray.errors import ConfigError, InputError
from coin_ray.export.equality import compare_predictions, require_equal
from coin_ray.export.int8_loss import ModelPair, int8_loss
from coin_ray.models.faster_rcnn_clip.model import ClipDetector, build_detector
from coin_ray.predictors.onnx_student import OnnxStudent
from coin_ray.predictors.student import StudentPredictor
from coin_ray.structures import Detections
from tests.builders import CLASSES, detections, tiny_clip, tiny_detector
from tests.export.conftest import INTENSITY_RANGE, LABELLED, SIZES, Package
from tests.images import noise_image

pytest.importorskip("onnxscript", reason="needs the extra export")
onnx = pytest.importorskip("onnx")
import onnxruntime

from coin_ray.export.graph import OnnxGraph
from coin_ray.export.onnx_model import onnx_model
from coin_ray.export.package import TrainedStudent, write_package
from coin_ray.export.resizing import add_resize

ONNX_FILES = ("model.onnx", "model.int8.onnx")
IMAGE = noise_image(96, 64)


@pytest.fixture(scope="module")
def session(package: Package) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(package.folder / "model.onnx")


@pytest.mark.parametrize("file", ["model.onnx", "model.pt"])
def test_exported_files_detect_what_the_model_detects(
    package: Package, file: str
) -> None:
    comparison = package.measurements.equality[file]
    assert (comparison.images, comparison.unmatched) == (len(SIZES), 0)
    assert comparison.detections > 3 * len(SIZES)


@pytest.mark.parametrize("size", [(96, 64), (300, 120)])
def test_a_batch_gives_each_image_its_own_answer(
    session: onnxruntime.InferenceSession, size: tuple[int, int]
) -> None:
    batch = np.stack([np.asarray(noise_image(*size, seed)) for seed in range(3)])
    names = ("boxes", "scores", "labels", "image", "probs")
    answer = dict(zip(names, session.run(None, {"images": batch}), strict=True))
    assert (np.diff(answer["scores"]) <= 0).all()
    for number, image in enumerate(batch):
        rows = answer["image"] == number
        alone = session.run(None, {"images": image[None]})
        assert len(alone[0]) == rows.sum() > 0
        for name, expected in zip(names[:3], alone, strict=False):
            assert np.allclose(answer[name][rows], expected, atol=1e-3), name


@pytest.mark.parametrize(
    "changes",
    [
        {"roi_samples": 0, "short_side": 700, "long_side": 900, "batch_norm": "live"},
        {"roi_size": 5, "short_side": 600, "long_side": 640, "proposals_test": 120},
    ],
)
@pytest.mark.slow
def test_equal_with_any_way_of_pooling_and_with_live_norms(
    changes: dict[str, Any],
) -> None:
    detector = tiny_detector(**changes).eval()
    exported = OnnxStudent(onnx_model(detector, CLASSES).SerializeToString())
    comparison = compare_predictions(
        StudentPredictor(CLASSES, detector, detector.config),
        exported,
        [noise_image(90, 60), noise_image(64, 64, 1)],
        detector.config.score_min,
    )
    assert comparison.detections > 0
    assert comparison.unmatched == 0


@pytest.mark.parametrize(
    ("source", "target", "off_share"),
    [
        ((300, 200), (256, 171), 0.0),
        ((33, 90), (94, 256), 0.0),
        ((50, 50), (50, 50), 0.0),
        ((640, 480), (60, 45), 2e-4),
        ((1080, 1920), (192, 341), 1e-4),
    ],
)
def test_resizing_equals_pytorch_s(
    source: tuple[int, int], target: tuple[int, int], off_share: float
) -> None:
    """``off_share``: pixels that may be one grey level off, where many source pixels
    are summed."""
    graph = OnnxGraph()
    resized = add_resize(graph, "images", graph.f64(*source), graph.f64(*target))
    float_kind = onnx.TensorProto.FLOAT
    make_info = onnx.helper.make_tensor_value_info
    inputs = [make_info("images", float_kind, [1, 3, *source])]
    outputs_by_tensor = {resized: make_info("resized", float_kind, [1, 3, *target])}
    model = graph.build("resize", inputs, outputs_by_tensor)
    pixels = np.random.default_rng(0).integers(0, 256, (3, *source), np.uint8)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feed = {"images": pixels[None].astype(np.float32)}
    actual = session.run(None, feed)[0][0]
    expected = V.resize(torch.from_numpy(pixels), list(target), antialias=True)
    off = np.abs(actual - expected.numpy())
    assert off.max() <= 1
    assert (off > 0).mean() <= off_share


@pytest.mark.parametrize("file", ONNX_FILES)
def test_no_onnx_file_contains_a_text_encoder(package: Package, file: str) -> None:
    initializers = onnx.load(package.folder / file).graph.initializer
    names = " ".join(weight.name for weight in initializers)
    assert names
    for part in ("token_embedding", "prompts", "transformer"):
        assert part not in names


def test_the_torchscript_file_names_no_device(package: Package) -> None:
    graph = str(torch.jit.load(package.folder / "model.pt").graph)
    assert "aten::arange" in graph
    assert "prim::device" in graph
    assert 'Device = prim::Constant[value="cpu"]' not in graph


@pytest.mark.parametrize("file", ["", "model.json", "model.safetensors", *ONNX_FILES])
def test_the_package_opens_by_its_folder_or_a_file(package: Package, file: str) -> None:
    predictor = coin_ray.load(package.folder / file)
    assert predictor.classes == CLASSES
    assert len(predictor(IMAGE)) > 0


def test_the_package_has_these_files(package: Package) -> None:
    assert {file.name for file in package.folder.iterdir()} == {
        "model.onnx",
        "model.pt",
        "model.safetensors",
        "model.json",
        "detect.py",
        "pixels.py",
        "README.md",
        "model.int8.onnx",
    }


RUN_WITHOUT_PACKAGES = """
import sys, runpy
BLOCKED = ("coin_ray", "torch", "torchvision", "onnx", "ray", "open_clip")
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is not part of the example")
sys.meta_path.insert(0, Block())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize("file", ONNX_FILES)
def test_the_example_runs_both_files_outside_the_package(
    package: Package, tmp_path: Path, file: str
) -> None:
    image = tmp_path / "image.png"
    IMAGE.save(image)
    example = package.folder / "detect.py"
    assert len(example.read_text().splitlines()) <= 35
    arguments = [str(example), file, str(image)]
    if file == "model.onnx":  # the default
        arguments.remove(file)
    process = subprocess.run(
        [sys.executable, "-I", "-c", RUN_WITHOUT_PACKAGES, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    printed = [line[2:22].strip() for line in process.stdout.splitlines()[1:]]
    expected = OnnxStudent((package.folder / file).read_bytes())(IMAGE)
    labels = expected.labels[expected.scores >= 0.3]
    assert printed == [CLASSES[label] for label in labels.tolist()]
    assert printed


@pytest.mark.parametrize("levels", ["levels within the range", "levels far above it"])
def test_the_example_sees_16_bit_images_as_training_did(
    package: Package, tmp_path: Path, levels: str
) -> None:
    """The script runs alone, on a file that lies on its side."""
    scale, offset = (39, 20_000) if levels == "levels within the range" else (1, 60_000)
    values = scale * np.asarray(IMAGE.convert("L")).astype(np.uint16) + offset
    path = tmp_path / "frame.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(values).transpose(Image.Transpose.ROTATE_90)
    stored.save(path, exif=exif)
    script = str(package.folder / "detect.py")
    process = subprocess.run(
        [sys.executable, "-I", "-c", RUN_WITHOUT_PACKAGES, script, str(path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    student = OnnxStudent((package.folder / "model.onnx").read_bytes())
    assert student.intensity_range == INTENSITY_RANGE
    detections = student(decode_rgb(path.read_bytes(), INTENSITY_RANGE))
    assert torch.equal(student(Image.open(path)).boxes, detections.boxes)
    printed = [line[2:28].split() for line in process.stdout.splitlines()[1:]]
    scores = detections.scores[detections.scores >= 0.3]
    assert [float(words[-1]) for words in printed] == pytest.approx(
        scores.tolist(), abs=6e-4
    )
    weights = coin_ray.load(package.folder / "model.json")
    assert weights.intensity_range == INTENSITY_RANGE
    assert len(weights(Image.open(path))) == pytest.approx(len(detections), abs=1)


def test_the_card_names_teachers_figures_and_signature(package: Package) -> None:
    card = (package.folder / "README.md").read_text()
    for part in (
        "traffic light",
        "| student | 45.9 |",
        "| oracle | - |",
        "seed 0",
        "uint8 [B, H, W, 3]",
        "their values 20000 to 30000 became 0 to 255",
        "## Licences",
        "a local server (demo)",
    ):
        assert part in card
    assert "Never trained" not in card


def test_the_reported_loss_of_the_8_bit_file_is_the_measured_loss(
    package: Package,
) -> None:
    exact, int8 = (
        OnnxStudent((package.folder / file).read_bytes()) for file in ONNX_FILES
    )
    loss = int8_loss(ModelPair(exact, int8), package.images, LABELLED, len(CLASSES))
    assert package.measurements.int8 == loss
    assert (loss.images, loss.labelled) == (len(SIZES), len(LABELLED))
    assert loss.found_again is not None
    assert loss.map50 is not None
    assert loss.map50_int8 is not None
    card = (package.folder / "README.md").read_text()
    assert (
        f"Of {loss.detections} detections above .3 in {len(SIZES)} images"
        f" {100 * loss.found_again:.1f} % are found again"
    ) in card
    assert (
        f"mAP50 {100 * loss.map50_int8:.1f} against {100 * loss.map50:.1f}"
        f" ({loss.points:.2f} points lost"
    ) in card


FIRST = detections(((0, 0, 9, 9), 0, 0.9))


def test_a_difference_is_an_error() -> None:
    second = detections(((0, 0, 9, 9), 0, 0.898))
    images = [noise_image(9, 9)]
    comparison = compare_predictions(lambda _: FIRST, lambda _: second, images, 0.05)
    assert comparison.unmatched == 2
    with pytest.raises(InputError, match=r"model\.onnx and the model differ: 2 of 1"):
        require_equal("model.onnx", comparison)


COMPARISONS = [
    (detections(((0, 0, 9, 9), 0, 0.9)), 0, 0),
    (detections(((0, 0, 9, 9), 1, 0.9)), 2, 0),
    (detections(((0, 0, 9, 8), 0, 0.9)), 2, 0),
    (detections(((0, 0, 9, 9), 0, 0.9), ((3, 3, 6, 6), 1, 0.0505)), 0, 1),
    (Detections.empty(3), 1, 0),
]


@pytest.mark.parametrize(("exported", "unmatched", "at_limit"), COMPARISONS)
def test_equal_means_same_label_box_and_score(
    exported: Detections, unmatched: int, at_limit: int
) -> None:
    images = [noise_image(9, 9)]
    comparison = compare_predictions(lambda _: FIRST, lambda _: exported, images, 0.05)
    assert (comparison.unmatched, comparison.at_limit) == (unmatched, at_limit)


def test_added_classes_are_checked_before_anything_runs() -> None:
    arguments = ["demo", "--add-classes", "truck, fire hydrant", "--out", "/x"]
    request = parse_export(arguments)
    assert request.added_classes == ("truck", "fire hydrant")
    assert request.out == "/x"
    for names in (("cat",), ("truck", "Truck"), ("background",)):
        with pytest.raises(ConfigError, match="is a class already"):
            check_added_classes(demo(), names)


@pytest.fixture(scope="module")
def trained() -> ClipDetector:
    return tiny_detector(score_min=0.02).eval()


@pytest.fixture(scope="module")
def with_truck(trained: ClipDetector, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of ``trained`` with a class more and at most three detections, into a
    folder with the 8-bit file of an earlier export."""
    folder = tmp_path_factory.mktemp("with_truck")
    (folder / "model.int8.onnx").write_bytes(b"of another student")
    classes = (*CLASSES, "truck")
    config = replace(trained.config, detections=3)
    detector = build_detector(tiny_clip(), classes, config, seed=5)
    detector.load_state_dict(trained.state_dict())
    student = TrainedStudent(detector, classes, ("truck",), demo(), {})
    images = [IMAGE, noise_image(64, 64, 1)]
    measurements = write_package(student, images, str(folder))
    assert measurements.int8 is None
    comparison = measurements.equality["model.onnx"]
    assert (comparison.detections, comparison.unmatched) == (2 * 3, 0)
    return folder


@pytest.mark.slow
def test_an_export_without_the_8_bit_file_removes_that_of_an_earlier_one(
    with_truck: Path,
) -> None:
    assert not (with_truck / "model.int8.onnx").exists()
    assert "model.int8.onnx" not in (with_truck / "README.md").read_text()


def _ratios(probs: torch.Tensor) -> torch.Tensor:
    """Return the ratio of the first two classes' probabilities."""
    return probs[:, 0] / probs[:, 1]


@pytest.mark.slow
def test_a_class_added_by_text_keeps_the_ratio_of_the_others_probabilities(
    trained: ClipDetector, with_truck: Path
) -> None:
    student = OnnxStudent((with_truck / "model.onnx").read_bytes())
    assert student.classes == (*CLASSES, "truck")
    probs = student(IMAGE).probs
    assert float(probs[:, 3].max()) > 0
    original = StudentPredictor(CLASSES, trained, trained.config)(IMAGE)
    original_ratios = _ratios(original.probs)
    assert len(probs) == 3
    for ratio in _ratios(probs):
        assert bool(torch.isclose(original_ratios, ratio, rtol=1e-3).any())
    assert "Never trained:** truck" in (with_truck / "README.md").read_text()
