"""Soft-label losses of distillation (paper eqs. 8, 12). The mean is over all elements,
as in the published code; ``count``: see ``mean``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from coin_ray.losses.mean import mean

FLOOR = 1e-7


def divergence(logits: Tensor, targets: Tensor, count: float | None = None) -> Tensor:
    """Return KL(target || softmax(logits)) summed and divided by ``count``, or by all
    R x (K+1) elements; 0 log 0 = 0. Targets carry no gradient.
    """
    log_probabilities = (logits.float().softmax(-1) + FLOOR).log()
    return mean(F.kl_div(log_probabilities, targets.detach(), reduction="none"), count)


def divergence_of_probabilities(
    probabilities: Tensor, targets: Tensor, count: float | None = None
) -> Tensor:
    """Return ``divergence`` for a network that outputs probabilities [R, K+1] (CKG on
    consistent boxes, paper eq. 9).
    """
    log_probabilities = (probabilities + FLOOR).log()
    return mean(F.kl_div(log_probabilities, targets, reduction="none"), count)


def private_regions(
    logits: Tensor, teacher_probs: Tensor, count: float | None = None
) -> Tensor:
    """Return the divergence of private boxes, used directly as RoIs [R, K+1], from the
    only teacher that detected them.
    """
    return divergence(logits, teacher_probs, count)


def private_anchors(
    objectness: Tensor, teacher_probs: Tensor, count: float | None = None
) -> Tensor:
    """Return the divergence of anchors [A] that match private boxes: [sigmoid,
    1 - sigmoid] against the teacher's [foreground, background] mass (code only, not in
    the paper).
    """
    student = torch.stack([objectness.sigmoid(), 1 - objectness.sigmoid()], -1)
    log_student = student.clamp(min=FLOOR).log()
    foreground = teacher_probs[:, :-1].sum(-1).clamp(0, 1)
    teacher = torch.stack([foreground, 1 - foreground], -1)
    return mean(F.kl_div(log_student, teacher.detach(), reduction="none"), count)


def inconsistent_regions(
    logits: Tensor, fused_probs: Tensor, score_min: float, count: float | None = None
) -> Tensor:
    """Return the divergence of RoIs on inconsistent boxes [R, K+1] from those fused
    vectors that ``is_confident`` accepts; zero without any.
    """
    rows = is_confident(fused_probs, score_min)
    return divergence(logits[rows], fused_probs[rows], count)


def is_confident(fused_probs: Tensor, score_min: float) -> Tensor:
    """Return a mask [R]: the best probability of a fused vector [R, K+1] reaches
    ``score_min`` (pi).
    """
    return fused_probs.amax(-1) >= score_min
