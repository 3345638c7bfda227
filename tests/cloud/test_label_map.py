from __future__ import annotations

import pickle
from collections import Counter
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from coin_ray.class_names import class_name_variants, normalize_class_name
from coin_ray.cloud.label_map import LabelMap, Prior, load_label_map
from coin_ray.errors import ConfigError

CLASSES = ("car", "bus", "person")
FILE = """\
service: google-vision
classes: [bus, car, person]
map:
  /m/0k4j: car
  Van: {class: car, weight: 0.7}
  Person: {class: person}
  "no": bus
  on: bus
  3: person
ignore: [Wheel, License plate]
precision: {car: 0.8}
confusion: {car: {bus: 0.3, background: 0.7}}
"""


@pytest.fixture
def map_file(tmp_path: Path) -> Path:
    return tmp_path / "map.yaml"


def _load(map_file: Path, text: str) -> LabelMap:
    map_file.write_text(text)
    return load_label_map(str(map_file), CLASSES)


def test_a_file(map_file: Path) -> None:
    labels = _load(map_file, FILE)
    assert labels.names == {
        "/m/0k4j": (0, 1.0),
        "van": (0, 0.7),
        "person": (2, 1.0),
        "no": (1, 1.0),
        "on": (1, 1.0),
        "3": (2, 1.0),
    }
    assert labels.ignored == {"wheel", "license plate"}
    assert labels.service == "google-vision"
    assert labels.prior == Prior(((0.0, 0.3, 0.0, 0.7), None, None), (0.8, None, None))
    assert pickle.loads(pickle.dumps(labels)) == labels


@pytest.mark.parametrize(
    "ending", ["", "ignore:\n", "ignore: []\n", "# only a remark\n"]
)
def test_the_least_a_file_needs(map_file: Path, ending: str) -> None:
    labels = _load(map_file, "service: http\nmap: {Car: car}\n" + ending)
    assert labels == LabelMap({"car": (0, 1.0)}, service="http")


@pytest.mark.parametrize(
    ("candidates", "expected"),
    [
        (["/m/0k4j"], (0, 1.0)),
        (["/m/0k4j", "Van"], (0, 1.0)),
        (["/m/other", "Van"], (0, 0.7)),
        (["VAN"], (0, 0.7)),
        (["vans"], (0, 0.7)),
        (["Persons"], (2, 1.0)),
        (["Man", "Gentleman", "Person"], (2, 1.0)),
        (["Wheel", "Van"], None),
        (["Wheels", "Van"], None),
        (["license-plate"], None),
        (["Van stop"], None),
        (["minivan"], None),
        (["/m/0k4js"], None),
        (["personal"], None),
        ([], None),
        ([""], None),
    ],
)
def test_names_are_found_whole(
    map_file: Path, candidates: list[str], expected: tuple[int, float] | None
) -> None:
    assert _load(map_file, FILE).find(candidates) == expected


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("wheel", True),
        ("Wheels", True),
        ("LICENSE_PLATE", True),
        ("steering wheel", False),
        ("Van", False),
    ],
)
def test_ignored(map_file: Path, name: str, ignored: bool) -> None:
    assert _load(map_file, FILE).ignores([name]) == ignored


@pytest.mark.parametrize(
    ("singular", "plural"),
    [
        ("car", "cars"),
        ("bus", "buses"),
        ("box", "boxes"),
        ("bench", "benches"),
        ("baby", "babies"),
        ("horse", "horses"),
        ("traffic light", "Traffic-Lights"),
        ("movie", "movies"),
    ],
)
def test_simple_plurals_in_both_directions(singular: str, plural: str) -> None:
    assert LabelMap.of_classes([singular]).find([plural]) == (0, 1.0)
    assert LabelMap.of_classes([plural]).find([singular]) == (0, 1.0)


@pytest.mark.parametrize(
    ("name", "other_name"),
    [
        ("glass", "glasses"),
        ("bus", "bu"),
        ("cat", "catfish"),
        ("car", "carpet"),
        ("bus", "bus stop"),
    ],
)
def test_what_is_no_plural(name: str, other_name: str) -> None:
    assert LabelMap.of_classes([name]).find([other_name]) is None


def test_an_exact_name_wins_over_a_plural() -> None:
    labels = LabelMap({"car": (0, 1.0), "cars": (1, 1.0)})
    assert (labels.find(["Cars"]), labels.find(["car"])) == ((1, 1.0), (0, 1.0))
    assert LabelMap({"car": (0, 1.0)}, frozenset({"cars"})).find(["cars"]) is None


PROBLEMS = [
    ("", "is empty"),
    ("- a\n", "line 1: a label map must be a mapping; got a list"),
    ("service: http\nmap: {Car: car\n", "not YAML"),
    ("service: http\n", "line 1: 'map' is missing"),
    ("map: {Car: car}\n", "'service' is missing"),
    (
        "service: http\nmap: {Car: car}\nnames: {}\n",
        "line 3: a label map has the unknown key 'names'",
    ),
    ("service: http\nmap: {}\n", "line 2: map names nothing"),
    ("service: http\nmap:\n", "map must be a mapping; got nothing"),
    ("service: [a]\nmap: {Car: car}\n", "line 1: service must be a word; got a list"),
    (
        "service: http\nmap:\n  Car: car\n  Van: lorry\n",
        "line 4: 'Van': 'lorry' is none of the classes car, bus, person",
    ),
    ("service: http\nmap:\n  '-': car\n", "line 3: '-' is no name"),
    (
        "service: http\nmap:\n  Car:\n",
        "line 3: the class of 'Car' must be a word; got nothing",
    ),
    (
        "service: http\nmap:\n  Car: {class: car, wieght: 1}\n",
        "line 3: 'Car' has the unknown key 'wieght'",
    ),
    ("service: http\nmap:\n  Car: {weight: 1}\n", "'Car' has no class"),
    (
        "service: http\nmap:\n  Car: {class: car, weight: 1.5}\n",
        "line 3: the weight of 'Car' must be a number in 0..1; got '1.5'",
    ),
    ("service: http\nmap:\n  Car: {class: car, weight: -0.1}\n", "got '-0.1'"),
    ("service: http\nmap:\n  Car: {class: car, weight: .nan}\n", "got '.nan'"),
    ("service: http\nmap:\n  Car: {class: car, weight: much}\n", "got 'much'"),
    ("service: http\nmap:\n  Car: {class: car, weight: 0}\n", "belongs under ignore"),
    (
        "service: http\nmap:\n  Car: car\n  Van: car\n  Car: bus\n",
        "line 5: 'Car' is given again; it is already on line 3",
    ),
    (
        "service: http\nmap:\n  Stop sign: car\n  stop-Sign: car\n",
        "line 4: 'stop-Sign' is the name of line 3 again",
    ),
    (
        "service: http\nmap:\n  Car: car\nignore:\n  - CAR\n",
        "line 5: 'CAR' is the name of line 3 again",
    ),
    (
        "service: http\nservice: dds\nmap: {Car: car}\n",
        "line 2: 'service' is given again",
    ),
    ("service: http\nmap: {Car: car}\nignore: Wheel\n", "ignore must be a list"),
    (
        "service: http\nmap: {Car: car}\nignore: [[a]]\n",
        "a name must be a word; got a list",
    ),
    (
        "service: http\nmap: {Car: car}\nclasses: [car, bus]\n",
        (
            "line 3: the map is for the classes car, bus, but the run's are car, bus,"
            " person"
        ),
    ),
    (
        "service: http\nmap: {Car: car}\nprecision: {car: 0}\n",
        "the precision of 'car' is 0",
    ),
    (
        "service: http\nmap: {Car: car}\nprecision: {lorry: 0.5}\n",
        "'lorry' is none of the classes",
    ),
    (
        "service: http\nmap: {Car: car}\nconfusion: {car: {bus: 0.5}}\n",
        "the confusion of 'car' sums to 0.5, not 1",
    ),
    (
        "service: http\nmap: {Car: car}\nconfusion: {car: {lorry: 1}}\n",
        "'lorry' is none of the classes",
    ),
    ("service: http\nmap: {? [a] : car}\n", "a key of map must be a word"),
    ("a: b\n---\nc: d\n", "not YAML"),
]


@pytest.mark.parametrize(("text", "message"), PROBLEMS)
def test_problems_are_named_with_their_line(
    map_file: Path, text: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        _load(map_file, text)
    assert message in str(caught.value)
    assert str(map_file) in str(caught.value)


def test_no_file_and_another_service(map_file: Path) -> None:
    with pytest.raises(ConfigError, match="no label map at"):
        load_label_map(str(map_file), CLASSES)
    with pytest.raises(ConfigError, match="no label map at"):
        load_label_map(str(map_file.parent), CLASSES)
    map_file.write_text(FILE)
    assert load_label_map(str(map_file), CLASSES, "google-vision").names
    with pytest.raises(
        ConfigError,
        match=(
            r"line 1: the map is for service 'google-vision', but cloud\.service is"
            r" 'rekognition'"
        ),
    ):
        load_label_map(str(map_file), CLASSES, "rekognition")


NAMES = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp")),
    min_size=1,
    max_size=20,
).filter(lambda n: normalize_class_name(n) and n.strip())


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(NAMES, st.sampled_from(CLASSES), min_size=1, max_size=6))
def test_any_names_of_a_service_are_mapped(
    map_file: Path, names: dict[str, str]
) -> None:
    folded_counts = Counter(normalize_class_name(name) for name in names)
    for name in list(names):
        if folded_counts[normalize_class_name(name)] > 1:
            del names[name]
    if not names:
        return
    text = yaml.safe_dump({"service": "http", "map": names}, allow_unicode=True)
    map_file.write_text(text, encoding="utf-8")
    labels = load_label_map(str(map_file), CLASSES)
    for name, label in names.items():
        assert labels.find([name]) == (CLASSES.index(label), 1.0)


@given(NAMES)
def test_name_variants_are_stable(name: str) -> None:
    folded = normalize_class_name(name)
    assert normalize_class_name(folded) == folded
    variants = list(class_name_variants(name))
    assert variants[0] == folded
    assert len(set(variants)) == len(variants)
