"""Shared by the tests: comparisons, and tiny models that stand in folders as any user's would."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sdft_dist.config import Config
from sdft_dist.recipe import parse


def assert_relative(got: torch.Tensor, exact: torch.Tensor, rel: float = 1e-5) -> None:
    """The largest difference is at most `rel` of the largest value."""
    worst = (got.double() - exact.double()).abs().max().item()
    scale = exact.double().abs().max().item()
    assert worst <= rel * max(scale, 1e-30), f"difference {worst:.3g} at scale {scale:.3g}"


def write_jsonl(path: Path, rows: list) -> Path:
    """One JSON value a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tiny_model(folder: Path, *, tied: bool = True, seed: int = 0, **settings: object) -> Path:
    """A random Qwen3 of two layers with the lab's tokenizer, saved in `folder`."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from sdft_dist.lab.tokenizer import build_tokenizer

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    options = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "initializer_range": 0.1,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    Qwen3ForCausalLM(Qwen3Config(**(options | settings))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def by_formula(name: str, p: torch.Tensor, q: torch.Tensor, beta: float) -> torch.Tensor:
    """Divergence [T] of distributions p (student) and q (teacher), [T, C], as the paper writes it."""
    if name == "forward_kl":
        return (q * (q / p).log()).sum(-1)
    if name == "reverse_kl":
        return (p * (p / q).log()).sum(-1)
    m = (1 - beta) * p + beta * q
    return beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)


MINIMAL = {"model": {"path": "m"}, "data": {"train": "d"}}  # of which nothing need exist


def config_of(defaults: dict[str, Any] = MINIMAL, /, **sections: Any) -> Config:
    """The defaults with `sections` merged over them."""
    merged = {n: {**defaults.get(n, {}), **own} if isinstance(own, dict) else own for n, own in sections.items()}
    return parse(Config, {**defaults, **merged})


class Allocations(TorchDispatchMode):
    """Bytes of the storages that torch makes while the block runs: `now`, and `peak` at most."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given | self._known:
                self._known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
