"""People's labels of training images: what is read of them, what is refused, and that
they replace every teacher's."""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
from builders import detections
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from coin_ray import storage, tables
from coin_ray.config import Labels, PipelineConfig
from coin_ray.config.presets import PRESETS
from coin_ray.data.examples import iterate_batches
from coin_ray.data.formats import Annotation, ImageRecord, write_dataset
from coin_ray.data.order import BatchOrder
from coin_ray.data.review import cvat, fiftyone, label_studio
from coin_ray.data.review.corrections import reviews_digest
from coin_ray.data.review.reviews import Review, ReviewedBox
from coin_ray.errors import InputError
from coin_ray.runs.graph import build_steps
from coin_ray.runs.steps import Context
from coin_ray.stages import corrections, separate
from coin_ray.stages.common.teacher_outputs import (
    TEACHER_OUTPUTS,
    fuse_teacher_labels,
    make_teacher_lookup,
    open_collected,
    open_corrections,
)
from coin_ray.stages.common.training_labels import (
    add_corrections,
    build_training_examples,
    open_training_labels,
)
from coin_ray.stages.reporting.teacher_mistakes import count_teacher_mistakes
from coin_ray.structures import Detections
from coin_ray.tables import Provenance, detections_row, detections_table

CLASSES = ("cat", "traffic light", "bird")
BOX, OTHER = (4.0, 4.0, 30.0, 28.0), (34.0, 8.0, 58.0, 34.0)
SPLITS = {
    "both": "train",
    "none": "train",
    "failed": "train",
    "free": "train",
    "held": "test",
}
PERSON = {
    "both": [ReviewedBox(OTHER, "Traffic-Lights")],
    "none": [],
    "failed": [ReviewedBox(BOX, "cat"), ReviewedBox(OTHER, "bird")],
}
LABELS = {"both": [1], "none": [], "failed": [0, 2]}


def _picture(folder: Path, name: str) -> Path:
    path = folder / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 48), tuple(hashlib.sha256(name.encode()).digest()[:3])).save(
        path
    )
    return path


def _image_id(folder: Path, name: str) -> str:
    return hashlib.sha256(_picture(folder / "in", name).read_bytes()).hexdigest()


def _review(
    folder: Path, name: str, boxes: list[ReviewedBox], **changes: Any
) -> Review:
    corrected_review = Review(
        _image_id(folder, name),
        str(folder / "in" / f"{name}.png"),
        f"{name}.png",
        64,
        48,
        tuple(boxes),
        reviewed=True,
    )
    return replace(corrected_review, **changes)


def _context(folder: Path, source: str, **changes: Any) -> Context:
    labels = Labels(score_min=0.3, probabilities="background", clip_background="keep")
    config: PipelineConfig = replace(
        PRESETS["demo"](),
        classes=CLASSES,
        labels=labels,
        corrections=(source,),
        **changes,
    )
    rows = [
        {
            "image_id": _image_id(folder, i),
            "uri": str(folder / "in" / f"{i}.png"),
            "width": 64,
            "height": 48,
            "split": s,
        }
        for i, s in SPLITS.items()
    ]
    storage.write_table(
        str(folder / "images.parquet"), pa.Table.from_pylist(rows, schema=tables.IMAGES)
    )
    inputs = dict.fromkeys(("images", "collect", "propagate"), str(folder)) | {
        "corrections": str(folder / "corrections")
    }
    return Context(
        config, str(folder), str(folder / "corrections"), inputs, {}, "corrections"
    )


def _label_studio_file(reviews: list[Review], folder: Path) -> str:
    label_studio.write_label_studio(reviews, str(folder), CLASSES)
    return str(folder / "tasks.json")


def _cvat_file(reviews: list[Review], folder: Path) -> str:
    cvat.write_cvat(reviews, str(folder), CLASSES)
    return str(folder / "annotations.xml")


def _fiftyone_folder(reviews: list[Review], folder: Path) -> str:
    fiftyone.write_fiftyone(reviews, str(folder))
    return str(folder)


def _data_set(reviews: list[Review], folder: Path) -> str:
    write_dataset([r.image_record() for r in reviews], str(folder), "voc", split="done")
    return f"{folder}#done"


FORMS = {
    "label studio": _label_studio_file,
    "cvat": _cvat_file,
    "fiftyone": _fiftyone_folder,
    "voc": _data_set,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_certain_labels(form: str, tmp_path: Path) -> None:
    source = FORMS[form](
        [_review(tmp_path, name, boxes) for name, boxes in PERSON.items()],
        tmp_path / "out",
    )
    step = _context(tmp_path, source)
    assert corrections.run(step) == {"images": 3, "boxes": 3, "empty": 1}
    corrected = open_corrections(step.inputs, step.config)
    for name, labels in LABELS.items():
        detections = corrected[_image_id(tmp_path, name)]
        assert detections.labels.tolist() == labels
        assert torch.allclose(
            detections.boxes,
            torch.tensor([b.edges for b in PERSON[name]]).reshape(-1, 4),
            atol=1e-4,
        )
        assert torch.equal(
            detections.probs, torch.nn.functional.one_hot(detections.labels, 4).float()
        )
        assert detections.scores.tolist() == [1] * len(labels)


def test_images_that_no_one_has_reviewed_are_left_to_the_teachers(
    tmp_path: Path,
) -> None:
    reviews = [
        _review(tmp_path, "both", [ReviewedBox(BOX, "cat")]),
        _review(tmp_path, "free", [ReviewedBox(BOX, "cat")], reviewed=False),
    ]
    step = _context(tmp_path, _cvat_file(reviews, tmp_path / "out"))
    assert corrections.run(step)["images"] == 1
    assert list(open_corrections(step.inputs, step.config)) == [
        _image_id(tmp_path, "both")
    ]


def test_boxes_are_cut_at_the_border_and_difficult_ones_of_a_folder_are_left_out(
    tmp_path: Path,
) -> None:
    boxes = [
        Annotation((-0.5, 0, 64.8, 48.2), "cat"),
        Annotation(BOX, "bird", difficult=True),
    ]
    write_dataset(
        [
            ImageRecord.from_annotations(
                "both.png", str(_picture(tmp_path / "in", "both")), (64, 48), boxes
            )
        ],
        str(tmp_path / "voc"),
        "voc",
    )
    step = _context(tmp_path, str(tmp_path / "voc"))
    corrections.run(step)
    [detections] = open_corrections(step.inputs, step.config).values()
    assert detections.boxes.tolist() == [[0, 0, 64, 48]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"image_id": "0" * 64},
            r"both\.png is no image of this run: expected one of its training images",
        ),
        (
            {"boxes": (ReviewedBox(BOX, "dog"),)},
            "both.png has a 'dog', which is no class of this run",
        ),
        (
            {"boxes": (ReviewedBox((4.0, 4.0, 70.0, 28.0), "cat"),)},
            (
                r"the box cat \[4\.0, 4\.0, 70\.0, 28\.0\] is not inside the image of"
                r" 64 x 48"
            ),
        ),
        (
            {"boxes": (ReviewedBox((-4, 4, 6, 28), "cat"),)},
            "is not inside the image of 64 x 48",
        ),
        ({"boxes": (ReviewedBox((4, 4, 4, 28), "cat"),)}, "has no area"),
        ({"boxes": (ReviewedBox((-2, 4, 0, 28), "cat"),)}, "has no area"),
        ({"problems": ("a polygon",)}, "both.png: a polygon; 1 of 1 reviewed images"),
        ({"width": 63}, "both.png is 64 x 48, its corrections are for 63 x 48"),
        ({"reviewed": False}, "no image in it is marked as reviewed"),
    ],
)
def test_bad_corrections_are_an_error_that_names_the_image(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    review = replace(_review(tmp_path, "both", [ReviewedBox(BOX, "cat")]), **changes)
    file = _label_studio_file([review], tmp_path / "out")
    step = _context(tmp_path, file)
    monkeypatch.setattr(corrections.corrections, "read_reviews", lambda _: [review])
    with pytest.raises(InputError, match=f"corrections .*tasks.json: .*{message}"):
        corrections.run(step)
    assert not (tmp_path / "corrections").exists()


FULL = (0.0, 0.0, 64.0, 48.0)


@pytest.mark.parametrize(
    ("boxes", "edges", "message"),
    [
        ([(-2, -1.5, 66, 50)], [FULL], "was cut at the border"),
        ([(-0.5, 0, 64.9, 48)], [FULL], ""),
        ([(30, 28, 4, 4)], [BOX], "had its edges the other way round"),
        ([BOX, BOX], [BOX], "is there twice and counts once"),
        ([BOX, OTHER], [BOX, OTHER], ""),
    ],
)
def test_boxes_are_put_right_and_that_is_printed(
    boxes: list[tuple[float, float, float, float]],
    edges: list[tuple[float, ...]],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    review = _review(tmp_path, "both", [ReviewedBox(box, "cat") for box in boxes])
    step = _context(tmp_path, _cvat_file([review], tmp_path / "out"))
    metrics = corrections.run(step)
    assert metrics == {"images": 1, "boxes": len(edges), "empty": 0}
    [corrected] = open_corrections(step.inputs, step.config).values()
    assert [tuple(box) for box in corrected.boxes.tolist()] == edges
    assert message in capsys.readouterr().out


@pytest.mark.parametrize(
    ("box", "message"),
    [
        (ReviewedBox((4, 4, 4, 28), "cat"), "has no area"),
        (ReviewedBox((4, 4, 90, 28), "cat"), "is not inside the image of 64 x 48"),
        (ReviewedBox(BOX, "dog"), "has a 'dog', which is no class"),
        (ReviewedBox((float("nan"), 4, 9, 28), "cat"), "not a finite number"),
    ],
)
def test_an_odd_region_costs_its_image_and_no_other(
    box: ReviewedBox,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The image is not taken for an empty one: the teachers' labels hold there."""
    reviews = [_review(tmp_path, "both", [ReviewedBox(BOX, "cat"), box])]
    reviews.append(_review(tmp_path, "none", []))
    monkeypatch.setattr(corrections.corrections, "read_reviews", lambda _: reviews)
    step = _context(tmp_path, "export.json")
    assert corrections.run(step) == {
        "images": 1,
        "boxes": 0,
        "empty": 1,
        "left_out": 1,
    }
    assert list(open_corrections(step.inputs, step.config)) == [
        _image_id(tmp_path, "none")
    ]
    printed = capsys.readouterr().out
    assert "1 of 2 reviewed images are left out" in printed
    assert "both.png" in printed
    assert message in printed


def test_an_image_id_and_a_uri_of_two_images_are_an_error(tmp_path: Path) -> None:
    """Somebody has exchanged them: the boxes may be those of either."""
    review = _review(tmp_path, "both", [ReviewedBox(BOX, "cat")])
    review = replace(review, image_id=_image_id(tmp_path, "none"))
    step = _context(tmp_path, _label_studio_file([review], tmp_path / "out"))
    message = r"both\.png has the image_id of another image than its uri .*both\.png"
    with pytest.raises(InputError, match=message):
        corrections.run(step)


def test_later_rounds_are_further_files(tmp_path: Path) -> None:
    step = _context(
        tmp_path,
        _cvat_file(
            [_review(tmp_path, "both", [ReviewedBox(BOX, "cat")])], tmp_path / "one"
        ),
    )
    second = _label_studio_file([_review(tmp_path, "none", [])], tmp_path / "two")
    step = replace(
        step,
        config=replace(step.config, corrections=(*step.config.corrections, second)),
    )
    assert corrections.run(step) == {"images": 2, "boxes": 1, "empty": 1}
    twice = replace(step, config=replace(step.config, corrections=(second, second)))
    with pytest.raises(
        InputError, match=r"tasks\.json, .*tasks\.json: none\.png is in it twice"
    ):
        corrections.run(twice)


def test_all_faults_are_reported_at_once_up_to_a_few(tmp_path: Path) -> None:
    reviews = [
        _review(tmp_path, "held", []),
        _review(tmp_path, "both", []),
        _review(tmp_path, "both", []),
    ]
    reviews.append(
        _review(tmp_path, "none", [ReviewedBox(BOX, f"x{n}") for n in range(9)])
    )
    with pytest.raises(
        InputError,
        match=(
            r"held\.png is a test image .*; both\.png is in it twice; .*'x2'.*; and 6"
            r" more$"
        ),
    ):
        corrections.run(
            _context(tmp_path, _label_studio_file(reviews, tmp_path / "out"))
        )


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere.json", "no such folder"), ("nowhere", "no such folder")],
)
def test_corrections_that_are_not_there_are_an_error(
    path: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        corrections.run(_context(tmp_path, str(tmp_path / path)))


# A person's labels replace every teacher's

random_box = st.tuples(
    st.integers(0, 30), st.integers(0, 20), st.integers(31, 64), st.integers(21, 48)
)
random_row = st.tuples(random_box, st.integers(0, 2), st.floats(0.05, 1))
random_detections = st.lists(random_row, max_size=4).map(lambda rows: detections(*rows))


def _write_teacher_tables(
    folder: Path,
    cloud: Detections,
    labelled: Detections,
    clip: Detections | None = None,
) -> None:
    """``labelled``: row by row the cloud's boxes; ``clip``: the CLIP detector's
    results, the same if not given."""
    for name, in_image in (
        ("cloud", cloud),
        ("clip_labels", labelled),
        ("clip_detector", labelled if clip is None else clip),
    ):
        rows = [
            detections_row(_image_id(folder, i), in_image, Provenance(name))
            for i in SPLITS
            if i != "failed"
        ]
        rows.append(
            detections_row(
                _image_id(folder, "failed"),
                Detections.empty(3),
                Provenance(name, "error"),
            )
        )
        storage.write_table(str(folder / f"{name}.parquet"), detections_table(rows))


@pytest.fixture(scope="module")
def reviewed(tmp_path_factory: pytest.TempPathFactory) -> Context:
    folder = tmp_path_factory.mktemp("run")
    reviews = [_review(folder, name, boxes) for name, boxes in PERSON.items()]
    step = _context(folder, _cvat_file(reviews, folder / "out"))
    corrections.run(step)
    return step


@settings(max_examples=8, deadline=None)
@given(
    cloud=random_detections,
    labeler=st.sampled_from(["crop", "none"]),
    source=st.sampled_from(["clip", "cloud"]),
)
def test_propagation_learns_what_people_say(
    reviewed: Context, cloud: Detections, labeler: str, source: Any
) -> None:
    """Reviewed labels replace a failed cloud answer too; the other images keep theirs."""
    folder, config = Path(reviewed.root), reviewed.config
    _write_teacher_tables(folder, cloud, cloud)
    config = replace(config, collect=replace(config.collect, labeler=labeler))
    examples = build_training_examples(
        str(folder), open_training_labels(source, reviewed.inputs, config)
    )
    examples = pickle.loads(pickle.dumps(examples))
    assert [Path(e.uri).stem for e in examples] == ["both", "none", "failed", "free"]
    person = open_corrections(reviewed.inputs, config)
    for e in examples:
        labels = e.detections["labels"]
        assert e.reviewed == (e.image_id in person)
        if e.reviewed:
            assert torch.equal(labels.boxes, person[e.image_id].boxes)
            assert torch.equal(labels.probs, person[e.image_id].probs)
        else:
            assert len(labels) == int((cloud.scores >= 0.3).sum())


@settings(max_examples=8, deadline=None)
@given(cloud=random_detections, clip=random_detections)
def test_distillation_gets_what_people_say_from_all_teachers(
    reviewed: Context, cloud: Detections, clip: Detections
) -> None:
    folder, config = Path(reviewed.root), reviewed.config
    _write_teacher_tables(folder, cloud, cloud, clip)
    answered = open_collected(str(folder), "cloud", config)
    look_up = make_teacher_lookup(
        answered,
        tables.open_detections(str(folder / "clip_detector.parquet"), 3),
        str(folder),
        config,
    )
    person = open_corrections(reviewed.inputs, config)
    examples = build_training_examples(
        str(folder), add_corrections(answered.ids, look_up, TEACHER_OUTPUTS, person)
    )
    assert [e.reviewed for e in examples] == [True, True, True, False]
    for e in list(examples)[:3]:
        assert set(e.detections) == set(TEACHER_OUTPUTS)
        assert all(
            torch.equal(detections.boxes, person[e.image_id].boxes)
            for detections in e.detections.values()
        )


@pytest.mark.parametrize("labeler", ["crop", "none"])
def test_students_are_judged_by_what_people_say_else_by_both_teachers(
    reviewed: Context, labeler: str
) -> None:
    """CLIP names the cloud's box otherwise, so that both are less sure together;
    without CLIP the cloud's word stands."""
    cloud, clip = detections((BOX, 2, 0.9)), detections((BOX, 1, 0.9))
    _write_teacher_tables(Path(reviewed.root), cloud, clip)
    config = replace(
        reviewed.config, collect=replace(reviewed.config.collect, labeler=labeler)
    )
    ids = {name: _image_id(Path(reviewed.root), name) for name in SPLITS}
    fused = fuse_teacher_labels(ids.values(), reviewed.inputs, config)
    answered = set(open_collected(reviewed.root, "cloud", config))
    assert set(fused) == {
        i for name, i in ids.items() if name in PERSON or i in answered
    }
    for name, labels in LABELS.items():
        assert fused[ids[name]].labels.tolist() == labels
        assert fused[ids[name]].scores.tolist() == [1] * len(labels)
    free = fused[ids["free"]]
    assert torch.equal(free.boxes, cloud.boxes)
    assert free.labels.tolist() == [2] or labeler == "crop"
    assert (
        float(free.scores) == pytest.approx(0.9)
        if labeler == "none"
        else float(free.scores) < 0.6
    )


def test_a_batch_knows_which_of_its_images_are_reviewed(reviewed: Context) -> None:
    folder, config = Path(reviewed.root), reviewed.config
    _write_teacher_tables(folder, detections((BOX, 2, 0.9)), detections((BOX, 2, 0.9)))
    examples = build_training_examples(
        str(folder), open_training_labels("clip", reviewed.inputs, config)
    )
    (batch,) = iterate_batches(
        examples,
        replace(config.distill.fit, steps=1, batch=4),
        config.detector,
        seed=0,
        first=0,
        rank=0,
        workers=1,
    )
    assert batch.reviewed == [
        examples[row].reviewed for row in BatchOrder(4, 4, 0, None).rows_of_step(0)
    ]
    assert sorted(batch.reviewed) == [False, True, True, True]


def test_separation_keeps_people_s_boxes_as_a_kind_of_their_own(
    reviewed: Context, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = Path(reviewed.root)
    _write_teacher_tables(folder, detections((BOX, 2, 0.9)), detections((BOX, 2, 0.9)))
    monkeypatch.setattr(
        separate,
        "write_predictions",
        lambda *arguments: shutil.copy(folder / "clip_detector.parquet", arguments[-1]),
    )
    step = replace(reviewed, folder=str(tmp_path), name="separate")
    assert separate.run(step) == {
        "separation": {"consistent": 1, "inconsistent": 0, "private": 0}
    }
    rows = {
        r["image_id"]: r
        for r in storage.read_table(str(tmp_path / "separation.parquet")).to_pylist()
    }
    assert {
        name: rows[_image_id(folder, name)]["kind"] for name in SPLITS if name != "held"
    } == {
        "both": ["reviewed"],
        "none": [],
        "failed": ["reviewed", "reviewed"],
        "free": ["consistent"],
    }
    assert (
        rows[_image_id(folder, "both")]["cloud_probs"]
        == rows[_image_id(folder, "both")]["clip_probs"]
        == [[0, 1, 0, 0]]
    )


# Steps that run again

LATER = {
    "corrections",
    "propagate",
    "separate",
    "distill",
    "pseudo_label",
    "evaluate",
    "export",
    "report",
}


def _fingerprints(*places: str) -> dict[str, str]:
    return {
        name: step.fingerprint
        for name, step in build_steps(
            replace(PRESETS["demo"](), corrections=places), baselines=True
        ).items()
    }


def test_other_corrections_ask_nothing_again_but_train_again(tmp_path: Path) -> None:
    """The content counts: neither the folder nor the name of the file matters. The oracle
    and the cloud calls never depend on corrections."""
    (tmp_path / "a.json").write_text("[]")
    (tmp_path / "b.json").write_text("[]")
    (tmp_path / "c.json").write_text("[1]")
    none, first, same, other = (
        _fingerprints(*places)
        for places in ((), *((str(tmp_path / f"{n}.json"),) for n in "abc"))
    )
    assert first == same
    assert set(first) - set(none) == {"corrections"}
    assert (
        {n for n in first if first[n] != none.get(n)}
        == {n for n in first if first[n] != other[n]}
        == LATER
    )
    assert list(first)[:3] == [
        "images",
        "corrections",
        "collect",
    ], "checked before a call is paid"


def test_the_content_of_a_folder_is_its_labels_and_the_sizes_of_its_images(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "voc"
    write_dataset(
        [
            ImageRecord.from_annotations(
                "a.png",
                str(_picture(tmp_path, "a")),
                (64, 48),
                [Annotation(BOX, "cat")],
            )
        ],
        str(folder),
        "voc",
        split="done",
    )
    before = reviews_digest(str(folder))
    assert before != reviews_digest(f"{folder}#done")
    label = folder / "Annotations" / "a.xml"
    label.write_text(label.read_text().replace("cat", "dog"))
    changed = reviews_digest(str(folder))
    (folder / "JPEGImages" / "a.png").write_bytes(b"x")
    assert len({before, changed, reviews_digest(str(folder))}) == 3
    assert (
        reviews_digest(str(tmp_path / "nowhere"))
        == reviews_digest(str(tmp_path / "nowhere.json"))
        == ""
    )


def test_the_files_that_tools_write_are_json(tmp_path: Path) -> None:
    reviews = [
        _review(tmp_path, "both", [ReviewedBox(BOX, "cat", "private", "cat 0.50")])
    ]
    assert (
        json.loads(
            (tmp_path / "in")
            .joinpath(_label_studio_file(reviews, tmp_path / "ls"))
            .read_text()
        )[0]["data"]["private"]
        == 1
    )
    assert (
        json.loads(
            (
                Path(_fiftyone_folder(reviews, tmp_path / "fo")) / "samples.json"
            ).read_text()
        )["samples"][0]["private"]
        == 1
    )


def test_the_report_counts_what_each_teacher_would_have_taught_there(
    reviewed: Context,
) -> None:
    """The three reviewed images: one with OTHER as class 1, an empty one, and one that
    the cloud did not answer (classes 0 and 2)."""
    folder = Path(reviewed.root)
    cloud = detections((OTHER, 1, 0.9), (BOX, 1, 0.8), (BOX, 2, 0.1))
    _write_teacher_tables(
        folder, cloud, detections((OTHER, 0, 0.9), (BOX, 0, 0.8), (BOX, 0, 0.9))
    )
    step = replace(reviewed, inputs=dict(reviewed.inputs) | {"separate": str(folder)})
    assert count_teacher_mistakes(step) == {
        "images": 3,
        "boxes": 3,
        "empty": 1,
        "teachers": {
            "cloud": {"boxes": 4, "wrong": 3, "missed": 2, "images": 3},
            "clip_labels": {"boxes": 4, "wrong": 4, "missed": 3, "images": 3},
            "clip_detector": {"boxes": 6, "wrong": 6, "missed": 3, "images": 3},
        },
    }
    assert (
        count_teacher_mistakes(
            replace(
                step,
                inputs={k: v for k, v in step.inputs.items() if k != "corrections"},
            )
        )
        == {}
    )
