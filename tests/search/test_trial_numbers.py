"""A trial keeps its number when its worker is lost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from coin_ray.search.outcome import TrialRecord
from coin_ray.search.tuner import _numbering, _TrialEndCallback

PRESET = {"distill.alignment": 1.0}


@dataclass(eq=False)
class FakeTrial:
    trial_id: str
    config: dict[str, Any]
    last_result: dict[str, Any] = field(
        default_factory=lambda: {"ninths": 9, "score": 0.5}
    )


def test_a_trial_that_tune_moves_to_the_end_keeps_its_number() -> None:
    records: list[TrialRecord] = []
    numbers: dict[str, int] = {}
    callback = _TrialEndCallback(records.append, _numbering(numbers, PRESET))
    preset = FakeTrial("a_00000", PRESET)
    second = FakeTrial("a_00001", {"distill.alignment": 2.0})
    third = FakeTrial("a_00002", {"distill.alignment": 3.0})
    callback.on_trial_start(0, [preset, second], second)
    # Tune: the second one's worker is lost, and the third one starts meanwhile
    callback.on_trial_start(1, [preset, third, second], third)
    for trial in (preset, third, second):
        callback.on_trial_complete(2, [preset, third, second], trial)
    numbers_by_alignment = {
        record.settings["distill.alignment"]: record.number for record in records
    }
    assert numbers_by_alignment == {1.0: 0, 2.0: 1, 3.0: 2}


def test_the_preset_is_first_in_a_restored_search() -> None:
    numbers: dict[str, int] = {}
    number_trials = _numbering(numbers, PRESET)
    other = FakeTrial("b_00001", {"distill.alignment": 2.0})
    preset = FakeTrial("b_00000", PRESET)
    assert number_trials([other, preset]) == {"b_00000": 0, "b_00001": 1}
    assert number_trials([preset, other]) == {"b_00000": 0, "b_00001": 1}
