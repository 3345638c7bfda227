"""Choose the one intensity range in which all deep grey images of a run are seen: 16
bits, 32 bits and floats.

A range per image would show the same temperature light in one image and dark in
another, and a model would have learned from pixels that it never sees again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from coin_ray import storage
from coin_ray.data.pixels import IntensityRange

OUTLYING_SHARE = 0.01
"""Share of training images at either end that the range leaves out: broken ones."""


class IntensityStatistics:
    """The own ranges of a data set's deep grey images.

    ``setting``: the range from the config, or "auto".
    """

    def __init__(self, setting: str | IntensityRange) -> None:
        self._setting = setting
        self._training: list[IntensityRange] = []
        self._others: list[IntensityRange] = []

    def add(self, split: str, own_range: IntensityRange) -> None:
        """Count one image with the range that ``pixels.own_range`` returns."""
        ranges = self._training if split == "train" else self._others
        ranges.append(own_range)

    def choose_range(self) -> IntensityRange | None:
        """Return the range of the setting, or that of the training images; None without
        such images. Constant images and one image in a hundred at either end don't
        count.
        """
        if not isinstance(self._setting, str):
            return self._setting
        if not self._training:
            return None
        varied = [(low, high) for low, high in self._training if low < high]
        ranges = np.array(varied or self._training)
        low = float(np.quantile(ranges[:, 0], OUTLYING_SHARE, method="lower"))
        high = float(np.quantile(ranges[:, 1], 1 - OUTLYING_SHARE, method="higher"))
        return low, max(high, low + 1e-6 * max(abs(low), 1.0))

    def metrics(self) -> dict[str, Any]:
        """Return ``intensity``: the range, the number of deep grey images, and how many
        have no value in the range. Empty if all images have 8 bits.
        """
        own_ranges = self._training + self._others
        if not own_ranges:
            return {}
        chosen = self.choose_range()
        outside = 0
        if chosen is not None:
            low, high = chosen
            outside = sum(own[0] > high or own[1] < low for own in own_ranges)
        return {
            "intensity": {
                "range": None if chosen is None else list(chosen),
                "images": len(own_ranges),
                "outside": outside,
            }
        }


def earlier_range(
    metrics: Mapping[str, Any], setting: str | IntensityRange
) -> str | IntensityRange:
    """Return the setting for an images step that runs again: a range that it found
    before stays, since answers about other pixels would have to be paid again.
    ``metrics``: of the former run.
    """
    found = (metrics.get("intensity") or {}).get("range")
    if setting != "auto" or found is None:
        return setting
    low, high = found
    return low, high


def found_range(root: str, identity: object) -> IntensityRange | None:
    """Return the range that a finished images step below ``root`` has found for the
    data settings with this ``identity`` (``config.fingerprints.to_identity``).
    """
    for folder in storage.list_folders(storage.join(root, "steps")):
        uri = storage.join(folder, "manifest.json")
        is_images = folder.rpartition("/")[2].startswith("images-")
        if not is_images or not storage.exists(uri):
            continue
        manifest = storage.read_json(uri)
        found = (manifest["metrics"].get("intensity") or {}).get("range")
        if found is not None and manifest["identity"] == identity:
            low, high = found
            return low, high
    return None


def describe_intensity(metrics: Mapping[str, Any]) -> str:
    """Return a sentence about the deep grey images of a run from the metrics of its
    images step; empty if there are none.
    """
    intensity = metrics.get("intensity")
    if not intensity:
        return ""
    count = f"{intensity['images']} grey images have more than 8 bits: "
    if intensity["range"] is None:
        return (
            f"{count}each is stretched by its own values, since no training image has"
            " more than 8 bits (--data.intensity-range LOW HIGH sets one range)"
        )
    low, high = intensity["range"]
    text = f"{count}values {low:g}..{high:g} become black..white"
    if intensity["outside"]:
        text += (
            f"; {intensity['outside']} of them have no value in this range and are all"
            " black or white: check their unit, or set --data.intensity-range LOW HIGH"
        )
    return text
