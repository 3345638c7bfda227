"""``coin-ray report A B``: which arguments mean a comparison of runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from coin_ray.commands.report import report, select_run_roots
from coin_ray.errors import InputError


@pytest.mark.parametrize(
    ("arguments", "roots"),
    [
        (["demo"], []),
        (["demo", "--seed", "1"], []),
        ([], []),
        (["--config", "a.yaml"], []),
        (["a", "b", "--out", "c"], ["a", "b"]),
    ],
)
def test_two_folders_mean_a_comparison(arguments: list[str], roots: list[str]) -> None:
    assert select_run_roots(arguments) == roots


def test_a_comparison_takes_no_other_option_than_its_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--out FILE"):
        report([str(tmp_path), str(tmp_path), "--seed", "1"])
