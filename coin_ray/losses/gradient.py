"""Self-promotion gradient alignment: CKG is right when inconsistent boxes pull the
student where consistent ones do (paper eq. 10).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coin_ray.losses.mean import mean
from coin_ray.parallel import sum_with_local_gradient, worker_count

SCALE = 1e4
"""Both losses are multiplied by this before differentiation; it cancels in the cosine.
"""


def squared_error(
    logits: Tensor, targets: Tensor, count: float | None = None
) -> Tensor:
    """Return the mean squared difference of softmax(logits) [R, K+1] and ``targets``.
    Unlike KL it is twice differentiable in the target.
    """
    return mean((logits.float().softmax(-1) - targets) ** 2, count)


def gradient_misalignment(
    consistent_loss: Tensor,
    inconsistent_loss: Tensor,
    parameters: Sequence[nn.Parameter],
) -> Tensor:
    """Return the mean over ``parameters`` of 1 - cosine(gradients of both losses);
    matrices are compared row by row, biases whole.

    Gradient flows into whatever produced the targets of ``inconsistent_loss`` (double
    backward), not into the direction of ``consistent_loss``. Each worker returns 1/n of
    the value; the sum over workers of its gradients is exact.
    """
    with torch.autocast(consistent_loss.device.type, enabled=False):
        consistent_gradients = torch.autograd.grad(
            SCALE * consistent_loss, parameters, create_graph=True
        )
        inconsistent_gradients = torch.autograd.grad(
            SCALE * inconsistent_loss, parameters, create_graph=True
        )
        # one message for both losses
        gradients = sum_with_local_gradient(
            [*consistent_gradients, *inconsistent_gradients]
        )
        count = len(parameters)
        distances = [
            1 - _cosine(inconsistent, consistent.detach())
            for consistent, inconsistent in zip(
                gradients[:count], gradients[count:], strict=True
            )
        ]
        misalignment = torch.stack(distances).mean()
    # The value is global on every worker while its gradient is this worker's part:
    # shrink the value only.
    return misalignment - misalignment.detach() * (1 - 1 / worker_count())


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    if a.ndim != 2:
        a, b = a[None], b[None]
    return F.cosine_similarity(a, b, dim=1).mean()
