"""Learnable prompts "[v1 ... vM] {class}." shared by all classes (CoOp; paper section
3.2), encoded by CLIP's frozen text tower.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray.clip.encoder import BACKGROUND, ClipModel, check_context

LEAD = "a photo of a"


class LearnedPrompts(nn.Module):
    """The tokens of "a photo of a" and M new vectors are learned; class names, "." and
    the text tower are frozen.

    Class names of any number of words are tokenised whole. Only parameters are in the
    state dict: the text tower stays outside.
    """

    def __init__(
        self, clip: ClipModel, classes: Sequence[str], context_tokens: int
    ) -> None:
        super().__init__()
        text: Any = clip.network
        placeholder = " ".join(["x"] * context_tokens)
        texts = [f"{LEAD} {placeholder} {name}." for name in (*classes, BACKGROUND)]
        check_context(clip.tokenize, texts)
        tokens = clip.tokenize(texts)
        with torch.no_grad():
            embedded = text.token_embedding(tokens).float()
        lead_tokens = embedded[0, 1 : 1 + len(LEAD.split())]
        new_tokens = 0.02 * torch.randn(context_tokens, embedded.shape[2])
        self.context = nn.Parameter(torch.cat([lead_tokens, new_tokens]))
        self.register_buffer("embedded", embedded, persistent=False)
        self.register_buffer("ends", tokens.argmax(-1), persistent=False)
        self._text = (text,)  # a tuple, so that the frozen tower is no submodule

    embedded: Tensor
    ends: Tensor

    def forward(self) -> Tensor:
        """Return class embeddings [K+1, D], unit length, background last."""
        text: Any = self._text[0]
        if text.text_projection.device != self.context.device:
            text.to(self.context.device)
        start, stop = 1, 1 + len(self.context)
        context = self.context.expand(len(self.embedded), -1, -1)
        x = torch.cat([self.embedded[:, :start], context, self.embedded[:, stop:]], 1)
        x = x + text.positional_embedding
        x = text.transformer(x, attn_mask=text.attn_mask)
        x = text.ln_final(x)
        last_tokens = x[torch.arange(len(x)), self.ends]
        return F.normalize(last_tokens @ text.text_projection, dim=-1)
