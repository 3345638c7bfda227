"""Names that MLflow takes, whatever a class, a service or a setting is called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils import validation

from coin_ray.config.mlflow_names import LONGEST, mlflow_name, parse_mlflow_name

CHECKS = {
    "figure": validation._validate_metric_name,
    "model": validation._validate_model_name,
    "alias": validation._validate_model_alias_name,
}
odd_text = st.text(st.sampled_from("aU25_F/.: -+('\n%ü犬"), max_size=12)


@pytest.mark.parametrize("kind", CHECKS)
@given(first=odd_text, second=odd_text)
def test_names_are_legal_reversible_and_distinct(
    kind: str, first: str, second: str
) -> None:
    written = [mlflow_name(name, kind) for name in (first, second)]  # type: ignore[arg-type]
    for name, text in zip((first, second), written, strict=True):
        CHECKS[kind](text)
        assert parse_mlflow_name(text) == name
    assert (written[0] == written[1]) == (first == second)


@pytest.mark.parametrize(
    "name",
    [
        "distill.fit.steps",
        "answered_by.http inverted",
        "traffic light",
        "a/b:c",
        "über",
    ],
)
def test_names_that_mlflow_takes_stay(name: str) -> None:
    assert mlflow_name(name) == name


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("50% sale", "50_U25_ sale"),
        ("T-shirt (red)", "T-shirt _U28_red_U29_"),
        ("", "_U110000_"),
        ("..", "_U2E_."),
        ("a//b", "a_U2F__U2F_b"),
    ],
)
def test_other_characters_become_their_codes(name: str, written: str) -> None:
    assert mlflow_name(name) == written


def test_long_names_are_cut_and_stay_distinct() -> None:
    names = [mlflow_name("犬+" * 300 + end) for end in "ab"]
    assert max(map(len, names)) <= LONGEST
    assert len(set(names)) == 2
