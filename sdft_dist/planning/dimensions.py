"""The sizes of a model that time and memory depend on: a decoder with grouped-query attention and a gated MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdft_dist.config import Config
from sdft_dist.errors import UserError

# Hugging Face's model types that normalise queries and keys.
HEAD_NORMS = ("qwen3", "olmo2", "olmo3", "gemma3_text")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")  # what configurations call their number


@dataclass(frozen=True, kw_only=True, slots=True)
class Dimensions:
    """Of one model, in numbers of layers, heads, ids and features."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    head_norms: bool  # of queries and keys

    @property
    def body(self) -> int:
        """Parameters of all layers."""
        attention = self.width * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return self.layers * (attention + 3 * self.width * self.mlp_width)

    @property
    def head(self) -> int:
        """Parameters of the output head."""
        return self.vocab * self.width

    @property
    def total(self) -> int:
        """All parameters."""
        return self.body + self.head * (1 if self.tied else 2)

    def adapters(self, rank: int) -> int:
        """Parameters of adapters of all linear layers of the body."""
        attention = 2 * (self.width + self.head_dim * self.heads) + 2 * (self.width + self.head_dim * self.kv_heads)
        return self.layers * rank * (attention + 3 * (self.width + self.mlp_width))

    def attention_flops(self, tokens: float) -> float:
        """Of a causal forward pass over one sequence."""
        return 2 * tokens**2 * self.heads * self.head_dim * self.layers

    def forward_flops(self, tokens: float) -> float:
        """Of the body over one sequence."""
        return 2 * self.body * tokens + self.attention_flops(tokens)

    @property
    def kv_bytes(self) -> int:
        """Keys and values of one token, bf16."""
        return 2 * 2 * self.layers * self.kv_heads * self.head_dim


def dimensions(settings: dict[str, Any]) -> Dimensions:
    """From the fields of a Hugging Face configuration, a Qwen3's where it names no type. Raises UserError where one
    has another name there, and for a mixture of experts."""
    for name in ("num_attention_heads", "num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"):
        if name not in settings:
            raise UserError(f"model.path: its configuration has no {name}, which the plan's arithmetic needs")
    experts = next((name for name in EXPERTS if settings.get(name)), None)
    if experts:
        raise UserError(f"model.path: its configuration has {experts}: the plan's arithmetic is about dense models")
    heads = settings["num_attention_heads"]
    return Dimensions(
        layers=settings["num_hidden_layers"],
        width=settings["hidden_size"],
        mlp_width=settings["intermediate_size"],
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        head_dim=settings.get("head_dim") or settings["hidden_size"] // heads,
        vocab=settings["vocab_size"],
        tied=bool(settings.get("tie_word_embeddings")),
        head_norms=settings.get("model_type", "qwen3") in HEAD_NORMS,
    )


def read_dimensions(config: Config) -> Dimensions:
    """Of the recipe's model. Raises UserError where it cannot be read."""
    from transformers import AutoConfig

    try:
        settings = AutoConfig.from_pretrained(config.model.path, revision=config.model.revision)
    except (OSError, ValueError) as e:
        raise UserError(
            f"model.path: {config.model.path}: no model configuration could be read; --shape needs none: {e}"
        ) from e
    return dimensions(settings.get_text_config().to_dict())
