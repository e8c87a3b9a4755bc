"""`model.attention=varlen`: attention over packed sequences by torch's own FlashAttention, without a mask.

torch.nn.attention.varlen comes with torch, so that packing at full speed needs no other package to be built. It is
for CUDA and 16-bit types. Sequences lie one behind the other: T tokens, N sequences, H heads of width D, of which keys
and values may have fewer.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.nn.attention import varlen

NAME = "varlen"
# torch 2.11 has no such option, and does not say that it takes fewer heads of keys than of queries.
GROUPED = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def register() -> None:
    """Make it known to transformers under NAME. Without a mask function of that name it makes no masks."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    cu_seq_lens_q: torch.Tensor,
    max_length_q: int,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sequence: [R, H, T, D] three times to [R, T, H, D].

    `cu_seq_lens_q`, int32 [N + 1], says where sequences start and end among the R · T tokens; the longest has
    `max_length_q`. A token sees `sliding_window` tokens, itself among them. Raises ValueError for dropout and capped
    logits, which the kernel does not know.
    """
    if dropout or softcap:
        raise ValueError("model.attention: varlen knows neither attention dropout nor capped logits: use eager")
    rows = len(query)
    groups = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"enable_gqa": groups > 1} if GROUPED else {}
    if groups > 1 and not GROUPED:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (query, key, value))
    out = varlen.varlen_attn(
        q, k, v, cu_seq_lens_q, cu_seq_lens_q, max_length_q, max_length_q,
        scale=scaling, window_size=(sliding_window - 1 if sliding_window else -1, 0), **options,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)
    return out.unflatten(0, (rows, -1)), None
