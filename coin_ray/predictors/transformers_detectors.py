"""transformers' detectors: Grounding DINO, LLMDet, OWLv2, OmDet-Turbo and SAM 3 for any
classes; RT-DETR, D-FINE, DEIMv2, LW-DETR and RF-DETR for those they were trained on.

Class vectors come from the logits: the libraries' own post-processing gives one label
and one score, which says nothing about the other classes. Needs the ``teachers`` extra.
"""

from __future__ import annotations

import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from coin_ray.errors import ConfigError, InputError
from coin_ray.predictors.scored_boxes import DUPLICATE_IOU, ScoredBoxes, select_boxes
from coin_ray.predictors.transformers_concepts import OmDetTurbo, Sam3
from coin_ray.predictors.transformers_prompt import (
    Architecture,
    OnePass,
    Prompt,
    forward,
    merge_passes,
    scale_to_pixels,
    split_classes,
)

BATCH_MAX = 8
PROMPT_CACHE_SIZE = 16


@dataclass(frozen=True)
class GroundingDino:
    """Grounding DINO, MM-Grounding DINO and LLMDet. A class's score is the mean over its tokens
    of the sigmoid of their logits.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    pads: bool = True

    def passes(self, classes: Sequence[str]) -> list[tuple[str, ...]]:
        """Return lists of classes that are not longer than the model reads: transformers
        would cut the rest off.
        """
        texts = [f"{_phrase(name)} ." for name in classes]
        tokens = self.tokenizer(texts, add_special_tokens=False)
        counts = [len(ids) for ids in tokens["input_ids"]]
        return split_classes(classes, counts, int(self.model.config.max_text_len) - 2)

    def prompt(self, classes: Sequence[str]) -> Prompt:
        """Return ``a . b . c .`` in lower case as tokens. Raises InputError for names
        without letters and for more text than the model reads.
        """
        text = " . ".join(_phrase(name) for name in classes) + " ."
        tokens = dict(
            self.tokenizer(text, return_tensors="pt", return_token_type_ids=True)
        )
        ids, limit = tokens["input_ids"][0], int(self.model.config.max_text_len)
        if len(ids) > limit:
            raise InputError(
                f"{', '.join(classes)[:100]!r} is {len(ids)} tokens, the model reads"
                f" {limit}; use a shorter name"
            )
        shares = self._token_shares(ids, classes)
        return Prompt(tokens, shares / shares.sum(1, keepdim=True))

    def _token_shares(self, ids: Tensor, classes: Sequence[str]) -> Tensor:
        """Return which tokens belong to which class [K, L], as 0 and 1."""
        separators = self.tokenizer.convert_tokens_to_ids([".", "[CLS]", "[SEP]"])
        ends = torch.isin(ids, torch.tensor(separators))
        # [CLS] begins class 0, each full stop the next one
        class_index = ends.cumsum(0) - 1
        belongs = (class_index == torch.arange(len(classes))[:, None]) & ~ends
        shares = belongs.float()
        if int(ends.sum()) != len(classes) + 2 or not bool(shares.any(1).all()):
            raise InputError(
                "each class name needs a letter or a digit, and no punctuation that"
                f" ends a sentence; got {list(classes)}"
            )
        return shares

    def predict(
        self, images: Sequence[Image.Image], prompt: Prompt
    ) -> tuple[Tensor, Tensor]:
        pixels = self.image_processor(images=list(images), return_tensors="pt")
        text = {
            name: table.expand(len(images), -1) for name, table in prompt.tokens.items()
        }
        prediction = forward(self.model, {**text, **pixels})
        token_scores = prediction.logits.float().sigmoid()
        used = token_scores[..., : prompt.shares.shape[1]].cpu()
        return _boxes_in_pixels(prediction, images), used @ prompt.shares.T


def _phrase(name: str) -> str:
    """Return a class name as a part of the prompt, whose parts end with full stops."""
    return re.sub(r"[.?\s]+", " ", name).strip().lower()


@dataclass(frozen=True)
class Owlv2(OnePass):
    """OWLv2. A class's score is the sigmoid of the logit of the text "a photo of a
    CLASS"; images are padded to squares.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    pads: bool = False

    def prompt(self, classes: Sequence[str]) -> Prompt:
        """Return one text per class as tokens. Raises InputError for an empty name and
        for one longer than the model reads.
        """
        limit = int(self.model.config.text_config.max_position_embeddings)
        names = [" ".join(name.lower().split()) for name in classes]
        texts = [f"a photo of a {name}" for name in names]
        tokens = dict(
            self.tokenizer(
                texts, padding="max_length", max_length=limit, truncation=False
            )
        )
        for name, ids in zip(classes, tokens["input_ids"], strict=True):
            if not name.strip():
                raise InputError(
                    f"a class name needs a letter or a digit; got {name!r}"
                )
            if len(ids) > limit:
                raise InputError(
                    f"the text for class {name!r} has {len(ids)} tokens, the model"
                    f" reads {limit}; use a shorter name"
                )
        tables = {
            name: torch.tensor(tokens[name]) for name in ("input_ids", "attention_mask")
        }
        return Prompt(tables, torch.eye(len(classes)))

    def predict(
        self, images: Sequence[Image.Image], prompt: Prompt
    ) -> tuple[Tensor, Tensor]:
        pixels = self.image_processor(images=list(images), return_tensors="pt")
        text = {
            name: table.repeat(len(images), 1) for name, table in prompt.tokens.items()
        }
        inputs = {**text, "pixel_values": pixels["pixel_values"]}
        prediction = forward(self.model, inputs)
        sides = torch.tensor([max(image.size) for image in images])
        boxes = _unit_boxes(prediction) * sides[:, None, None]
        return boxes, prediction.logits.float().sigmoid().cpu()


@dataclass(frozen=True)
class ClosedSet(OnePass):
    """RT-DETR, RT-DETRv2, D-FINE, DEIMv2, LW-DETR and RF-DETR. A class's score is the
    sigmoid of its logit.
    """

    model: Any
    image_processor: Any
    pads: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        names = self.model.config.id2label
        return tuple(names[number] for number in sorted(names))

    def prompt(self, classes: Sequence[str]) -> Prompt:
        """Return the columns of ``classes``. Raises InputError for a class that the
        model has not learned, with those it has.
        """
        unknown = [name for name in classes if name not in self.classes]
        if unknown:
            raise InputError(
                f"the model has not learned {', '.join(unknown)}; ask it about"
                f" {', '.join(self.classes)}"
            )
        columns = [self.classes.index(name) for name in classes]
        return Prompt({}, torch.eye(len(self.classes))[columns])

    def predict(
        self, images: Sequence[Image.Image], prompt: Prompt
    ) -> tuple[Tensor, Tensor]:
        processed = self.image_processor(images=list(images), return_tensors="pt")
        inputs = {"pixel_values": processed["pixel_values"]}
        if self.model.config.model_type in MASKED_MODELS and "pixel_mask" in processed:
            inputs["pixel_mask"] = processed["pixel_mask"]
        prediction = forward(self.model, inputs)
        scores = prediction.logits.float().sigmoid().cpu() @ prompt.shares.T
        return _boxes_in_pixels(prediction, images), scores


CLOSED_SET_MODELS = ("rt_detr", "rt_detr_v2", "d_fine", "deimv2", "lw_detr", "rf_detr")
MASKED_MODELS = ("lw_detr", "rf_detr")
"""Closed-set models whose images of several sizes are padded to one, with a mask."""
TextPrompted = GroundingDino | Owlv2 | OmDetTurbo | Sam3
TEXT_PROMPTED_MODELS: dict[str, type[TextPrompted]] = {
    "grounding-dino": GroundingDino,
    "mm-grounding-dino": GroundingDino,
    "owlv2": Owlv2,
    "omdet-turbo": OmDetTurbo,
    "sam3": Sam3,
}


class TransformersDetector:
    """One of the models above. ``classes``: those it was trained on; empty for a model
    that accepts any.
    """

    def __init__(
        self, architecture: Architecture, name: str, batch_max: int = BATCH_MAX
    ) -> None:
        self.name, self.batch_max = name, batch_max
        self.classes: Sequence[str] = ()
        if isinstance(architecture, ClosedSet):
            self.classes = architecture.classes
        self._architecture = architecture
        self._prompts: dict[tuple[str, ...], list[Prompt]] = {}
        self._lock = threading.Lock()  # tokenizers can't be used by two threads

    def check(self, classes: Sequence[str]) -> None:
        """Raise InputError if the model can't be asked about ``classes``."""
        self._cached_prompts(classes)

    def detect(
        self, image: Image.Image, classes: Sequence[str], score_min: float
    ) -> ScoredBoxes:
        """Return boxes [N, 4] xyxy pixels and scores [N, len(classes)], best first."""
        return self.detect_batch([image], classes, score_min)[0]

    @torch.inference_mode()
    def detect_batch(
        self, images: Sequence[Image.Image], classes: Sequence[str], score_min: float
    ) -> list[ScoredBoxes]:
        """Detect in each image. Images that would be padded to each other's size go
        through the model apart.
        """
        prompts = self._cached_prompts(classes)
        detections: dict[int, ScoredBoxes] = {}
        for group in self._groups_without_padding(images):
            predicted = self._predict([images[i] for i in group], prompts)
            boxes, scores = (tensor.numpy() for tensor in predicted)
            for row, index in enumerate(group):
                size = images[index].size
                detections[index] = select_boxes(
                    boxes[row], scores[row], size, score_min, DUPLICATE_IOU
                )
        return [detections[index] for index in range(len(images))]

    def _predict(
        self, images: Sequence[Image.Image], prompts: Sequence[Prompt]
    ) -> tuple[Tensor, Tensor]:
        """Return boxes [B, Q, 4] and scores [B, Q, K] of the classes of all prompts."""
        passes = [self._architecture.predict(images, prompt) for prompt in prompts]
        if len(passes) == 1:
            return passes[0]
        return merge_passes([boxes for boxes, _ in passes], [s for _, s in passes])

    def _groups_without_padding(
        self, images: Sequence[Image.Image]
    ) -> Iterable[list[int]]:
        """Return indices of images that can share a batch, the smallest size first."""
        if not self._architecture.pads:
            return [list(range(len(images)))] if images else []
        by_size: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
        for index, image in enumerate(images):
            by_size[image.size].append(index)
        return [by_size[size] for size in sorted(by_size)]

    def _cached_prompts(self, classes: Sequence[str]) -> list[Prompt]:
        key = tuple(classes)
        with self._lock:
            if key not in self._prompts:
                parts = self._architecture.passes(key)
                prompts = [self._architecture.prompt(part) for part in parts]
                while len(self._prompts) >= PROMPT_CACHE_SIZE:
                    oldest = next(iter(self._prompts))
                    del self._prompts[oldest]
                self._prompts[key] = prompts
            return self._prompts[key]


def load_transformers(name: str, batch_max: int = BATCH_MAX) -> TransformersDetector:
    """Load a model by its name on the hub or its folder, on the GPU if there is one.

    Raises ConfigError without transformers and for another kind of model, InputError if
    the model can't be loaded.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "cloud.serve transformers needs transformers: pip install"
            " 'coin-ray[teachers]'"
        ) from None
    try:
        model_type = transformers.AutoConfig.from_pretrained(name).model_type
        _check_model_type(name, model_type)
        if model_type in CLOSED_SET_MODELS:
            processor = transformers.AutoImageProcessor.from_pretrained(name)
            model_class = transformers.AutoModelForObjectDetection
        else:
            processor = transformers.AutoProcessor.from_pretrained(name)
            model_class = transformers.AutoModelForZeroShotObjectDetection
        if model_type == "sam3":
            model_class = transformers.Sam3Model
        network = model_class.from_pretrained(name)
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise InputError(_loading_error(name, error)) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = network.to(device=device, dtype=torch.float32).eval()
    if model_type in CLOSED_SET_MODELS:
        closed_set = ClosedSet(network, processor, pads=model_type in MASKED_MODELS)
        return TransformersDetector(closed_set, name, batch_max)
    text_prompted = TEXT_PROMPTED_MODELS[model_type]
    architecture = text_prompted(
        network, processor.tokenizer, processor.image_processor
    )
    return TransformersDetector(architecture, name, batch_max)


def _check_model_type(name: str, model_type: str) -> None:
    supported = (*TEXT_PROMPTED_MODELS, *CLOSED_SET_MODELS)
    if model_type not in supported:
        raise ConfigError(
            f"{name} is a {model_type} model; the local cloud serves"
            f" {', '.join(supported)}"
        )


def _loading_error(name: str, error: Exception) -> str:
    reason = str(error).strip().split("\n")[0][:200]
    if os.path.isdir(name):
        return (
            f"{name} is no model folder of transformers (expected config.json, weights,"
            f" preprocessor and tokenizer files): {reason}"
        )
    return (
        f"{name} is neither a local folder nor in the cache, and could not be"
        f" downloaded ({reason}). On a machine without network give the folder of a"
        " copy: --cloud.model FOLDER"
    )


def _unit_boxes(prediction: Any) -> Tensor:
    """Return the predicted boxes [B, Q, 4] as xyxy in 0..1."""
    centre_boxes = prediction.pred_boxes.float().cpu()
    boxes: Tensor = box_convert(centre_boxes, "cxcywh", "xyxy")
    return boxes


def _boxes_in_pixels(prediction: Any, images: Sequence[Image.Image]) -> Tensor:
    return scale_to_pixels(_unit_boxes(prediction), images)
