"""Models of known shapes with random weights, and rows of fixed lengths: what throughput is measured on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdft_dist.errors import UserError
from sdft_dist.files import write_jsonl

# Fields of the models' published configurations. Only Qwen3's are made as they are; the others' sizes serve the plan,
# and models of random weights are Qwen3s of those sizes.
_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "tie_word_embeddings",
)  # fmt: skip
_SIZES = {
    "lab": (102, 128, 384, 4, 4, 2, 32, True),
    "qwen3-0.6b": (151_936, 1024, 3072, 28, 16, 8, 128, True),
    "qwen3-1.7b": (151_936, 2048, 6144, 28, 16, 8, 128, True),
    "qwen3-4b": (151_936, 2560, 9728, 36, 32, 8, 128, True),
    "qwen3-8b": (151_936, 4096, 12_288, 36, 32, 8, 128, False),
    "qwen2.5-7b": (152_064, 3584, 18_944, 28, 28, 4, 128, False),
    "llama-3.1-8b": (128_256, 4096, 14_336, 32, 32, 8, 128, False),
    "olmo-3-7b": (100_278, 4096, 11_008, 32, 32, 32, 128, False),
}
SHAPES: dict[str, dict[str, Any]] = {name: dict(zip(_FIELDS, sizes, strict=True)) for name, sizes in _SIZES.items()}
BLOCK = 1 << 23  # numbers, of random weights
MARGIN = 16  # tokens of context beside those of a row
NO_WORDS = 5  # ids of the lab's tokenizer: what is unknown, and control tokens


def parse_lengths(text: str) -> tuple[int, int, int]:
    """Tokens of prompt, demonstration and completion, from "300/400/400". Raises UserError."""
    parts = text.split("/")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--lengths: got {text!r}, expected tokens as 300/400/400")
    prompt, demonstration, completion = map(int, parts)
    return prompt, demonstration, completion


def write_model(folder: Path, shape: str, dtype: str, max_length: int) -> Path:
    """A Hugging Face folder of a random Qwen3 of `shape`, with the lab's tokenizer for words of no meaning."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from sdft_dist.lab.tokenizer import build_tokenizer

    settings = SHAPES[shape]
    tokenizer = build_tokenizer([f"w{i}" for i in range(settings["vocab_size"] - NO_WORDS)], max_length)
    config = Qwen3Config(
        max_position_embeddings=max_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        **settings,
    )
    with torch.device("meta"):  # drawing every weight takes minutes where there are billions
        lm = Qwen3ForCausalLM._from_config(config, dtype=getattr(torch, dtype))
    lm.to_empty(device="cpu").tie_weights()
    _fill(lm)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _fill(lm: Any) -> None:
    """As transformers draws them: norms are 1, other weights normal and those of padding 0; but blocks of all matrices
    are parts of the same random numbers."""
    import torch

    numbers, starts = torch.randn(2 * BLOCK, generator=torch.Generator().manual_seed(0)), random.Random(0)
    numbers = (numbers * lm.config.initializer_range).to(lm.dtype)
    with torch.no_grad():
        for weight in lm.parameters():
            if weight.dim() == 1:
                weight.fill_(1)
                continue
            for block in weight.view(-1).split(BLOCK):
                start = starts.randrange(BLOCK)
                block.copy_(numbers[start : start + len(block)])
        lm.get_input_embeddings().weight[lm.config.pad_token_id] = 0


def write_rows(path: Path, shape: str, lengths: Sequence[tuple[int, int]], count: int) -> Path:
    """`count` rows of random words for each of `lengths`, the tokens of prompt and demonstration, those of the chat
    template counted in."""
    rng = random.Random(0)

    def words(n: int) -> str:
        return " ".join(f"w{rng.randrange(SHAPES[shape]['vocab_size'] - NO_WORDS)}" for _ in range(max(1, n)))

    # <|user|> … <|end|> <|assistant|> around the prompt; <|end|> after what SFT imitates.
    rows = ({"prompt": words(p - 3), "demonstration": words(d - 1)} for p, d in lengths for _ in range(count))
    write_jsonl(path, rows)
    return path


def synthetic(out: Path, shape: str, lengths: Sequence[str], num_rows: int, dtype: str) -> dict[str, Any]:
    """Write a random model of `shape` and `num_rows` rows for each of `lengths`, "prompt/demonstration/completion" in
    tokens, and return the overrides that a configuration needs for them."""
    if shape not in SHAPES:
        raise UserError(f"--synthetic-model: got {shape!r}, expected one of {', '.join(SHAPES)}")
    parsed = [parse_lengths(text) for text in lengths]
    out.mkdir(parents=True, exist_ok=True)
    context = max(map(sum, parsed)) + MARGIN
    rows = write_rows(out / "rows.jsonl", shape, [(prompt, shown) for prompt, shown, _ in parsed], num_rows)
    return {
        "model.path": str(write_model(out / "model", shape, dtype, context)),
        "model.dtype": dtype,
        "model.max_length": context,
        "data.train": str(rows),
        "data.split": "train",
        "prompt.template": "{prompt} {demonstration}",
        "rollout.max_completion_tokens": max(completion for *_, completion in parsed),
    }
