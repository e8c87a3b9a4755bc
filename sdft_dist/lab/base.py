"""Makes the lab's base model: a small Qwen3 that knows the old skills and can learn in context.

The result is an ordinary Hugging Face folder (model, tokenizer, chat template). The same settings on
the same machine give the same bytes, so a folder is cached under a key of its settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from sdft_dist.errors import UserError
from sdft_dist.lab import world

OnStep = Callable[[int, float], None]  # (steps done, loss)
RECIPE_FILE = "lab.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """What decides the base's weights."""

    seed: int = 0
    steps: int = 600
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    num_layers: int = 4
    hidden_size: int = 128
    num_threads: int = 2

    def key(self) -> str:
        """12 hexadecimal digits that name these settings and the world's version."""
        settings = {"world": world.VERSION, **dataclasses.asdict(self)}
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


# Of `sdft lab sequence`: trained longer, it keeps words apart better.
SEQUENCE_BASE = BaseSettings(steps=1000)


def shipped_base() -> Path:
    """The folder of the base that comes with the package, made by `sdft lab build` at its defaults."""
    return Path(__file__).parent / "shipped"


def build(out: Path, settings: BaseSettings, on_step: OnStep) -> Path:
    """Train the base and save it in `out`; returns `out`. Does nothing where `out` holds the same
    settings' base already. Raises UserError where `out` holds something else."""
    if _holds(out, settings):
        return out
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out: {out} is not empty and does not hold this base: give another --out")
    if out.name in ("", ".."):
        raise UserError(f"--out: {out} has no name to be made under: give the path of a new folder")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _train(partial, settings, on_step)
    recipe_text = json.dumps({"key": settings.key(), **dataclasses.asdict(settings)}, indent=2)
    (partial / RECIPE_FILE).write_text(recipe_text + "\n")
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return out


def _holds(out: Path, settings: BaseSettings) -> bool:
    recipe = out / RECIPE_FILE
    return recipe.exists() and bool(json.loads(recipe.read_text())["key"] == settings.key())


def build_with_progress(settings: BaseSettings, out: Path | None = None) -> Path:
    """`build` with a progress bar; without `out`, in a cache folder keyed by the settings."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    out = out or cache_folder(settings)
    if _holds(out, settings):
        return out
    columns = (TextColumn("lab base"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.4f}"))
    with Progress(*columns, TimeRemainingColumn()) as bar:
        task = bar.add_task("", total=settings.steps, loss=float("nan"))
        return build(out, settings, lambda step, loss: bar.update(task, completed=step, loss=loss))


def cache_folder(settings: BaseSettings) -> Path:
    """Where a base with these settings is kept."""
    root = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return root / "sdft-dist" / f"lab-{settings.key()}"


def _train(out: Path, s: BaseSettings, on_step: OnStep) -> None:
    import torch
    import torch.nn.functional as F

    from sdft_dist.lab.tokenizer import build_tokenizer

    torch.set_num_threads(s.num_threads)
    torch.manual_seed(s.seed)
    tokenizer = build_tokenizer()
    model = _new_model(s, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    warmup, steps = s.warmup_steps, s.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warmup, (steps - n) / max(1, steps - warmup))
    )
    stream = world.base_examples(s.seed)
    model.train()
    for step in range(s.steps):
        ids, labels = _batch(list(islice(stream, s.batch_size)), tokenizer)
        hidden = model.model(ids, use_cache=False).last_hidden_state[:, :-1]
        keep = labels[:, 1:] >= 0
        loss = F.cross_entropy(model.lm_head(hidden[keep]), labels[:, 1:][keep])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1, loss.item())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _new_model(s: BaseSettings, tokenizer: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=s.hidden_size,
            intermediate_size=2 * s.hidden_size,
            num_hidden_layers=s.num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=s.hidden_size // 4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
        )
    )
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model


def _batch(examples: list[world.BaseExample], tokenizer: Any) -> tuple[Any, Any]:
    """Right-padded ids and labels, both int64 [B, T]; label -100 outside the target."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, labels = [], []
    for e in examples:
        prompt = [{"role": "user", "content": e.user}]
        head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        tail = tokenizer(e.target, add_special_tokens=False)["input_ids"]
        end = tokenizer.eos_token_id
        ids.append(torch.tensor([*head, *tail, end]))
        labels.append(torch.tensor([*[-100] * len(head), *tail, end]))
    return pad_sequence(ids, True, tokenizer.pad_token_id), pad_sequence(labels, True, -100)
