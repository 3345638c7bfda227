"""Classes that are asked for by several phrases, with negatives: which questions a
service is asked about an image, and one answer from theirs.

Each question is a call with a key of its own in the journal, so that a changed negative
asks only that question again. A class without prompts is asked by its name; a run of such
classes has one question, with the key that it always had.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from coin_ray.cloud.protocol import (
    NO_COUNTS,
    BoxCounts,
    Capabilities,
    RawDetections,
    ScoreKind,
)
from coin_ray.config import ClassPrompt
from coin_ray.errors import ConfigError
from coin_ray.fusion.box_clusters import merge_duplicates, pairwise_ious

SAME_OBJECT_IOU = 0.6
"""Boxes of two phrases of a class that overlap more are one object."""
NEGATIVE_IOU = 0.5
"""A negative's box drops boxes of its class that overlap it at least so much."""
SCORE_KINDS: tuple[ScoreKind, ...] = ("per_class", "label", "self_reported", "none")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ClassQuestion:
    """One call about an image: the phrases asked for, and the indexes of the classes
    that each is about.
    """

    phrases: tuple[str, ...]
    columns: tuple[tuple[int, ...], ...]
    is_negative: bool = False
    descriptions: tuple[tuple[str, str], ...] = ()


def plan_questions(
    classes: Sequence[str],
    prompts: Sequence[ClassPrompt],
    capabilities: Capabilities,
    *,
    has_label_map: bool = False,
) -> list[ClassQuestion]:
    """Return the questions about each image, those for negatives last.

    Services with names of their own are asked one question: only their label map says
    what a name means. Raises ``ConfigError`` for phrases beside a label map.
    """
    limit = capabilities.phrases_per_call
    reads_phrases = capabilities.open_vocabulary and capabilities.reads_names
    if prompts and not reads_phrases:
        logger.warning(
            "%s does not read phrases: the phrases and negatives of %s are not asked for",
            capabilities.name,
            ", ".join(prompt.name for prompt in prompts),
        )
    if prompts and reads_phrases and has_label_map:
        raise ConfigError(
            f"{capabilities.name} has both cloud.label_map and phrases of"
            f" {prompts[0].name}: a label map reads the names of a server that chooses"
            " them itself; remove one of them"
        )
    by_name = {prompt.name: prompt for prompt in prompts if reads_phrases}
    positives: dict[str, tuple[int, ...]] = {}
    negatives: dict[str, tuple[int, ...]] = {}
    descriptions: list[tuple[str, str]] = []
    for column, name in enumerate(classes):
        prompt = by_name.get(name, ClassPrompt(name))
        positives |= dict.fromkeys(prompt.phrases, (column,))
        for negative in prompt.negatives:
            negatives[negative] = (*negatives.get(negative, ()), column)
        if prompt.description and capabilities.reads_descriptions:
            descriptions += [(phrase, prompt.description) for phrase in prompt.phrases]
    questions = [
        replace(question, descriptions=_of_phrases(descriptions, question.phrases))
        for question in _split_phrases(positives, limit)
    ]
    for question in _split_phrases(negatives, limit):
        questions.append(replace(question, is_negative=True))
    return questions


def _split_phrases(
    columns_by_phrase: Mapping[str, tuple[int, ...]], limit: int | None
) -> list[ClassQuestion]:
    phrases = list(columns_by_phrase)
    step = limit or max(1, len(phrases))
    questions = []
    for start in range(0, len(phrases), step):
        asked = tuple(phrases[start : start + step])
        columns = tuple(columns_by_phrase[phrase] for phrase in asked)
        questions.append(ClassQuestion(asked, columns))
    return questions


def _of_phrases(
    descriptions: Sequence[tuple[str, str]], phrases: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    return tuple(pair for pair in descriptions if pair[0] in phrases)


def merge_answers(
    questions: Sequence[ClassQuestion],
    answers: Sequence[RawDetections],
    num_classes: int,
) -> RawDetections:
    """Return the detections of the classes from the answers to the questions about one
    image, in their order.

    A class's score is the best of its phrases; boxes of one class that overlap more than
    ``SAME_OBJECT_IOU`` are one object, whichever phrase found them. A box of a negative
    drops the boxes of its classes that overlap it at least ``NEGATIVE_IOU`` and do not
    score higher.
    """
    positive = [
        _class_detections(answer, question, num_classes)
        for question, answer in zip(questions, answers, strict=True)
        if not question.is_negative
    ]
    merged = positive[0] if len(positive) == 1 else _concatenate(positive)
    num_phrases = sum(len(q.phrases) for q in questions if not q.is_negative)
    if num_phrases > num_classes:
        merged = _merge_objects(merged)
    for question, answer in zip(questions, answers, strict=True):
        if question.is_negative:
            merged = _suppress(merged, question, answer)
    return merged


def _class_detections(
    raw: RawDetections, question: ClassQuestion, num_classes: int
) -> RawDetections:
    """Return an answer with the scores [N, K] of the classes instead of the phrases."""
    class_scores = np.zeros((len(raw), num_classes), np.float32)
    for phrase_column, columns in enumerate(question.columns):
        for column in columns:
            scores = raw.class_scores[:, phrase_column]
            class_scores[:, column] = np.maximum(class_scores[:, column], scores)
    return replace(raw, class_scores=class_scores)


def _concatenate(answers: Sequence[RawDetections]) -> RawDetections:
    """Return the boxes of all answers, best first; their scores are of the worst kind
    among them.
    """
    boxes = np.concatenate([answer.boxes for answer in answers])
    class_scores = np.concatenate([answer.class_scores for answer in answers])
    order = np.argsort(-class_scores.max(1, initial=0.0), kind="stable")
    kinds = {answer.score_kind for answer in answers if len(answer)}
    kind = max(kinds or {answers[0].score_kind}, key=SCORE_KINDS.index)
    return RawDetections(
        boxes[order],
        class_scores[order],
        kind,
        tuple(name for answer in answers for name in answer.unmapped),
        sum((answer.counts for answer in answers), NO_COUNTS),
    )


def _merge_objects(raw: RawDetections) -> RawDetections:
    if len(raw) < 2:
        return raw
    labels = raw.class_scores.argmax(1)
    scores = raw.class_scores.max(1)
    boxes, rows = merge_duplicates(raw.boxes, scores, labels, SAME_OBJECT_IOU)
    return replace(
        raw, boxes=boxes.astype(np.float32), class_scores=raw.class_scores[rows]
    )


def _suppress(
    raw: RawDetections, question: ClassQuestion, negative: RawDetections
) -> RawDetections:
    """Drop boxes that fit a negative of their class better."""
    if not len(raw) or not len(negative):
        return raw
    overlaps = _ious(raw.boxes, negative.boxes) >= NEGATIVE_IOU
    labels, scores = raw.class_scores.argmax(1), raw.class_scores.max(1)
    is_dropped = np.zeros(len(raw), bool)
    for phrase_column, columns in enumerate(question.columns):
        negative_scores = negative.class_scores[:, phrase_column]
        is_found = overlaps & (negative_scores > 0)
        best = np.where(is_found, negative_scores, 0).max(1)
        fits_better = is_found.any(1) & (best >= scores)
        is_dropped |= fits_better & np.isin(labels, columns)
    kept = np.flatnonzero(~is_dropped)
    suppressed = BoxCounts(suppressed=int(is_dropped.sum()))
    return replace(
        raw,
        boxes=raw.boxes[kept],
        class_scores=raw.class_scores[kept],
        counts=raw.counts + suppressed,
    )


def _ious(
    boxes: NDArray[np.float32], others: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Return the IoU [N, M] of boxes [N, 4] and others [M, 4]."""
    ious = pairwise_ious(np.concatenate([boxes, others]))[: len(boxes), len(boxes) :]
    cleaned: NDArray[np.float32] = np.nan_to_num(ious)
    return cleaned
