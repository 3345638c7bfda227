"""Soft-label losses of distillation (paper eqs. 8, 12); ``mean`` is over all elements, as in the published code."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from coin_ray.parallel import mean

FLOOR = 1e-7


def divergence(logits: Tensor, targets: Tensor, count: int | None = None) -> Tensor:
    """KL(target || softmax(logits)) summed and divided by ``count``, or by all R x (K+1) elements; 0 log 0 = 0. Targets carry no gradient."""
    log_probabilities = (logits.float().softmax(-1) + FLOOR).log()
    return mean(F.kl_div(log_probabilities, targets.detach(), reduction="none"), count)


def divergence_of_probabilities(probabilities: Tensor, targets: Tensor) -> Tensor:
    """As ``divergence``, for a network that outputs probabilities [R, K+1] (CKG on consistent boxes, paper eq. 9)."""
    return mean(F.kl_div((probabilities + FLOOR).log(), targets, reduction="none"))


def private_regions(logits: Tensor, teacher_probs: Tensor) -> Tensor:
    """Private boxes used directly as RoIs [R, K+1] against the one teacher that saw them."""
    return divergence(logits, teacher_probs)


def private_anchors(objectness: Tensor, teacher_probs: Tensor) -> Tensor:
    """Anchors [A] that match private boxes: [sigmoid, 1 - sigmoid] against the teacher's [foreground, background] mass (code only, not in the paper)."""
    student = torch.stack([objectness.sigmoid(), 1 - objectness.sigmoid()], -1).clamp(min=FLOOR)
    foreground = teacher_probs[:, :-1].sum(-1).clamp(0, 1)
    teacher = torch.stack([foreground, 1 - foreground], -1)
    return mean(F.kl_div(student.log(), teacher.detach(), reduction="none"))


def inconsistent_regions(logits: Tensor, fused_probs: Tensor, score_min: float, regions: int | None = None) -> Tensor:
    """RoIs on inconsistent boxes [R, K+1] against the fused vectors whose best probability reaches ``score_min`` (pi). No such row: zero.

    ``regions``: divide by this many RoIs instead of by all elements of the rows used.
    """
    trusted = fused_probs.max(-1).values >= score_min if len(fused_probs) else torch.zeros(0, dtype=torch.bool, device=logits.device)
    return divergence(logits[trusted], fused_probs[trusted], regions)
