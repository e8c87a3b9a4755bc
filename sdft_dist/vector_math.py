"""A guard against one silently imprecise step: MKL's vector functions, at their first use.

torch's CPU builds compute cos, exp, … of whole tensors with MKL, each thread a part. MKL 2024 chooses a
function's kernel when it is first called, without a lock: where two threads make that call at once, one
may compute its part to 11 bits instead of 23 (github.com/pytorch/pytorch/issues/188792). It has made the
first step of a resumed run differ by 1e-4.
"""

from __future__ import annotations

import torch

FUNCTIONS = (
    torch.acos, torch.asin, torch.atan, torch.cos, torch.erf, torch.erfc, torch.erfinv, torch.exp, torch.expm1,
    torch.lgamma, torch.log, torch.log10, torch.log1p, torch.log2, torch.sigmoid, torch.sin, torch.sqrt, torch.tan,
    torch.tanh,
)  # fmt: skip


def settle() -> None:
    """Call every vector function once from one thread; afterwards all threads find its kernel chosen."""
    for dtype in (torch.float32, torch.float64):
        half = torch.full((1,), 0.5, dtype=dtype)
        for function in FUNCTIONS:
            function(half)
