"""Take over the rows of a pretrained class head by class name, so that "person" of COCO
starts the class person.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from coin_ray.class_names import is_same_class_name, normalize_class_name


def match_class_rows(
    classes: Sequence[str], pretrained_classes: Sequence[str]
) -> list[int | None]:
    """Return for each of the run's ``classes`` the row of the pretrained class with the
    same name, or None.

    The same name but for case, hyphens and underscores wins; else the other number
    ("cars", "car"). The first row wins if several match.
    """
    exact: dict[str, int] = {}
    for row, name in enumerate(pretrained_classes):
        exact.setdefault(normalize_class_name(name), row)
    return [
        exact.get(normalize_class_name(name), _find_plural(name, pretrained_classes))
        for name in classes
    ]


def _find_plural(name: str, pretrained_classes: Sequence[str]) -> int | None:
    for row, pretrained_name in enumerate(pretrained_classes):
        if is_same_class_name(name, pretrained_name):
            return row
    return None


def take_over_class_rows(
    pretrained: Tensor, initial: Tensor, rows: Sequence[int | None]
) -> Tensor:
    """Return ``initial`` [K, ...] with the pretrained rows [L, ...] that
    ``match_class_rows`` found; the other rows stay as they were drawn.
    """
    weights = initial.detach().clone()
    for index, row in enumerate(rows):
        if row is not None:
            weights[index] = pretrained[row]
    return weights
