"""Linear head + loss in chunks of tokens, forward and backward, so that [T, V] is never held whole.

The gradient of a chunk is formed while its logits are at hand (the loss is a weighted sum over
tokens), so backward only scales: the trick of Liger's chunked losses (arXiv 2410.10989), for any
divergence of objective.py. T tokens, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from learner.objective import DIVERGENCES, ValueAndGrad, cross_entropy

CHUNK_BYTES = 128 << 20  # of one fp32 [chunk, V] buffer


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What the student is pulled towards: a teacher's states and head, or labels."""

    labels_T: torch.Tensor | None = None  # int64
    states_TD: torch.Tensor | None = None
    head_VD: torch.Tensor | None = None
    divergence: str = "forward_kl"


def chunk_size(vocab_size: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """Tokens in a chunk so that one fp32 [chunk, V] buffer takes about `chunk_bytes`."""
    return max(16, chunk_bytes // (4 * vocab_size))


def weighted_loss(
    states_TD: torch.Tensor,
    head_VD: torch.Tensor,
    weights_T: torch.Tensor,
    targets: Targets,
    *,
    vocab_size: int,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Σ_t weights_t · loss_t over the vocabulary's first `vocab_size` ids, and the detached loss_t.

    Rows of the head from `vocab_size` on are padding and take no part. Differentiable in `states_TD`
    and `head_VD`. Logits are formed in the states' type and reduced in fp32. Both models' logits are
    divided by `temperature`.

    Returns a scalar fp32 and an fp32 [T].
    """
    return _WeightedLoss.apply(states_TD, head_VD, weights_T, targets, vocab_size, temperature)


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_TD: torch.Tensor,
        head_VD: torch.Tensor,
        weights_T: torch.Tensor,
        targets: Targets,
        vocab_size: int,
        temperature: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = head_VD[:vocab_size]
        grad_states = torch.zeros_like(states_TD)
        grad_head = torch.zeros(head_VD.shape, dtype=torch.float32, device=head_VD.device)
        losses = torch.zeros(len(states_TD), dtype=torch.float32, device=states_TD.device)
        for rows in torch.arange(len(states_TD)).split(chunk_size(vocab_size)):
            span = slice(int(rows[0]), int(rows[-1]) + 1) if len(rows) else slice(0, 0)
            student = _logits(states_TD[span], head, temperature)
            losses[span], grad = _value_and_grad(student, targets, span, vocab_size, temperature)
            grad.mul_((weights_T[span] / temperature).unsqueeze(-1))
            grad = grad.to(head.dtype)
            grad_states[span] = grad @ head
            grad_head[:vocab_size].addmm_(grad.T.float(), states_TD[span].float())
        ctx.save_for_backward(grad_states, grad_head.to(head_VD.dtype))
        ctx.mark_non_differentiable(losses)
        return (losses * weights_T).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        grad_states, grad_head = ctx.saved_tensors
        scale = grad_outputs[0]
        return grad_states * scale, grad_head * scale, None, None, None, None


def _logits(states: torch.Tensor, head: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = (states @ head.T).float()
    return logits if temperature == 1.0 else logits.div_(temperature)


def _value_and_grad(
    student: torch.Tensor, targets: Targets, span: slice, vocab_size: int, temperature: float
) -> ValueAndGrad:
    if targets.labels_T is not None:
        return cross_entropy(student, targets.labels_T[span])
    assert targets.states_TD is not None
    assert targets.head_VD is not None
    teacher = _logits(targets.states_TD[span], targets.head_VD[:vocab_size], temperature)
    divergence: Callable[[torch.Tensor, torch.Tensor], ValueAndGrad] = DIVERGENCES[targets.divergence]
    return divergence(student, teacher)
