"""Self-promotion gradient alignment: CKG is right when inconsistent boxes pull the
student where consistent ones do (paper eq. 10).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray.losses.mean import mean
from coin_ray.parallel import global_values, worker_count

SCALE = 1e4
"""Both losses are multiplied by this before differentiation; it cancels in the cosine.
"""


def squared_error(
    logits: Tensor, targets: Tensor, count: float | None = None
) -> Tensor:
    """Mean squared difference of softmax(logits) [R, K+1] and ``targets``. Unlike KL it
    is twice differentiable in the target.
    """
    return mean((logits.float().softmax(-1) - targets) ** 2, count)


def gradient_misalignment(
    consistent_loss: Tensor,
    inconsistent_loss: Tensor,
    parameters: Sequence[nn.Parameter],
) -> Tensor:
    """Mean over ``parameters`` of 1 - cosine(gradient of either loss), rows of matrices
    compared one by one, biases whole.

    Gradient flows into whatever produced the targets of ``inconsistent_loss`` (double
    backward), not into the direction of ``consistent_loss``. Each worker returns 1/n of
    the value; the sum over workers of its gradients is exact.
    """
    with torch.autocast(consistent_loss.device.type, enabled=False):
        right = torch.autograd.grad(
            SCALE * consistent_loss, parameters, create_graph=True
        )
        ours = torch.autograd.grad(
            SCALE * inconsistent_loss, parameters, create_graph=True
        )
        whole = global_values([*right, *ours])
        angles = [
            1 - _cosine(b, a.detach())
            for a, b in zip(whole[: len(right)], whole[len(right) :], strict=True)
        ]
        value = torch.stack(angles).mean()
    # The value is global on every worker while its gradient is this worker's part:
    # shrink the value only.
    return value - value.detach() * (1 - 1 / worker_count())


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    rows_a, rows_b = (a, b) if a.ndim == 2 else (a[None], b[None])
    return F.cosine_similarity(rows_a, rows_b, dim=1).mean()
