"""transformers' detectors behind the local cloud: Grounding DINO and OWLv2 for any
classes, RT-DETR and D-FINE for their own.

Class vectors come from the logits: a label and a score, as the libraries' own
post-processing gives, says nothing of the other classes. Needs the ``teachers`` extra.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from torchvision.ops import box_convert

from coin_ray.errors import ConfigError, InputError
from coin_ray.predictors.onnx_detectors import suppressed
from coin_ray.serving.batching import Found

BATCH_MAX = 8
DUPLICATE_IOU = 0.7
PROMPTS_KEPT = 16


@dataclass(frozen=True, eq=False)
class Prompt:
    """A class list as a model reads it: token tables [R, L] by argument name, and the
    share of each token in each class [K, L].
    """

    tokens: dict[str, Tensor]
    shares: Tensor


class _Model(Protocol):
    @property
    def pads(self) -> bool:
        """Whether images of different sizes change each other's results in one batch."""

    def prompt(self, classes: Sequence[str]) -> Prompt: ...

    def predict(
        self, images: Sequence[Image.Image], prompt: Prompt
    ) -> tuple[Tensor, Tensor]:
        """All candidates: boxes [B, Q, 4] xyxy pixels of each image, scores [B, Q, K]."""


@dataclass(frozen=True)
class GroundingDino:
    """Grounding DINO and MM-Grounding DINO. A class's score is the mean over its tokens
    of the sigmoid of their logits.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    pads: bool = True

    def prompt(self, classes: Sequence[str]) -> Prompt:
        """``a . b . c .`` in lower case. Raises InputError for names without letters
        and for more text than the model reads.
        """
        text = (
            " . ".join(
                re.sub(r"[.?\s]+", " ", name).strip().lower() for name in classes
            )
            + " ."
        )
        tokens = dict(
            self.tokenizer(text, return_tensors="pt", return_token_type_ids=True)
        )
        ids, limit = tokens["input_ids"][0], int(self.model.config.max_text_len)
        if len(ids) > limit:
            raise InputError(
                f"{len(classes)} classes are {len(ids)} tokens, the model reads"
                f" {limit}; ask about fewer or shorter names"
            )
        ends = torch.isin(
            ids,
            torch.tensor(self.tokenizer.convert_tokens_to_ids([".", "[CLS]", "[SEP]"])),
        )
        number = ends.cumsum(0) - 1  # [CLS] begins class 0, each full stop the next one
        shares = ((number == torch.arange(len(classes))[:, None]) & ~ends).float()
        if int(ends.sum()) != len(classes) + 2 or not bool(shares.any(1).all()):
            raise InputError(
                "each class name needs a letter or a digit, and no punctuation that"
                f" ends a sentence; got {list(classes)}"
            )
        return Prompt(tokens, shares / shares.sum(1, keepdim=True))

    def predict(
        self, images: Sequence[Image.Image], prompt: Prompt
    ) -> tuple[Tensor, Tensor]:
        pixels = self.image_processor(images=list(images), return_tensors="pt")
        text = {
            name: table.expand(len(images), -1) for name, table in prompt.tokens.items()
        }
        output = _forward(self.model, {**text, **pixels})
        scores = (
            output.logits.float().sigmoid()[..., : prompt.shares.shape[1]].cpu()
            @ prompt.shares.T
        )
        sizes = torch.tensor([[*image.size, *image.size] for image in images])
        return (
            box_convert(output.pred_boxes.float().cpu(), "cxcywh", "xyxy")
            * sizes[:, None],
            scores,
        )


@dataclass(frozen=True)
class Owlv2:
    """OWLv2. A class's score is the sigmoid of the logit of the text "a photo of a
    CLASS"; images are padded to squares.
    """

    model: Any
    tokenizer: Any
    image_processor: Any
    pads: bool = False

    def prompt(self, classes: Sequence[str]) -> Prompt:
        """One text per class. Raises InputError for an empty name and for one longer
        than the model reads.
        """
        limit = int(self.model.config.text_config.max_position_embeddings)
        texts = [f"a photo of a {' '.join(name.lower().split())}" for name in classes]
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
                    f" reads {limit}; give a shorter name"
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
        output = _forward(self.model, {**text, "pixel_values": pixels["pixel_values"]})
        sides = torch.tensor([max(image.size) for image in images])
        boxes = (
            box_convert(output.pred_boxes.float().cpu(), "cxcywh", "xyxy")
            * sides[:, None, None]
        )
        return boxes, output.logits.float().sigmoid().cpu()


@dataclass(frozen=True)
class ClosedSet:
    """RT-DETR, RT-DETRv2 and D-FINE. A class's score is the sigmoid of its logit."""

    model: Any
    image_processor: Any
    pads: bool = False

    @property
    def classes(self) -> tuple[str, ...]:
        names = self.model.config.id2label
        return tuple(names[number] for number in sorted(names))

    def prompt(self, classes: Sequence[str]) -> Prompt:
        """Raises InputError for a class that the model has not learned, with those it
        has.
        """
        unknown = [name for name in classes if name not in self.classes]
        if unknown:
            raise InputError(
                f"the model has not learned {', '.join(unknown)}; ask it about"
                f" {', '.join(self.classes)}"
            )
        return Prompt(
            {},
            torch.eye(len(self.classes))[
                [self.classes.index(name) for name in classes]
            ],
        )

    def predict(
        self, images: Sequence[Image.Image], prompt: Prompt
    ) -> tuple[Tensor, Tensor]:
        output = _forward(
            self.model,
            {
                "pixel_values": self.image_processor(
                    images=list(images), return_tensors="pt"
                )["pixel_values"]
            },
        )
        sizes = torch.tensor([[*image.size, *image.size] for image in images])
        boxes = (
            box_convert(output.pred_boxes.float().cpu(), "cxcywh", "xyxy")
            * sizes[:, None]
        )
        return boxes, output.logits.float().sigmoid().cpu() @ prompt.shares.T


CLOSED = ("rt_detr", "rt_detr_v2", "d_fine")
KINDS: dict[str, type[GroundingDino] | type[Owlv2]] = {
    "grounding-dino": GroundingDino,
    "mm-grounding-dino": GroundingDino,
    "owlv2": Owlv2,
}


class TransformersDetector:
    """One of the models above. ``classes``: those it has learned; none: it can be asked
    about any.
    """

    def __init__(self, model: _Model, name: str, batch_max: int = BATCH_MAX) -> None:
        self.name, self.batch_max = name, batch_max
        self.classes: Sequence[str] = (
            model.classes if isinstance(model, ClosedSet) else ()
        )
        self._model = model
        self._prompts: dict[tuple[str, ...], Prompt] = {}
        self._lock = threading.Lock()  # tokenizers can't be used by two threads

    def check(self, classes: Sequence[str]) -> None:
        """Raises InputError if the model can't be asked about ``classes``."""
        self._prompt(classes)

    def detect(
        self, image: Image.Image, classes: Sequence[str], score_min: float
    ) -> Found:
        """Boxes [N, 4] xyxy pixels and scores [N, len(classes)], best first."""
        return self.detect_batch([image], classes, score_min)[0]

    @torch.inference_mode()
    def detect_batch(
        self, images: Sequence[Image.Image], classes: Sequence[str], score_min: float
    ) -> list[Found]:
        """``detect`` for each image. Images that would be padded to each other's size
        go through the model apart.
        """
        prompt = self._prompt(classes)
        found: dict[int, Found] = {}
        for group in self._groups(images):
            boxes, scores = self._model.predict([images[i] for i in group], prompt)
            for i, b, s in zip(group, boxes.numpy(), scores.numpy(), strict=True):
                found[i] = suppressed(b, s, images[i].size, score_min, DUPLICATE_IOU)
        return [found[i] for i in range(len(images))]

    def _groups(self, images: Sequence[Image.Image]) -> Iterator[list[int]]:
        def size(i: int) -> tuple[int, int]:
            return images[i].size if self._model.pads else (0, 0)

        return (
            list(group)
            for _, group in groupby(sorted(range(len(images)), key=size), size)
        )

    def _prompt(self, classes: Sequence[str]) -> Prompt:
        key = tuple(classes)
        with self._lock:
            if key not in self._prompts:
                prompt = self._model.prompt(key)
                while len(self._prompts) >= PROMPTS_KEPT:
                    del self._prompts[next(iter(self._prompts))]
                self._prompts[key] = prompt
            return self._prompts[key]


def load_transformers(name: str, batch_max: int = BATCH_MAX) -> TransformersDetector:
    """A model by its name on the hub or its folder, on the GPU if there is one.

    Raises ConfigError without transformers and for another kind of model, InputError if
    the model can't be had.
    """
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "cloud.serve transformers needs transformers: pip install"
            " 'coin-ray[teachers]'"
        ) from None
    try:
        kind = transformers.AutoConfig.from_pretrained(name).model_type
        if kind not in (*KINDS, *CLOSED):
            raise ConfigError(
                f"{name} is a {kind} model; the local cloud serves"
                f" {', '.join((*KINDS, *CLOSED))}"
            )
        automatic = (
            transformers.AutoImageProcessor
            if kind in CLOSED
            else transformers.AutoProcessor
        )
        of_kind = (
            transformers.AutoModelForObjectDetection
            if kind in CLOSED
            else transformers.AutoModelForZeroShotObjectDetection
        )
        processor, network = (
            automatic.from_pretrained(name),
            of_kind.from_pretrained(name),
        )
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise InputError(_unavailable(name, error)) from None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    network = network.to(device=device, dtype=torch.float32).eval()
    if kind in CLOSED:
        return TransformersDetector(ClosedSet(network, processor), name, batch_max)
    return TransformersDetector(
        KINDS[kind](network, processor.tokenizer, processor.image_processor),
        name,
        batch_max,
    )


def _unavailable(name: str, error: Exception) -> str:
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


def _forward(model: Any, inputs: dict[str, Any]) -> Any:
    return model(**{name: value.to(model.device) for name, value in inputs.items()})
