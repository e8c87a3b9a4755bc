"""Speculative rollouts: vLLM's settings for drafted tokens, and a correction that they need on CPU."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from sdft_dist.config import RolloutConfig
from sdft_dist.errors import UserError


def settings(rollout: RolloutConfig) -> dict[str, Any]:
    """vLLM's speculative_config. Raises UserError where suffix decoding's package is missing."""
    if rollout.speculative == "suffix" and importlib.util.find_spec("arctic_inference") is None:
        raise UserError("rollout.speculative: suffix needs the package arctic-inference on the generators' nodes")
    drafts: dict[str, Any] = {"method": rollout.speculative, "num_speculative_tokens": rollout.draft_tokens}
    if rollout.speculative == "ngram":
        drafts |= {"prompt_lookup_min": 1, "prompt_lookup_max": 4}
    return drafts


def mend_cpu_sampling() -> None:
    """vLLM 0.32 verifies drafts on CPU at a random temperature: its stand-in for the kernel that spreads
    the requests' temperatures over the drafted tokens writes into a copy and returns memory as it was."""
    from vllm.v1.sample import rejection_sampler

    rejection_sampler.expand_batch_to_tokens = expand


def expand(
    x: torch.Tensor, cu_num_tokens: torch.Tensor, num_tokens: int, replace_from: int = 0, replace_to: int = 0
) -> torch.Tensor:
    """x [N] repeated to [num_tokens], request i up to `cu_num_tokens[i]`; `replace_from` becomes `replace_to`."""
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1)).long()
    return torch.where(x == replace_from, torch.full_like(x, replace_to), x).repeat_interleave(counts)
