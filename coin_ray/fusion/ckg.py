"""The consistent knowledge generation network: class-wise weights of both teachers
(paper section 3.4, eqs. 6, 7).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PrototypeAttention(nn.Module):
    """Multi-head attention of queries [R, D] to prototypes [K+1, D], mapped to one
    weight per class [R, K+1].

    No residual, no normalisation; q, k, v without bias, as in the published code.
    """

    def __init__(self, size: int, classes_with_background: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(size, size, bias=False)
        self.key = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(size, size, bias=False)
        self.output = nn.Linear(size, classes_with_background)
        for layer in (self.query, self.key, self.value, self.output):
            nn.init.xavier_normal_(layer.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, features: Tensor, prototypes: Tensor) -> Tensor:
        query = self._split_heads(self.query(features))
        key = self._split_heads(self.key(prototypes))
        value = self._split_heads(self.value(prototypes))
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        attended = scores.softmax(-1) @ value
        weights: Tensor = self.output(attended.transpose(0, 1).flatten(1))
        return weights

    def _split_heads(self, x: Tensor) -> Tensor:
        """Reshape [N, D] to [heads, N, D / heads]."""
        return x.view(len(x), self.heads, x.shape[1] // self.heads).transpose(0, 1)


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
        """Fuse both teachers' probabilities [R, K+1] into probabilities [R, K+1].

        ``features`` [R, D]: unit-length student RoI features (not differentiated),
        ``prototypes``: of (cloud, CLIP) knowledge, [K+1, D] each.
        """
        features = features.detach()
        weighted_cloud = self.cloud(features, prototypes[0]) * cloud_probs
        weighted_clip = self.clip(features, prototypes[1]) * clip_probs
        fused: Tensor = (weighted_cloud + weighted_clip).softmax(-1)
        return fused

    def weights(self, features: Tensor, prototypes: tuple[Tensor, Tensor]) -> Tensor:
        """Return the weights [2, R, K+1] of the cloud and of CLIP, for diagnosis."""
        cloud_weights = self.cloud(features, prototypes[0])
        clip_weights = self.clip(features, prototypes[1])
        return torch.stack([cloud_weights, clip_weights])
