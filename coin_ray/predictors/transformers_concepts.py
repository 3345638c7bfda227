"""SAM 3 and OmDet-Turbo: detectors of transformers that are asked about each class by a
text of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from coin_ray.errors import InputError
from coin_ray.predictors.transformers_prompt import (
    OnePass,
    Prompt,
    forward,
    merge_passes,
    scale_to_pixels,
    split_classes,
)

SAM3_TOKENS = 32
"""Length of SAM 3's texts, as its processor pads them."""
OMDET_TOKENS = 77
TASK_TEXT = "Detect {}."


@dataclass(frozen=True)
class Sam3(OnePass):
    """SAM 3's concept segmentation. A class's score in a box of its own text is the
    sigmoid of the box's logit, times that of the text's presence in the image.

    The model answers one text at a time. A box therefore gets the score of another
    class from the best box of that class which covers the same object.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    pads: bool = False

    def prompt(self, classes: Sequence[str]) -> Prompt:
        """Return one text per class as tokens. Raises InputError for an empty name and
        for one longer than the model reads.
        """
        tokens = tokenize_classes(self.tokenizer, classes, SAM3_TOKENS)
        return Prompt(tokens, torch.eye(len(classes)))

    def predict(
        self, images: Sequence[Image.Image], prompt: Prompt
    ) -> tuple[Tensor, Tensor]:
        """Return the boxes [B, K Q, 4] of all texts and their scores [B, K Q, K]."""
        processed = self.image_processor(images=list(images), return_tensors="pt")
        pixels = processed["pixel_values"].to(self.model.device)
        encoded_images = self.model.get_vision_features(pixel_values=pixels)
        boxes_by_class, scores_by_class = [], []
        for row in range(len(prompt.shares)):
            text = {
                name: table[row : row + 1].expand(len(images), -1).to(pixels.device)
                for name, table in prompt.tokens.items()
            }
            prediction = self.model(vision_embeds=encoded_images, **text)
            presence = prediction.presence_logits.float().sigmoid()
            scores = prediction.pred_logits.float().sigmoid() * presence
            scores_by_class.append(scores.cpu()[..., None])
            unit_boxes = prediction.pred_boxes.float().cpu()
            boxes_by_class.append(scale_to_pixels(unit_boxes, images))
        return merge_passes(boxes_by_class, scores_by_class)


@dataclass(frozen=True)
class OmDetTurbo:
    """OmDet-Turbo. A class's score is the sigmoid of its logit; the task text lists all
    classes.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    pads: bool = False

    def passes(self, classes: Sequence[str]) -> list[tuple[str, ...]]:
        """Return lists of classes whose task text is read as a whole."""
        names = [" ".join(name.split()) for name in classes]
        counts = [len(ids) for ids in self._ids([f"{name}, " for name in names])]
        room = OMDET_TOKENS - 2 - len(self._ids([TASK_TEXT.format("")])[0])
        return split_classes(classes, counts, room)

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of texts, without those at their ends."""
        tokens = self.tokenizer(list(texts), add_special_tokens=False)
        ids: list[list[int]] = tokens["input_ids"]
        return ids

    def prompt(self, classes: Sequence[str]) -> Prompt:
        """Return one text per class and the task as tokens. Raises InputError for an
        empty name and for texts longer than the model reads.
        """
        names = [" ".join(name.split()) for name in classes]
        task = TASK_TEXT.format(", ".join(names))
        class_tokens = tokenize_classes(self.tokenizer, names, OMDET_TOKENS)
        task_tokens = tokenize_classes(self.tokenizer, [task], OMDET_TOKENS)
        tables = {f"classes_{name}": table for name, table in class_tokens.items()}
        tables |= {f"tasks_{name}": table for name, table in task_tokens.items()}
        return Prompt(tables, torch.eye(len(classes)))

    def predict(
        self, images: Sequence[Image.Image], prompt: Prompt
    ) -> tuple[Tensor, Tensor]:
        pixels = self.image_processor(images=list(images), return_tensors="pt")
        text = {
            name: table.repeat(len(images), 1) for name, table in prompt.tokens.items()
        }
        num_classes = len(prompt.shares)
        inputs = {
            **text,
            "classes_structure": torch.full((len(images),), num_classes),
            "pixel_values": pixels["pixel_values"],
        }
        prediction = forward(self.model, inputs)
        centre_boxes = prediction.decoder_coord_logits.float().cpu()
        boxes = box_convert(centre_boxes, "cxcywh", "xyxy")
        scores = prediction.decoder_class_logits.float().sigmoid().cpu()
        return scale_to_pixels(boxes, images), scores[..., :num_classes]


def tokenize_classes(
    tokenizer: Any, texts: Sequence[str], limit: int
) -> dict[str, Tensor]:
    """Return the ids and the attention mask [K, limit] of texts, padded. Raises
    InputError for an empty text and for one with more than ``limit`` tokens.
    """
    empty = [text for text in texts if not text.strip()]
    if empty:
        raise InputError(f"a class name needs a letter or a digit; got {empty[0]!r}")
    tokens = tokenizer(
        list(texts), padding="max_length", max_length=limit, truncation=False
    )
    for text, ids in zip(texts, tokens["input_ids"], strict=True):
        if len(ids) > limit:
            raise InputError(
                f"the text {text!r} has {len(ids)} tokens, the model reads {limit};"
                " use fewer classes, or shorter names"
            )
    return {
        name: torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask")
    }
