"""The divergences between teacher q and student p over the whole vocabulary, with their gradients.

Pure functions: logits in, per-token value and gradient with respect to the student's logits out.
B sequences, T tokens, V vocabulary. Formulas: arXiv 2601.19897 and the closed forms derived beside.
Gradients are closed forms because the chunked kernel needs them without an autograd graph; the tests
hold them against autograd in float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

ValueAndGrad = tuple[torch.Tensor, torch.Tensor]


def forward_kl(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> ValueAndGrad:
    """KL(q ‖ p) = Σ_v q (log q − log p); gradient p − q. Both arguments are overwritten.

    Returns value [T] and gradient [T, V] in the arguments' floating type. A token that the teacher
    rules out (log q = −inf) contributes 0.
    """
    logp = student_logits_TV.sub_(student_logits_TV.logsumexp(-1, keepdim=True))
    logq = teacher_logits_TV.sub_(teacher_logits_TV.logsumexp(-1, keepdim=True))
    q = logq.exp()
    value = (q * (logq - logp).masked_fill_(q == 0, 0.0)).sum(-1)
    return value, logp.exp_().sub_(q)


def reverse_kl(student_logits_TV: torch.Tensor, teacher_logits_TV: torch.Tensor) -> ValueAndGrad:
    """KL(p ‖ q) = Σ_v p (log p − log q); gradient p (log p − log q − KL). Arguments are overwritten.

    Returns value [T] and gradient [T, V]. A token that the student rules out contributes 0.
    """
    logp = student_logits_TV.sub_(student_logits_TV.logsumexp(-1, keepdim=True))
    logq = teacher_logits_TV.sub_(teacher_logits_TV.logsumexp(-1, keepdim=True))
    p = logp.exp()
    ratio = logp.sub_(logq).masked_fill_(p == 0, 0.0)
    value = (p * ratio).sum(-1)
    return value, ratio.sub_(value.unsqueeze(-1)).mul_(p)


def cross_entropy(student_logits_TV: torch.Tensor, labels_T: torch.Tensor) -> ValueAndGrad:
    """−log p(label); gradient p − onehot(label). The logits are overwritten. Returns [T], [T, V]."""
    logp = student_logits_TV.sub_(student_logits_TV.logsumexp(-1, keepdim=True))
    rows = torch.arange(len(labels_T), device=labels_T.device)
    value = -logp[rows, labels_T]
    grad = logp.exp_()
    grad[rows, labels_T] -= 1.0
    return value, grad


DIVERGENCES: dict[str, Callable[[torch.Tensor, torch.Tensor], ValueAndGrad]] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
}
