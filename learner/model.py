"""The student: a Hugging Face causal LM whose output head is fused with the loss.

The head's weight is a parameter of `HeadLoss` too, so that DeepSpeed's ZeRO-3 hooks gather it there:
a head applied outside a hooked module would be an empty shard.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from learner import fused, liger, varlen
from learner.fused import Losses, Objective, Targets
from sdft_dist.adapters import plain_name
from sdft_dist.config import LearnerConfig, ModelConfig
from sdft_dist.errors import UserError
from sdft_dist.logits import LogitTransform
from sdft_dist.vector_math import settle

ONE_ROW = ("flash_attention_2", varlen.NAME)  # implementations that are given where sequences start and end
STATES = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}  # transformers' names of layers that carry a state on
GRAPHS = 128  # that layers may be compiled to in all


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Sequences laid one behind the other in R rows of L slots. C tokens carry loss."""

    input_ids: torch.Tensor  # int64 [R, L]
    position_ids: torch.Tensor  # int64 [R, L], restart at each sequence: attention keeps them apart
    bounds: torch.Tensor  # int32 [N + 1], where sequences (and what follows a row's last) start and end among all slots
    longest: int  # of those
    predicts: torch.Tensor  # int64 [C], slots (row · L + place) whose output predicts a completion token
    weights: torch.Tensor  # fp32 [C]
    targets: Targets


class HeadLoss(nn.Module):
    """Output head + loss in chunks; see fused.py."""

    def __init__(self, weight: nn.Parameter, vocab_size: int, objective: Objective) -> None:
        super().__init__()
        self.weight = weight
        self.vocab_size = vocab_size
        self.objective = objective

    def forward(self, states_CD: torch.Tensor, weights: torch.Tensor, targets: Targets) -> Losses:
        loss = fused.weighted_loss if self.objective.liger_beta is None else liger.weighted_loss
        return loss(states_CD, self.weight, weights, targets, self.objective, vocab_size=self.vocab_size)


class Student(nn.Module):
    """forward(micro-batch) gives the weighted loss (fp32 scalar) and what it was made of, by position."""

    def __init__(self, lm: Any, vocab_size: int, objective: Objective) -> None:
        super().__init__()
        self.lm = lm
        self.head_loss = HeadLoss(lm.get_output_embeddings().weight, vocab_size, objective)

    def forward(self, batch: MicroBatch) -> Losses:
        backbone = self.lm.get_decoder()
        packing: dict[str, Any] = {}
        if backbone.config._attn_implementation in ONE_ROW:
            packing = dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), batch.bounds)
            packing |= dict.fromkeys(("max_length_q", "max_length_k"), batch.longest)
        output = backbone(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **packing)
        states_CD = output.last_hidden_state.flatten(0, 1)[batch.predicts]
        return self.head_loss(states_CD, batch.weights, batch.targets)

    def named_weights(self) -> list[tuple[str, nn.Parameter]]:
        """Parameters under their Hugging Face names, tied ones once, in layer order; adapters under peft's."""
        return [(plain_name(name), p) for name, p in self.lm.named_parameters()]

    def head_name(self) -> str:
        """Name of the output head among `named_weights`: the input embedding's where they are tied."""
        return next(name for name, p in self.named_weights() if p is self.head_loss.weight)


def load_causal_lm(config: ModelConfig) -> Any:
    """The model of `config.path` in training mode, without dropout. Raises UserError where the folder holds none, or
    not the weights that its config.json asks for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settle()
    varlen.register()
    try:
        settings = AutoConfig.from_pretrained(config.path, revision=config.revision)
        zero_dropout(settings)
        lm, found = AutoModelForCausalLM.from_pretrained(
            config.path,
            config=settings,
            revision=config.revision,
            dtype=getattr(torch, config.dtype),
            attn_implementation=config.attention,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told of below
        )
    except (OSError, ValueError) as e:
        raise UserError(f"model.path: {config.path}: no causal language model could be loaded: {e}") from e
    # Of these transformers makes random ones, and tells nobody who could hear of it.
    sizes = (f"{name} is {list(there)}, not {list(due)}" for name, there, due in found["mismatched_keys"])
    unfit = sorted([*(f"{name} is missing" for name in found["missing_keys"]), *sizes])
    if unfit:
        more = f", and {len(unfit) - 3} more" if len(unfit) > 3 else ""
        raise UserError(f"model.path: {config.path}: its weights are not config.json's: {'; '.join(unfit[:3])}{more}")
    if getattr(lm.get_output_embeddings(), "bias", None) is not None:
        raise UserError(f"model.path: {config.path}: an output head with a bias is not supported")
    kinds = set(getattr(lm.config.get_text_config(), "layer_types", None) or ())
    if lm._is_stateful or kinds & STATES:
        # Positions that begin anew tell attention alone where a packed sequence starts.
        raise UserError(
            f"model.path: {config.path}: {type(lm).__name__} has layers that carry a state from token to token (Mamba, "
            "linear attention, convolutions), and so from one packed sequence into the next: give a model whose layers "
            "are all attention"
        )
    if getattr(lm.config, "attn_logit_softcapping", None) and config.attention in ("sdpa", varlen.NAME):
        # sdpa leaves the cap out without a word, and the learner would train another model than vLLM serves.
        raise UserError(
            f"model.attention: this model caps attention logits, which {config.attention} cannot: use eager"
        )
    return lm.train()


def check_head(lm: Any, transform: LogitTransform, path: str) -> None:
    """Raises UserError where the model makes other logits of its decoder's states than `transform` of the output head's
    product: the loss would be another model's."""
    from transformers.modeling_outputs import BaseModelOutputWithPast

    decoder, head = lm.get_decoder(), lm.get_output_embeddings().weight
    states = torch.randn(1, 8, head.shape[1], dtype=head.dtype, device=head.device)
    decoder.forward = lambda *args, **kwargs: BaseModelOutputWithPast(last_hidden_state=states)
    try:
        with torch.no_grad():
            theirs = lm(input_ids=torch.zeros(1, 8, dtype=torch.int64, device=head.device)).logits.float()
            ours = transform((states @ head.T).float())
    finally:
        del decoder.forward
    if (ours - theirs).abs().max() > 0.05 * theirs.abs().max():
        raise UserError(f"model.path: {path}: the output head of {type(lm).__name__} does more than is known here")


def check_packing(lm: Any, path: str) -> None:
    """Raises UserError where a sequence sees the one before it in its row: not all models go by positions that begin
    anew (OPT, Bloom). Other kernels than sdpa and eager are for GPUs, and are not looked at here."""
    decoder = lm.get_decoder()
    if decoder.config._attn_implementation not in ("sdpa", "eager"):
        return
    own = torch.arange(8)

    def after(other: int) -> torch.Tensor:
        ids, places = torch.cat([torch.full_like(own, other), own]), own.repeat(2)
        states = decoder(input_ids=ids[None], position_ids=places[None], use_cache=False).last_hidden_state
        return states[0, len(own) :].float()

    with torch.no_grad():
        one, another = after(1), after(2)
    if (one - another).norm() > 0.1 * one.norm():  # mixtures of experts round differently beside other tokens
        raise UserError(
            f"model.path: {path}: sequences of {type(lm).__name__} that are packed into one row see each other: give "
            "another model"
        )


def zero_dropout(settings: Any) -> None:
    """The student that is trained must be the one that samples, and a resumed run the one that was interrupted."""
    for part in (settings, settings.get_text_config()):
        for name, value in vars(part).items():
            if ("dropout" in name or "pdrop" in name) and isinstance(value, float):
                setattr(part, name, 0.0)


def tune(lm: Any, config: LearnerConfig) -> None:
    """Recomputation and compilation of the decoder layers, as `config` asks for it."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    if config.gradient_checkpointing != "none":
        how: dict[str, Any] = {"use_reentrant": False}
        if config.gradient_checkpointing == "selective":
            how["context_fn"] = partial(create_selective_checkpoint_contexts, _products())
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    if config.compile:
        # Layer by layer: all share their graphs, and lengths differ with every micro-batch. There is a graph for each
        # mix of: with gradients or a mask, or not; one row or more; on CUDA also four ranges of tokens, and rows of
        # 8 n slots or others. After torch's eight, layers would run uncompiled with nothing but a warning.
        torch._dynamo.config.recompile_limit = GRAPHS
        for layer in lm.modules():
            if isinstance(layer, GradientCheckpointingLayer):
                layer.compile(dynamic=True)


def _products() -> list[Any]:
    """The operations whose results are worth keeping: matrix products and attention."""
    aten = torch.ops.aten
    return [
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.torch_attn._varlen_attn.default,
    ]
