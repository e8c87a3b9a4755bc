"""Low-rank adapters in the student, by peft: only they are trained, averaged, saved and pushed."""

from __future__ import annotations

from typing import Any

from torch import nn

from sdft_dist.config import LoraConfig
from sdft_dist.errors import UserError


def peft_config(lora: LoraConfig) -> Any:
    """Peft's own record of the adapters. There is no dropout: the student that is trained must be the one that
    samples."""
    import peft

    targets = lora.targets[0] if lora.targets == ("all-linear",) else list(lora.targets)
    return peft.LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, lora_dropout=0.0, task_type="CAUSAL_LM"
    )


def attach(lm: Any, lora: LoraConfig) -> None:
    """Put adapters into `lm`, which computes what it did until they are trained, and freeze all else. Raises
    UserError where `lora.targets` are not there or are no linear layers."""
    from peft import inject_adapter_in_model
    from peft.tuners.lora import LoraLayer

    try:
        inject_adapter_in_model(peft_config(lora), lm)
    except ValueError as e:
        raise UserError(f"model.lora.targets: {e}") from e
    if isinstance(lm.get_output_embeddings(), LoraLayer):
        raise UserError("model.lora.targets: the output head cannot have an adapter: leave it out")
    for name, module in lm.named_modules():
        if isinstance(module, LoraLayer) and not isinstance(module.get_base_layer(), nn.Linear):
            raise UserError(f"model.lora.targets: {name} is no linear layer: name only those, or all-linear")
