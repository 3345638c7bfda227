from __future__ import annotations

import json
import re
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from coin_ray import storage
from coin_ray.class_names import normalize_class_name
from coin_ray.cloud.journal.base import AnswerRecord
from coin_ray.cloud.journal.opening import open_journal
from coin_ray.cloud.label_map import load_label_map
from coin_ray.cloud.label_proposal import GUESS_MARK, propose_label_map
from coin_ray.cloud.observed_names import (
    ObservedName,
    ObservedNames,
    count_observed_names,
)
from coin_ray.commands.journal import open_run_journal
from coin_ray.commands.main import main
from coin_ray.config import Clip
from coin_ray.config.presets import folder
from coin_ray.config.yaml_files import to_yaml
from coin_ray.errors import InputError

COLLECT = Path(__file__).parents[2] / "pipelines" / "collect.py"
CLASSES = ["car", "person"]


def _fill(root: str, *bodies: object) -> None:
    journal = open_journal(storage.join(root, "journal"))
    for i, body in enumerate(bodies):
        journal.attempt(str(i), 0.01)
        body_bytes = body if isinstance(body, bytes) else json.dumps(body).encode()
        journal.put(
            f"{i:064d}", AnswerRecord(body_bytes, service="google-vision", model="m")
        )
    journal.close()


@pytest.fixture
def root(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def _google(*names: tuple[str, str]) -> object:
    objects = [
        {
            "mid": mid,
            "name": name,
            "score": 0.9,
            "boundingPoly": {"normalizedVertices": [{}]},
        }
        for mid, name in names
    ]
    return {"responses": [{"localizedObjectAnnotations": objects} if objects else {}]}


REKOGNITION = {
    "Labels": [
        {
            "Name": "Man",
            "Confidence": 99,
            "Instances": [
                {"BoundingBox": {"Left": 0}, "Confidence": 97},
                {"BoundingBox": {}, "Confidence": 90},
            ],
            "Parents": [{"Name": "Person"}],
            "Aliases": [{"Name": "Gentleman"}],
        },
        {
            "Name": "Road",
            "Confidence": 91,
            "Instances": [],
            "Parents": [{"Name": "Street"}],
        },
    ]
}
LISTED = [{"box_2d": [1, 2, 3, 4], "label": "car"}]
ANSWERS = [
    (
        {
            "image": {"w": 6, "h": 4},
            "detections": [
                {"box": [0, 0, 1, 1], "label": "car", "score": 1, "scores": {"car": 1}}
            ],
        },
        {"car": 1},
    ),
    (
        {
            "code": 0,
            "data": {
                "status": "success",
                "result": {
                    "objects": [{"bbox": [0, 0, 1, 1], "category": "car", "score": 0.5}]
                },
            },
        },
        {"car": 1},
    ),
    ({"code": 0, "data": {"task_uuid": "1-2"}}, {}),
    (_google(("/m/0k4j", "Car"), ("/m/0k4j", "Car")), {"Car (/m/0k4j)": 2}),
    (_google(), {}),
    (REKOGNITION, {"Man": 2}),
    (
        {
            "CustomLabels": [
                {"Name": "logo", "Confidence": 7, "Geometry": {"BoundingBox": {}}},
                {"Name": "whole image"},
            ]
        },
        {"logo": 1},
    ),
    (
        {
            "metadata": {"width": 1, "height": 1},
            "objectsResult": {
                "values": [{"boundingBox": {"x": 1}, "tags": [{"name": "table"}]}]
            },
        },
        {"table": 1},
    ),
    (
        [
            {"score": 0.9, "label": "car", "box": {"xmin": 5}},
            {"score": 0.9, "label": "cat", "box": {"xmin": 5}},
        ],
        {"car": 1, "cat": 1},
    ),
    (
        {
            "image": {"width": 6, "height": 4},
            "predictions": [
                {
                    "x": 2.5,
                    "y": 1,
                    "width": 8,
                    "height": 6,
                    "class": "car",
                    "class_id": 1,
                }
            ],
        },
        {"car": 1},
    ),
    (
        {
            "candidates": [
                {
                    "content": {"parts": [{"text": json.dumps(LISTED)}]},
                    "finishReason": "STOP",
                }
            ]
        },
        {"car": 1},
    ),
    (
        {"choices": [{"message": {"content": f"```json\n{json.dumps(LISTED)}\n```"}}]},
        {"car": 1},
    ),
    ({"choices": [{"message": {"content": "I see a box, but no JSON"}}]}, {}),
]


@pytest.mark.parametrize(("answer", "names"), ANSWERS)
def test_names_are_found_in_every_service_s_answers(
    root: str, answer: object, names: dict[str, int]
) -> None:
    _fill(root, answer)
    observed = count_observed_names(open_run_journal(root))
    assert {str(n): c for n, c in observed.names.items()} == names
    assert (observed.answers, observed.unreadable) == (1, 0)


def test_aliases_and_parents_come_with_the_name(root: str) -> None:
    _fill(root, REKOGNITION, _google(("/m/0k4j", "Car")), b"<html>", b"[" * 100_000)
    observed = count_observed_names(open_run_journal(root))
    assert {n.candidates for n in observed.names} == {
        ("Man", "Gentleman", "Person"),
        ("/m/0k4j", "Car"),
    }
    assert (observed.answers, observed.unreadable) == (4, 2)


def test_tasks_are_no_answers(root: str) -> None:
    _fill(root, _google(("/m/0k4j", "Car")))
    open_journal(storage.join(root, "journal")).put(
        "1.task", AnswerRecord(json.dumps(_google(("/m/1", "Task"))).encode())
    )
    assert [str(n) for n in count_observed_names(open_run_journal(root)).names] == [
        "Car (/m/0k4j)"
    ]


def check(file: Path, text: str, *arguments: str) -> int:
    file.write_text(text)
    return main(["labels", "check", str(file), "--classes", "car, person", *arguments])


def test_check_without_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "map.yaml"
    assert (
        check(
            file,
            "service: x\nmap: {Car: car, Van: {class: car, weight: 0.7}, Man:"
            " person}\n",
        )
        == 0
    )
    assert "car: car, van (weight 0.7)" in capsys.readouterr().out
    assert check(file, "service: x\nmap: {Car: car}\n") == 1
    assert "person: NOT REACHABLE" in capsys.readouterr().out
    assert check(file, "service: x\nmap: {Car: car, CAR: car}\n") == 2
    assert "line 2: 'CAR' is the name of line 2 again" in capsys.readouterr().err


def test_check_tells_which_names_the_map_does_not_know(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _fill(
        root,
        _google(("/m/0k4j", "Car"), ("/m/1", "Wheel"), ("/m/2", "Tree")),
        _google(("/m/2", "Tree")),
        REKOGNITION,
    )
    file = tmp_path / "map.yaml"
    label_map = "service: x\nmap: {/m/0k4j: car, Person: person}\n"
    assert check(file, label_map, "--root", root) == 1
    printed = capsys.readouterr().out
    assert (
        "3 answers in the journal, 6 boxes, 3 of them under a name not in the map"
        in printed
    )
    assert re.findall(r"^ +(\d+)  (.+)$", printed, re.MULTILINE) == [
        ("2", "Tree (/m/2)"),
        ("1", "Wheel (/m/1)"),
    ]
    assert check(file, label_map + "ignore: [Trees, /m/1]\n", "--root", root) == 0


def test_check_shows_the_most_frequent_of_many_names(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _fill(root, _google(*((f"/m/{i}", f"Thing {i}") for i in range(50))))
    assert (
        check(
            tmp_path / "map.yaml",
            "service: x\nmap: {Car: car, Man: person}\n",
            "--root",
            root,
        )
        == 1
    )
    assert "and 10 more names" in capsys.readouterr().out


def _embed(names: Sequence[str]) -> NDArray[np.float32]:
    """Similar: what begins alike."""
    vectors = np.array(
        [[name.lower().startswith(c) + 0.01 for c in "cpw"] for name in names],
        np.float32,
    )
    return np.asarray(
        vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32
    )


def observed(**names: int) -> ObservedNames:
    return ObservedNames(
        Counter({ObservedName(n.replace("_", " ")): c for n, c in names.items()}), 10, 0
    )


def test_a_proposal_maps_names_and_leaves_guesses_to_a_human(tmp_path: Path) -> None:
    names = Counter(
        {
            ObservedName("Car", "/m/0k4j"): 9,
            ObservedName("cars"): 8,
            ObservedName("Man", related=("Gentleman", "Person")): 7,
            ObservedName("Carriage"): 6,
            ObservedName("carriage"): 5,
            ObservedName("Tree"): 4,
            ObservedName("yes"): 3,
        }
    )
    text = propose_label_map(
        ObservedNames(names, 10, 0), CLASSES, "google-vision", _embed
    )
    file = tmp_path / "map.yaml"
    file.write_text(text)
    labels = load_label_map(str(file), CLASSES)
    assert labels.names == {"/m/0k4j": (0, 1.0), "cars": (0, 1.0), "person": (1, 1.0)}
    assert labels.find(["Man", "Gentleman", "Person"]) == (1, 1.0)
    assert labels.find(["Carriage"]) is None
    how = {
        line.split(":")[0].strip(): line.rpartition("#")[2].strip()
        for line in text.splitlines()
        if line.startswith("  ")
    }
    assert how == {
        '"/m/0k4j"': "Car (/m/0k4j): folded, 9 boxes",
        "cars": "cars: plural, 8 boxes",
        "Person": "folded, alias or parent of Man, 7 boxes",
    }
    guesses = [
        line.removeprefix(GUESS_MARK)
        for line in text.splitlines()
        if line.startswith(GUESS_MARK)
    ]
    assert guesses == [
        "  Carriage: car  # Carriage: similarity 1.00, next person 0.02, 6 boxes",
        "  - Tree  # Tree: 4 boxes",
        '  - "yes"  # yes: 3 boxes',
    ]
    file.write_text(text.replace(GUESS_MARK, ""))
    agreed = load_label_map(str(file), CLASSES)
    assert agreed.find(["carriages"]) == (0, 1.0)
    assert agreed.ignored == {"tree", "yes"}


def test_how_an_exact_name_was_found() -> None:
    assert "  car: car  # car: exact, 2 boxes" in propose_label_map(
        observed(car=2), CLASSES, "x"
    )


def test_a_guess_needs_a_margin() -> None:
    similarities = [[0.95, 0.93], [0.95, 0.80], [0.7, 0.1]]
    vectors = np.array(similarities, np.float32)

    def similar(names: Sequence[str]) -> NDArray[np.float32]:
        return np.eye(2, dtype=np.float32) if list(names) == CLASSES else vectors

    text = propose_label_map(
        observed(near_both=3, near_one=2, far=1), CLASSES, "x", similar, margin=0.05
    )
    assert (
        f"{GUESS_MARK}  near one: car  # near one: similarity 0.95, next person 0.80, 2"
        " boxes" in text
    )
    assert f"{GUESS_MARK}  - near both" in text
    assert f"{GUESS_MARK}  - far" in text


ODD = st.text(
    st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12
).filter(normalize_class_name)


@given(
    st.lists(
        st.tuples(ODD, st.one_of(st.just(""), ODD)),
        max_size=5,
        unique_by=lambda n: normalize_class_name(n[0]),
    )
)
def test_any_names_give_a_readable_proposal(
    tmp_path_factory: pytest.TempPathFactory, names: list[tuple[str, str]]
) -> None:
    counted = Counter(
        {ObservedName(name, vendor_id): 1 for name, vendor_id in [("Car", ""), *names]}
    )
    text = propose_label_map(ObservedNames(counted, 1, 0), CLASSES, "x")
    file = tmp_path_factory.mktemp("maps") / "map.yaml"
    file.write_text(text)
    assert load_label_map(str(file), CLASSES).find(["car"]) == (0, 1.0)
    assert yaml.safe_load(text.replace(GUESS_MARK, ""))["map"]


def _propose(root: str, *arguments: str) -> int:
    return main(
        ["labels", "propose", "--classes", "car,person", "--root", root, *arguments]
    )


def test_propose_writes_a_file_once(
    root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _fill(root, _google(("/m/0k4j", "Car")))
    out = tmp_path / "new" / "map.yaml"
    assert (
        _propose(
            root, "--no-similarity", "--out", str(out), "--service", "google-vision"
        )
        == 0
    )
    assert load_label_map(str(out), CLASSES).service == "google-vision"
    before = out.read_bytes()
    assert _propose(root, "--no-similarity", "--out", str(out)) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert _propose(root, "--no-similarity") == 0
    assert "service: http\n" in capsys.readouterr().out


def test_propose_asks_the_run_for_service_and_clip(
    root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    from coin_ray.clip import encoder

    _fill(root, _google(("/m/0k4j", "Car"), ("/m/1", "Tree")))
    config = folder()
    config = replace(
        config,
        classes=("car",),
        cloud=replace(config.cloud, service="google-vision"),
        clip=Clip("RN101", "some.pt"),
    )
    storage.write_bytes(storage.join(root, "config.yaml"), to_yaml(config).encode())
    loaded_models = []

    def absent(clip: Clip) -> None:
        loaded_models.append((clip.model, clip.pretrained))
        raise InputError("no weights here")

    monkeypatch.setattr(encoder, "load_clip", absent)
    assert _propose(root) == 0
    assert _propose(root, "--clip-model", "RN50", "--clip-pretrained", "openai") == 0
    printed = capsys.readouterr()
    assert loaded_models == [("RN101", "some.pt"), ("RN50", "openai")]
    assert "no guesses by text similarity: no weights here" in printed.err
    assert "service: google-vision\n" in printed.out


@pytest.mark.parametrize("kind", ["disk", "objects"])
def test_journal_commands(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = str(tmp_path) if kind == "disk" else f"memory://{uuid.uuid4().hex}"
    _fill(root, _google(), _google(), _google())
    _fill(root, _google())
    spent = open_journal(storage.join(root, "journal")).spent()
    assert main(["journal", "show", "--root", root]) == 0
    printed = capsys.readouterr().out
    numbers = {
        line.split()[0]: line.split()[1:]
        for line in printed.splitlines()
        if not line.startswith(" ")
    }
    assert numbers["answers"] == ["3"]
    assert numbers["attempts"] == ["4"]
    assert numbers["spent"] == ["4", "calls,", "$0.0400"]
    assert ("3  google-vision m" in printed) == (kind == "disk")
    assert main(["journal", "verify", "--root", root]) == 0
    assert "no damage; 3 answers" in capsys.readouterr().out
    assert main(["journal", "compact", "--root", root]) == 0
    assert (
        "bytes before" if kind == "disk" else "nothing to do: on an object store"
    ) in capsys.readouterr().out
    assert open_journal(storage.join(root, "journal")).spent() == spent


def test_verify_names_file_and_offset(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _fill(root, _google(), _google())
    (file,) = (Path(root) / "journal").glob("*.segment")
    segment = file.read_bytes()
    offset = segment.index(b"\x93CRJ", 10) + 30
    file.write_bytes(
        segment[:offset] + bytes([segment[offset] ^ 1]) + segment[offset + 1 :]
    )
    assert main(["journal", "verify", "--root", root]) == 1
    printed = capsys.readouterr().out
    assert f"{file}: offset {offset - 30}: " in printed
    assert "1 damaged places" in printed


def test_a_journal_in_use_is_left_alone(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _fill(root, _google())
    held = open_journal(storage.join(root, "journal"))
    assert main(["journal", "compact", "--root", root]) == 2
    assert "in use" in capsys.readouterr().err
    held.close()


@pytest.mark.parametrize(
    "tool",
    [
        ["journal", "show"],
        ["journal", "verify"],
        ["journal", "compact"],
        ["labels", "propose", "--classes", "a"],
    ],
)
def test_without_a_journal_nothing_is_made(
    tool: list[str], root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*tool, "--root", root]) == 2
    assert "no journal at" in capsys.readouterr().err
    assert not Path(root).exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["labels"],
        ["journal"],
        ["journal", "show"],
        ["journal", "mend", "--root", "x"],
        ["labels", "check", "f"],
        ["labels", "propose", "--root", "x", "--classes", ","],
    ],
)
def test_wrong_arguments_exit_with_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "expected_text"),
    [
        (["labels", "propose", "--help"], "--no-similarity"),
        (["journal", "--help"], "verify"),
        (["--help"], "--dry-run"),
    ],
)
def test_help_of_labels_is_fast_and_light(
    arguments: list[str], expected_text: str
) -> None:
    code = (
        "import json, runpy, sys, time\nsys.argv ="
        f" {[str(COLLECT), *arguments]!r}\ntry:\n    runpy.run_path(sys.argv[0],"
        " run_name='__main__')\nexcept SystemExit as end:\n    assert not"
        " end.code\nprint(json.dumps([sorted({'torch', 'ray', 'mlflow', 'open_clip'}"
        " & set(sys.modules)), time.process_time()]))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        cwd=COLLECT.parents[1],
    )
    assert expected_text in process.stdout
    heavy, seconds = json.loads(process.stdout.splitlines()[-1])
    assert heavy == []
    assert seconds < 3


def test_presets_are_still_presets() -> None:
    process = subprocess.run(
        [sys.executable, str(COLLECT), "unheard_of"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=COLLECT.parents[1],
    )
    assert process.returncode == 2
    assert "invalid choice: 'unheard_of'" in process.stderr
