"""Liger's chunked distillation loss (arXiv 2410.10989) in the place of fused.py, for `loss.kernel=liger`.

It computes the same full-vocabulary divergences, but takes the log-softmax in the logits' own type, so in
bf16 it is less exact than fused.py, which reduces in fp32; and it returns nothing but the mean over all
tokens, so it knows no weights of single tokens and no divergence by position.
"""

from __future__ import annotations

import torch

from learner.fused import Losses, Objective, Targets


def weighted_loss(
    states_TD: torch.Tensor,
    head_VD: torch.Tensor,
    weights_T: torch.Tensor,
    targets: Targets,
    objective: Objective,
    *,
    vocab_size: int,
) -> Losses:
    """As fused.weighted_loss; the weights must all be equal, as loss.normalisation=tokens makes them."""
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    assert objective.liger_beta is not None
    assert targets.states_TD is not None
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0,
        weight_soft_loss=1.0,
        beta=objective.liger_beta,
        temperature=objective.temperature,
        compiled=states_TD.device.type == "cuda",
    )
    total, start = states_TD.new_zeros(()), 0
    if not len(states_TD):  # of a rank without a sample, whose gradients are reduced with those of others
        total = 0.0 * (states_TD.sum() + head_VD.sum())
    for end, teacher_head in targets.heads:
        rows = slice(start, end)
        if start < end:
            mean = loss(
                states_TD[rows],
                head_VD[:vocab_size],
                targets.states_TD[rows],
                teacher_head[:vocab_size],
                targets.labels_T[rows],
            )
            total = total + mean * (end - start) * weights_T[0]
        start = end
    return Losses(total=total, per_token=None, label_logprobs=None, importance=torch.ones_like(weights_T))
