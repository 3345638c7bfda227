"""Rows of a pretrained class head, taken over by name."""

import torch

from coin_ray.models.students.class_rows import match_class_rows, take_over_class_rows


def test_rows_are_matched_by_name_not_by_position():
    pretrained = ("person", "bicycle", "car", "traffic light")
    classes = ("Traffic-Lights", "dog", "person", "cars")
    assert match_class_rows(classes, pretrained) == [3, None, 0, 2]


def test_the_exact_name_wins_over_the_plural():
    assert match_class_rows(("car",), ("cars", "car")) == [1]


def test_a_longer_name_is_another_class():
    assert match_class_rows(("traffic", "light"), ("traffic light",)) == [None, None]


def test_unmatched_rows_stay_as_drawn():
    pretrained = torch.tensor([[1.0, 1.0], [2.0, 2.0]])
    initial = torch.tensor([[7.0, 7.5], [8.0, 8.5], [9.0, 9.5]])
    rows = take_over_class_rows(pretrained, initial, [1, None, 0])
    assert rows.tolist() == [[2.0, 2.0], [8.0, 8.5], [1.0, 1.0]]
    assert initial[0].tolist() == [7.0, 7.5]
