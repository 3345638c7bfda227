"""A second opinion on boxes by an image classifier of other classes: the probabilities
of its classes are added up by a label map, and what is not mapped is background.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

import torch
from PIL import Image
from torch import Tensor

from coin_ray.class_names import class_name_variants, normalize_class_name
from coin_ray.clip.crops import ImageBoxes, PixelBox, batch_size, classify_crops
from coin_ray.clip.labeler import to_pil
from coin_ray.cloud.label_map import LabelMap, load_label_map
from coin_ray.errors import ConfigError
from coin_ray.predictors.image_classifiers import ImageClassifier, first_names

LARGEST_PROBABILITY = 1 - 1e-6
NEAREST_NAMES = 3


class ClassifierLabeler:
    """Classifies crops of the boxes, stretched to squares and then prepared as the
    classifier's images were in training.

    ``context``: side of the crop / side of the box.
    """

    def __init__(
        self, classifier: ImageClassifier, class_weights: Tensor, context: float
    ) -> None:
        self.classifier = classifier
        self.class_weights = class_weights
        self.context = context
        height, width = classifier.prepare(Image.new("RGB", (64, 64))).shape[1:]
        self._batch = batch_size((height, width))

    def label(self, images: Iterable[ImageBoxes]) -> list[Tensor]:
        """Return the probabilities [N, K+1], background last, of each image's boxes."""
        num_columns = self.class_weights.shape[1] + 1
        return classify_crops(
            images, self.context, self._cut, self._classify, self._batch, num_columns
        )

    def _cut(self, image: Tensor, box: PixelBox) -> Tensor:
        left, top, right, bottom = box
        crop = to_pil(image[:, max(top, 0) : bottom, max(left, 0) : right])
        side = max(crop.size)
        square = crop.resize((side, side), Image.Resampling.BICUBIC)
        return self.classifier.prepare(square)

    def _classify(self, inputs: Tensor) -> Tensor:
        probabilities = self.classifier.probabilities(inputs)
        if self.classifier.activation == "sigmoid":
            return _exclusive_probabilities(probabilities, self.class_weights)
        classes = probabilities @ self.class_weights
        background = (1 - classes.sum(1, keepdim=True)).clamp(min=0)
        return torch.cat([classes, background], 1)


def _exclusive_probabilities(independent: Tensor, class_weights: Tensor) -> Tensor:
    """Return the probabilities [B, K+1] that exactly one class, or none, holds, from
    independent ones [B, C]. A class holds if any of its names does.
    """
    none_of_a_class = torch.exp(
        torch.log1p(
            -independent.clamp(max=LARGEST_PROBABILITY)[:, :, None] * class_weights
        ).sum(1)
    )
    odds = (1 - none_of_a_class) / none_of_a_class
    total = 1 + odds.sum(1, keepdim=True)
    return torch.cat([odds, torch.ones_like(total)], 1) / total


def map_classes(
    classifier: ImageClassifier, classes: Sequence[str], label_map: str | None
) -> Tensor:
    """Return the weights [C, K] with which each class of the classifier counts for each
    of ``classes``, by a label map (a path), or by equal names.

    Raises ConfigError naming the classes that no name is mapped to, and names of the map
    that the classifier does not have, with the nearest ones it has.
    """
    mapping = LabelMap.of_classes(classes)
    if label_map is not None:
        mapping = load_label_map(label_map, classes)
        _check_names(mapping, classifier, label_map)
    weights = torch.zeros(len(classifier.class_names), len(classes))
    for number, names in enumerate(classifier.class_names):
        target = mapping.find(names)
        if target is not None:
            index, weight = target
            weights[number, index] = weight
    _check_classes(weights, classifier, classes, label_map)
    return weights


def _check_names(
    mapping: LabelMap, classifier: ImageClassifier, label_map: str
) -> None:
    names = _normalized_names(classifier)
    variants = {variant for name in names for variant in class_name_variants(name)}
    unknown = sorted(name for name in mapping.names if name not in variants)
    if unknown:
        nearest = [f"{name!r} (nearest: {_nearest(name, names)})" for name in unknown]
        raise ConfigError(
            f"{label_map}: the classifier has no class {', '.join(nearest)}; its classes"
            f" are {first_names(classifier.class_names)}"
        )


def _check_classes(
    weights: Tensor,
    classifier: ImageClassifier,
    classes: Sequence[str],
    label_map: str | None,
) -> None:
    missing = [name for k, name in enumerate(classes) if not bool(weights[:, k].any())]
    if not missing:
        return
    names = _normalized_names(classifier)
    nearest = [f"{name} (nearest: {_nearest(name, names)})" for name in missing]
    advice = f"add names to {label_map}"
    if label_map is None:
        advice = "map its names to them by --labeler.label-map FILE"
    raise ConfigError(
        f"the classifier of labeler.model has no class for {', '.join(nearest)}; its"
        f" {len(classifier.class_names)} classes are"
        f" {first_names(classifier.class_names)}: {advice} (docs/second-opinions.md)"
    )


def _normalized_names(classifier: ImageClassifier) -> list[str]:
    """Return the names and synonyms of all classes, normalized and sorted."""
    names = (name for synonyms in classifier.class_names for name in synonyms)
    return sorted({normalize_class_name(name) for name in names})


def _nearest(name: str, class_names: Sequence[str]) -> str:
    """List the names that contain ``name`` as a word, then those like it."""
    normalized = normalize_class_name(name)
    # a full name is there again as its synonyms
    names = [other for other in class_names if "," not in other]
    containing = [other for other in names if normalized in other.split()]
    similar = get_close_matches(normalized, names, n=NEAREST_NAMES, cutoff=0.5)
    nearest = list(dict.fromkeys([*containing, *similar]))
    return ", ".join(nearest[:NEAREST_NAMES]) or "none"
