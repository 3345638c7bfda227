"""The consistent knowledge generation network: how much to believe each teacher, class
by class (paper section 3.4, eqs. 6, 7).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PrototypeAttention(nn.Module):
    """Queries [R, D] attend to prototypes [K+1, D] with several heads; the result is
    mapped to one weight per class [R, K+1].

    No residual, no normalisation; q, k, v without bias, as in the published code.
    """

    def __init__(self, size: int, classes_with_background: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (
            nn.Linear(size, size, bias=False) for _ in range(3)
        )
        self.output = nn.Linear(size, classes_with_background)
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, features: Tensor, prototypes: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.view(len(x), self.heads, x.shape[1] // self.heads).transpose(0, 1)

        query, key, value = (
            split(self.query(features)),
            split(self.key(prototypes)),
            split(self.value(prototypes)),
        )
        attention = (query @ key.transpose(1, 2) / query.shape[-1] ** 0.5).softmax(-1)
        return self.output((attention @ value).transpose(0, 1).flatten(1))  # type: ignore[no-any-return]


class ConsistentKnowledge(nn.Module):
    """p_ckg = softmax(w_cloud * p_cloud + w_clip * p_clip), weights per RoI and class,
    unbounded.
    """

    def __init__(self, size: int, num_classes: int, heads: int) -> None:
        super().__init__()
        self.cloud = PrototypeAttention(size, num_classes + 1, heads)
        self.clip = PrototypeAttention(size, num_classes + 1, heads)

    def forward(
        self,
        features: Tensor,
        prototypes: tuple[Tensor, Tensor],
        cloud_probs: Tensor,
        clip_probs: Tensor,
    ) -> Tensor:
        """``features`` [R, D] unit-length student RoI features (not differentiated),
        ``prototypes`` of (cloud, CLIP) knowledge [K+1, D], probabilities [R, K+1] ->
        fused probabilities [R, K+1].
        """
        features = features.detach()
        weighted: Tensor = (
            self.cloud(features, prototypes[0]) * cloud_probs
            + self.clip(features, prototypes[1]) * clip_probs
        )
        return weighted.softmax(-1)

    def weights(self, features: Tensor, prototypes: tuple[Tensor, Tensor]) -> Tensor:
        """[2, R, K+1] weights of the cloud and of CLIP, for diagnosis."""
        return torch.stack(
            [self.cloud(features, prototypes[0]), self.clip(features, prototypes[1])]
        )
