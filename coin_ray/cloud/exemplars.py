"""Exemplars: people's boxes on other images, which show a service what is meant."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from coin_ray import storage
from coin_ray.cloud.adapters.t_rex import SIDE_MAX, Exemplar
from coin_ray.data.canonical import canonical_image, upright_size_and_range
from coin_ray.data.review.corrections import read_reviews
from coin_ray.data.review.reviews import Review
from coin_ray.errors import ConfigError, InputError

BOXES_MAX = 10
"""Boxes of each label."""
IMAGES_MAX = 10
"""Every image is sent with every call."""


@lru_cache(maxsize=8)
def read_exemplars(addresses: tuple[str, ...]) -> tuple[Exemplar, ...]:
    """Return the first reviewed images of these exports and labelled folders that show
    each label up to ``BOXES_MAX`` times, at most ``IMAGES_MAX``.

    Raises ``ConfigError`` for an export or an image that can't be read, and if no box is
    in them.
    """
    try:
        reviews = [r for address in addresses for r in read_reviews(address)]
    except InputError as error:
        raise ConfigError(f"cloud.exemplars can't be used: {error}") from None
    counts: dict[str, int] = {}
    exemplars: list[Exemplar] = []
    for review in _rarest_labels_first(reviews):
        boxes = []
        for box in review.boxes:
            if counts.get(box.label, 0) < BOXES_MAX:
                counts[box.label] = counts.get(box.label, 0) + 1
                boxes.append((box.label, box.edges))
        if boxes and len(exemplars) < IMAGES_MAX:
            exemplars.append(_read_exemplar(review, boxes))
    if not exemplars:
        raise ConfigError(
            f"cloud.exemplars {' '.join(addresses)} have no reviewed image with a box"
        )
    return tuple(exemplars)


def _rarest_labels_first(reviews: Sequence[Review]) -> list[Review]:
    """Return the usable reviews, those with the rarest labels first, so that each label
    is shown.
    """
    usable = [r for r in reviews if r.reviewed and not r.problems and r.boxes]
    image_counts: dict[str, int] = {}
    for review in usable:
        for label in {box.label for box in review.boxes}:
            image_counts[label] = image_counts.get(label, 0) + 1

    def rarest_count(review: Review) -> int:
        return min(image_counts[box.label] for box in review.boxes)

    return sorted(usable, key=rarest_count)


def _read_exemplar(
    review: Review, boxes: Sequence[tuple[str, tuple[float, float, float, float]]]
) -> Exemplar:
    try:
        raw = storage.read_bytes(review.uri)
        image = canonical_image(raw, SIDE_MAX)
        _, own_range = upright_size_and_range(raw)
    except (InputError, OSError) as error:
        raise ConfigError(
            f"cloud.exemplars: the image {review.name} can't be read: {error}"
        ) from None
    if own_range is not None:
        raise ConfigError(
            f"cloud.exemplars: expected images with 8 bits, but {review.name} is grey"
            " with more: it would be stretched by its own values, and not by the run's"
            " range; store it with 8 bits, as the run's images are sent"
        )
    x_scale = image.width / image.original[0]
    y_scale = image.height / image.original[1]
    scales = (x_scale, y_scale, x_scale, y_scale)
    scaled = []
    for label, edges in boxes:
        x0, y0, x1, y1 = (
            edge * scale for edge, scale in zip(edges, scales, strict=True)
        )
        scaled.append((label, (x0, y0, x1, y1)))
    return Exemplar(image.data, image.media_type, tuple(scaled))
