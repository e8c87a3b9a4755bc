"""Makes the lab's base model: a small Qwen3 that knows the old skills and can learn in context.

The result is an ordinary Hugging Face folder (model, tokenizer, chat template). The same settings on
the same machine give the same bytes, so a folder is cached under a key of its settings.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from sdft_dist.lab import world

Progress = Callable[[int, float], None]  # (steps done, loss)
RECIPE_FILE = "lab.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseSettings:
    """What decides the base's weights."""

    seed: int = 0
    steps: int = 800
    batch_size: int = 128
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    num_layers: int = 4
    hidden_size: int = 128
    num_threads: int = 2

    def key(self) -> str:
        """12 hexadecimal digits that name these settings and the world's definition."""
        world_source = Path(world.__file__).read_bytes()
        settings = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        return hashlib.sha256(settings + world_source).hexdigest()[:12]


def shipped_base() -> Path:
    """The folder of the base that comes with the package, made by `sdft lab build` at its defaults."""
    return Path(__file__).parent / "shipped"


def build(out: Path, settings: BaseSettings, progress: Progress) -> Path:
    """Train the base and save it in `out`; returns `out`. Does nothing where `out` holds the same
    settings' base already. Raises ValueError where `out` holds something else."""
    recipe = out / RECIPE_FILE
    if recipe.exists() and json.loads(recipe.read_text())["key"] == settings.key():
        return out
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty and does not hold this base: give another --out")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    _train(partial, settings, progress)
    recipe_text = json.dumps({"key": settings.key(), **dataclasses.asdict(settings)}, indent=2)
    (partial / RECIPE_FILE).write_text(recipe_text + "\n")
    if out.exists():
        out.rmdir()
    partial.rename(out)
    return out


def _train(out: Path, s: BaseSettings, progress: Progress) -> None:
    import torch
    import torch.nn.functional as F
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from sdft_dist.lab.tokenizer import build_tokenizer

    torch.set_num_threads(s.num_threads)
    torch.manual_seed(s.seed)
    tokenizer = build_tokenizer()
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
    optimizer = torch.optim.AdamW(model.parameters(), lr=s.learning_rate, weight_decay=0.0, betas=(0.9, 0.98))
    warmup, steps = s.warmup_steps, s.steps
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warmup, (steps - n) / (steps - warmup))
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
        progress(step + 1, loss.item())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _batch(examples: list[world.BaseExample], tokenizer):
    """Right-padded ids and labels, both int64 [B, T]; label -100 outside the target."""
    import torch

    rows, starts = [], []
    for e in examples:
        prompt = [{"role": "user", "content": e.user}]
        head = tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"]
        tail = tokenizer(e.target, add_special_tokens=False)["input_ids"]
        rows.append([*head, *tail, tokenizer.eos_token_id])
        starts.append(len(head))
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), tokenizer.pad_token_id)
    labels = torch.full((len(rows), width), -100)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, start : len(row)] = ids[i, start : len(row)]
    return ids, labels


def write_teaching_set(folder: Path, word: str, domain: str, seed: int, *, num_train: int, num_eval: int) -> None:
    """Write the data files that teach `word` in one domain: `train.jsonl`, `eval-new.jsonl` and one
    `eval-SKILL.jsonl` per old skill over all domains, with `prompt`, `demonstration`, `answer`.

    No training question is among the held-out ones of the new word.
    """
    folder.mkdir(parents=True, exist_ok=True)
    held_out = world.rows(word, domain, num_eval, seed=-1)
    seen = {row.prompt for row in held_out}
    candidates = world.rows(word, domain, 2 * num_train + num_eval, seed)
    train = [row for row in candidates if row.prompt not in seen][:num_train]
    random.Random(seed).shuffle(train)
    _write(folder / "train.jsonl", train)
    _write(folder / "eval-new.jsonl", held_out)
    for skill in world.OLD_SKILLS:
        per_domain = [world.rows(skill, d, num_eval // len(world.DOMAINS), seed=-1) for d in world.DOMAINS]
        _write(folder / f"eval-{skill}.jsonl", [row for rows in per_domain for row in rows])


def _write(path: Path, rows: list[world.Row]) -> None:
    path.write_text("".join(json.dumps(row._asdict()) + "\n" for row in rows))
