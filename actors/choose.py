"""A teacher's log-probabilities at chosen ids, from its final hidden states.

Runs in the teacher actor, so that K numbers travel in the place of a state, and for completion
positions only. C completion tokens, K chosen ids, V vocabulary, D width.
"""

from __future__ import annotations

import numpy as np
import torch

from sdft_dist.logits import LogitTransform, log_softmax_, log_tail, product

CHUNK_BYTES = 128 << 20  # of one fp32 [chunk, V] buffer


def choose(
    states_CD: np.ndarray,
    head_VD: torch.Tensor,
    ids: np.ndarray | int,
    transform: LogitTransform,
    temperature: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, log-probs and the log of the remaining mass: int32 [C, K], float32 [C, K], float32 [C].

    `ids` are int32 [C, K], or a number K for the likeliest. Log-probs are over all V ids at `temperature`.
    bf16 states come as uint16.
    """
    states = torch.from_numpy(states_CD)
    if states_CD.dtype == np.uint16:
        states = states.view(torch.bfloat16)
    size = max(1, CHUNK_BYTES // (4 * len(head_VD)))
    parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for start in range(0, len(states), size):
        rows = states[start : start + size].to(head_VD.device, head_VD.dtype)
        logp = log_softmax_(transform(product(rows, head_VD)), temperature)
        if isinstance(ids, int):
            chosen = logp.topk(min(ids, logp.shape[-1]), -1).indices
        else:
            chosen = torch.from_numpy(ids[start : start + size].astype(np.int64)).to(logp.device)
        parts.append((chosen, logp.gather(-1, chosen), log_tail(logp, chosen)))
    found, logprobs, tail = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return found.astype(np.int32), logprobs, tail
