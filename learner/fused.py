"""Output head + loss in chunks of tokens, forward and backward, so that [T, V] is never held whole.

The gradient of a chunk is formed while its logits are at hand (the loss is a weighted sum over
tokens), so backward only scales: the trick of Liger's chunked losses (arXiv 2410.10989), for every
support and divergence. T tokens, K chosen ids, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, NamedTuple

import torch

from learner.objective import FLOOR, Divergence, ValueAndGrad, forward_kl
from sdft_dist.logits import LogitTransform, in_tensor_cores, log_softmax_, log_tail, product

# Of one fp32 [chunk, V] buffer. With every chunk the whole gradient of the head is read and written, which on a GPU
# takes as long as a product of some hundred tokens.
CHUNK_BYTES = {"cpu": 128 << 20, "cuda": 512 << 20}
ALIGNED = 64  # rows of the head
Kind = Literal["full", "chosen", "policy_gradient", "cross_entropy", "dft"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """What is done at each position; the same for a whole run."""

    kind: Kind
    divergence: Divergence = forward_kl
    tail: bool = True  # one more category with the mass outside the chosen ids; else renormalise
    temperature: float = 1.0  # divides both models' logits
    importance: Literal["none", "token", "sequence"] = "none"
    importance_clip: float = 2.0
    token_clip: float | None = None  # positions with a larger loss count this much and give no gradient
    transform: LogitTransform = field(default_factory=LogitTransform)
    liger_beta: float | None = None  # of the divergence as Liger's JSD, where its kernel is to be used
    # Kinds full, cross_entropy and dft, without a softcap: between the products, kernels that torch.compile makes.
    compiled: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Targets:
    """What the student is compared with, by position."""

    labels_T: torch.Tensor  # int64, the completion's tokens
    behaviour_T: torch.Tensor | None = None  # fp32, their log-probs when they were sampled
    sequence_T: torch.Tensor | None = None  # int64, number of the sequence, for importance="sequence"
    states_TD: torch.Tensor | None = None  # kind full: the teacher's states ...
    # ... and the heads [V, D] of the versions that they come from: the first `end` states belong to the first one.
    heads: tuple[tuple[int, torch.Tensor], ...] = ()
    ids_TK: torch.Tensor | None = None  # kinds chosen, policy_gradient: int64
    logprobs_TK: torch.Tensor | None = None  # fp32, the teacher's at those ids, over the whole vocabulary
    tail_T: torch.Tensor | None = None  # fp32, log of the teacher's mass outside them


class Losses(NamedTuple):
    """`total` is differentiable; the others are detached, fp32 [T]."""

    total: torch.Tensor  # Σ weights · importance · loss
    per_token: torch.Tensor | None  # before weights, importance and clipping; None from Liger's kernel
    label_logprobs: torch.Tensor | None  # the student's, of the completion's tokens; None from Liger's kernel
    importance: torch.Tensor  # the truncated importance weights; 1 where off


def chunk_size(vocab_size: int, device: str) -> int:
    """Tokens in a chunk on `device`, "cpu" or "cuda": so that one fp32 [chunk, V] buffer takes CHUNK_BYTES."""
    return max(16, CHUNK_BYTES[device] // (4 * vocab_size))


def weighted_loss(
    states_TD: torch.Tensor,
    head_VD: torch.Tensor,
    weights_T: torch.Tensor,
    targets: Targets,
    objective: Objective,
    *,
    vocab_size: int,
) -> Losses:
    """Σ_t weights_t · loss_t over the vocabulary's first `vocab_size` ids.

    Rows of the head from `vocab_size` on are padding and take no part. Differentiable in `states_TD`
    and `head_VD`. Logits are formed in the states' type and reduced in fp32.
    """
    return Losses(*_WeightedLoss.apply(states_TD, head_VD, weights_T, targets, objective, vocab_size))


class _WeightedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_TD: torch.Tensor,
        head_VD: torch.Tensor,
        weights_T: torch.Tensor,
        targets: Targets,
        objective: Objective,
        vocab_size: int,
    ) -> tuple[torch.Tensor, ...]:
        head, n = _aligned(head_VD, vocab_size), len(states_TD)
        grad_states = torch.zeros_like(states_TD)
        frozen = not ctx.needs_input_grad[1]
        grad_head = torch.zeros(0 if frozen else head_VD.shape, dtype=torch.float32, device=head_VD.device)
        per_token, label_logprobs, importance = torch.zeros(3, n, device=states_TD.device).unbind()
        importance.fill_(1.0)
        if objective.importance == "sequence":
            importance.copy_(_sequence_importance(states_TD, head, targets, objective, vocab_size))
        for span in _spans(states_TD, vocab_size):
            z = _transformed(states_TD[span], head, objective)
            slope = objective.transform.slope(z)
            _hide_padding(z, vocab_size)
            if objective.compiled and objective.kind == "full":
                teacher = _teacher_logits(targets, span, objective, vocab_size)
                compiled = _compiled(objective.divergence, objective.temperature, head.dtype)
                own, value, grad = compiled(z, teacher, targets.labels_T[span])
                del z, teacher
            elif objective.compiled and objective.kind in ("cross_entropy", "dft"):
                compiled = _compiled_imitation(objective.kind == "dft", objective.temperature, head.dtype)
                own, value, grad = compiled(z, targets.labels_T[span])
                del z
            else:
                logp = log_softmax_(z, objective.temperature)
                del z  # a buffer of its own on a GPU
                own = logp.gather(-1, targets.labels_T[span, None]).squeeze(-1)
                value, grad = _value_and_grad(logp, targets, span, objective, vocab_size, own)
            label_logprobs[span], per_token[span] = own, value
            if objective.importance == "token":
                importance[span] = _ratio(own, targets, span, objective)
            weight = weights_T[span] * importance[span] / objective.temperature
            if objective.token_clip is not None:
                weight = weight * (value <= objective.token_clip)
            if isinstance(slope, torch.Tensor):
                grad.mul_(slope)
            else:
                weight = weight * slope
            # The weights go on the side of [chunk, D], which is smaller than [chunk, V].
            grad, weight = grad.to(head.dtype), weight.unsqueeze(-1)
            grad_states[span] = (grad @ head) * weight
            if not frozen:
                _add_product(grad_head[: len(head)], grad.T, states_TD[span].float() * weight)
        ctx.save_for_backward(grad_states, grad_head.to(head_VD.dtype))
        ctx.mark_non_differentiable(per_token, label_logprobs, importance)
        counted = per_token if objective.token_clip is None else per_token.clamp(max=objective.token_clip)
        return (counted * weights_T * importance).sum(), per_token, label_logprobs, importance

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> Any:
        grad_states, grad_head = ctx.saved_tensors
        scale = grad_outputs[0]
        head = grad_head.mul_(scale) if ctx.needs_input_grad[1] else None
        return grad_states * scale, head, None, None, None, None


@cache
def _compiled(
    divergence: Divergence, temperature: float, dtype: torch.dtype
) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """From both models' logits, fp32 [chunk, V], to the labels' log-probs and the loss, fp32 [chunk], and the gradient
    [chunk, V] in `dtype`: they are read twice, where one operation after the other reads and writes some twenty times.
    """

    def step(z: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logp, logq = ((logits / temperature).log_softmax(-1) for logits in (z, teacher))
        own = logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        value, grad = divergence(logp, logq)
        return own, value, grad.to(dtype)

    return torch.compile(step)


@cache
def _compiled_imitation(
    dft: bool, temperature: float, dtype: torch.dtype
) -> Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """As `_compiled`, for the labels alone."""

    def step(z: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logp = (z / temperature).log_softmax(-1)
        own = logp.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        factor = own.exp() if dft else torch.ones_like(own)
        chosen = torch.arange(z.shape[-1], device=z.device) == labels.unsqueeze(-1)
        return own, -own * factor, ((logp.exp() - chosen.float()) * factor.unsqueeze(-1)).to(dtype)

    return torch.compile(step)


def _spans(states_TD: torch.Tensor, vocab_size: int) -> Iterator[slice]:
    n, size = len(states_TD), chunk_size(vocab_size, states_TD.device.type)
    return (slice(start, min(start + size, n)) for start in range(0, n, size))


def _aligned(head_VD: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """The head's first `vocab_size` rows and as many of its padding as make them a multiple of ALIGNED: tensor cores
    are slow where rows of logits start at odd addresses, and a tokenizer has 151,669 ids. Padding has no probability.
    """
    return head_VD[: -(-vocab_size // ALIGNED) * ALIGNED]


def _hide_padding(logits: torch.Tensor, vocab_size: int) -> torch.Tensor:
    """In place."""
    logits[:, vocab_size:] = FLOOR
    return logits


def _transformed(states: torch.Tensor, head: torch.Tensor, objective: Objective) -> torch.Tensor:
    """fp32 logits [chunk, V] as the model gives them."""
    return objective.transform(product(states, head))


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a @ b in fp32; `b` is fp32 and is rounded to the type of `a` where tensor cores multiply."""
    if in_tensor_cores(a):
        torch.addmm(total, a, b.to(a.dtype), out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b)


def _teacher_logits(targets: Targets, span: slice, objective: Objective, vocab_size: int) -> torch.Tensor:
    """fp32 [chunk, V]; each state goes through the head of its own teacher version."""
    assert targets.states_TD is not None
    parts, start = [], span.start
    for end, head in targets.heads:
        if start < min(end, span.stop):
            states = targets.states_TD[start : min(end, span.stop)]
            parts.append(_hide_padding(_transformed(states, _aligned(head, vocab_size), objective), vocab_size))
            start = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _value_and_grad(
    logp: torch.Tensor, targets: Targets, span: slice, objective: Objective, vocab_size: int, own: torch.Tensor
) -> ValueAndGrad:
    """Loss [chunk] and its gradient by the student's tempered logits [chunk, V]; overwrites `logp`."""
    if objective.kind == "full":
        teacher = log_softmax_(_teacher_logits(targets, span, objective, vocab_size), objective.temperature)
        return objective.divergence(logp, teacher)
    if objective.kind == "chosen":
        return _chosen(logp, targets, span, objective)
    rows = torch.arange(len(own), device=own.device)
    labels = targets.labels_T[span]
    if objective.kind == "policy_gradient":
        # ∇ KL(p ‖ q) = E_y~p [(log p(y) − log q(y)) ∇ log p(y)]: the score-function estimator.
        assert targets.logprobs_TK is not None
        factor = targets.logprobs_TK[span, 0] - own
        value = -factor
    elif objective.kind == "dft":
        factor = own.exp()  # arXiv 2508.05629: each token weighted by its own detached probability
        value = -own * factor
    else:
        factor, value = torch.ones_like(own), -own
    grad = logp.exp_()
    grad[rows, labels] -= 1.0
    return value, grad.mul_(factor.unsqueeze(-1))


def _chosen(logp: torch.Tensor, targets: Targets, span: slice, objective: Objective) -> ValueAndGrad:
    """The divergence over K ids and, with `tail`, the rest as one more category."""
    assert targets.ids_TK is not None
    assert targets.logprobs_TK is not None
    ids, logq = targets.ids_TK[span], targets.logprobs_TK[span].clone()
    chosen = logp.gather(-1, ids)
    if not objective.tail:
        for part in (chosen, logq):
            part.sub_(part.logsumexp(-1, keepdim=True))
        value, by_category = objective.divergence(chosen, logq)
        return value, logp.zero_().scatter_(-1, ids, by_category)
    assert targets.tail_T is not None
    tail = log_tail(logp, ids)
    student = torch.cat([chosen, tail[:, None]], -1).clamp_(min=FLOOR)  # the chosen may be all there is
    teacher = torch.cat([logq, targets.tail_T[span, None]], -1).clamp_(min=FLOOR)
    value, by_category = objective.divergence(student, teacher)
    # Within the tail the category's gradient falls to each id by its share of the tail's mass.
    share = logp.sub_(tail.clamp(min=FLOOR).unsqueeze(-1)).scatter_(-1, ids, -torch.inf).exp_()
    return value, share.mul_(by_category[:, -1:]).scatter_(-1, ids, by_category[:, :-1])


def _ratio(own: torch.Tensor, targets: Targets, span: slice, objective: Objective) -> torch.Tensor:
    """Truncated importance weights: p_learner(y) / p_generator(y), at most `importance_clip`."""
    assert targets.behaviour_T is not None
    return (own - targets.behaviour_T[span]).exp().clamp(max=objective.importance_clip)


def _sequence_importance(
    states_TD: torch.Tensor, head: torch.Tensor, targets: Targets, objective: Objective, vocab_size: int
) -> torch.Tensor:
    """The mean of a sequence's truncated token weights, at each of its tokens; one more pass of the head."""
    assert targets.sequence_T is not None
    ratios = torch.zeros(len(states_TD), device=states_TD.device)
    for span in _spans(states_TD, vocab_size):
        logits = _hide_padding(_transformed(states_TD[span], head, objective), vocab_size)
        logp = log_softmax_(logits, objective.temperature)
        own = logp.gather(-1, targets.labels_T[span, None]).squeeze(-1)
        ratios[span] = _ratio(own, targets, span, objective)
    # With room for as many sequences as tokens: how many they are is known on the device, which would be waited for.
    totals = torch.zeros(2, len(ratios), device=ratios.device)
    totals[0].index_add_(0, targets.sequence_T, ratios)
    totals[1].index_add_(0, targets.sequence_T, torch.ones_like(ratios))
    return (totals[0] / totals[1])[targets.sequence_T]
