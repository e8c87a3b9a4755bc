"""Divergences between teacher q and student p, with their gradients in closed form.

Pure functions of log-probabilities over C categories: the whole vocabulary, or K chosen ids and the
rest (see fused.py). D(p, q) is differentiated with respect to the student's category logits a, where
p = softmax(a): ∂D/∂a = p · (g − Σ p g) with g = ∂D/∂p. The teacher is a constant.
Formulas: arXiv 2601.19897; jsd is the generalised Jensen-Shannon divergence of arXiv 2306.13649.
T tokens, C categories. Arguments are overwritten, because at full support they are the largest
buffers of the run. They must be finite: FLOOR stands for log 0, so that 0 · log 0 is 0 and not a NaN.
The tests hold every gradient against autograd in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

ValueAndGrad = tuple[torch.Tensor, torch.Tensor]
Divergence = Callable[[torch.Tensor, torch.Tensor], ValueAndGrad]

FLOOR = -1e30


def forward_kl(logp_TC: torch.Tensor, logq_TC: torch.Tensor) -> ValueAndGrad:
    """KL(q ‖ p) = Σ q (log q − log p); gradient p − q. Returns [T] and [T, C]."""
    terms = logq_TC - logp_TC
    q = logq_TC.exp_()
    value = terms.mul_(q).sum(-1)
    return value, torch.sub(logp_TC.exp_(), q, out=terms)


def reverse_kl(logp_TC: torch.Tensor, logq_TC: torch.Tensor) -> ValueAndGrad:
    """KL(p ‖ q) = Σ p (log p − log q); gradient p (log p − log q − KL). Returns [T] and [T, C]."""
    terms = torch.sub(logp_TC, logq_TC, out=logq_TC)
    p = logp_TC.exp_()
    value = terms.mul_(p).sum(-1)
    return value, torch.addcmul(terms, p, value.unsqueeze(-1), value=-1, out=terms)


def jsd(logp_TC: torch.Tensor, logq_TC: torch.Tensor, *, beta: float) -> ValueAndGrad:
    """β KL(q ‖ m) + (1−β) KL(p ‖ m) with m = (1−β) p + β q; gradient p (g − Σ p g) with
    g = (1−β) (log p − log m). Returns [T] and [T, C]."""
    p, q = logp_TC.exp(), logq_TC.exp()
    logm = torch.lerp(p, q, beta).log_().clamp_(min=FLOOR)
    from_teacher = logq_TC.sub_(logm).mul_(q).sum(-1)
    terms = logp_TC.sub_(logm).mul_(p)
    from_student = terms.sum(-1)
    value = beta * from_teacher + (1 - beta) * from_student
    return value, torch.addcmul(terms, p, from_student.unsqueeze(-1), value=-1, out=terms).mul_(1 - beta)


def divergence(name: str, beta: float) -> Divergence:
    """The divergence that `loss.divergence` names."""
    named: dict[str, Divergence] = {
        "forward_kl": forward_kl,
        "reverse_kl": reverse_kl,
        "jsd": partial(jsd, beta=beta),
    }
    return named[name]
