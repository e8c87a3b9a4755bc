"""From an output head's product to log-probabilities: what models do to logits, and the tail's mass.

Shared by the learner, which differentiates it, and the teacher actor, which ships chosen ids.
T tokens, K chosen ids, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitTransform:
    """z → softcap · tanh(scale · z / softcap)."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """In place."""
        if self.scale != 1.0:
            logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def slope(self, transformed: torch.Tensor) -> torch.Tensor | float:
        """Derivative at the transformed logits."""
        if self.softcap is None:
            return self.scale
        return (1 - (transformed / self.softcap).square()).mul_(self.scale)


def logit_transform(settings: Any) -> LogitTransform:
    """What the model with these Hugging Face settings does: Gemma caps (`final_logit_softcapping`),
    Cohere multiplies (`logit_scale`), Granite divides (`logits_scaling`)."""
    scale = float(getattr(settings, "logit_scale", None) or 1.0) / float(getattr(settings, "logits_scaling", None) or 1)
    return LogitTransform(scale=scale, softcap=getattr(settings, "final_logit_softcapping", None))


def product(states_TD: torch.Tensor, head_VD: torch.Tensor) -> torch.Tensor:
    """fp32 [T, V]: what a head makes of states. On CUDA it is not rounded to their type on the way, by which bf16 would
    move logits of 16 and more by up to 0.06."""
    if in_tensor_cores(states_TD):
        return torch.mm(states_TD, head_VD.T, out_dtype=torch.float32)
    return (states_TD @ head_VD.T).float()


def in_tensor_cores(operand: torch.Tensor) -> bool:
    """Whether CUDA multiplies operands of this type with sums in fp32; an fp32 product takes ten times as long."""
    return operand.is_cuda and operand.dtype != torch.float32


def log_softmax_(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """log softmax(logits / temperature) over the last axis; may overwrite its argument."""
    if temperature != 1.0:
        logits.div_(temperature)
    if logits.device.type == "cpu":  # whose kernel has read a row when it writes it
        return torch.log_softmax(logits, -1, out=logits)
    return logits.log_softmax(-1)


def log_tail(logp_TV: torch.Tensor, ids_TK: torch.Tensor) -> torch.Tensor:
    """Log of the mass [T] outside `ids_TK`, summed over the other ids and so exact also where the
    chosen ones hold nearly everything; −inf where they are the whole vocabulary."""
    return logp_TV.scatter(-1, ids_TK, -torch.inf).logsumexp(-1)
