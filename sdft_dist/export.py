"""A run's checkpoint as an ordinary Hugging Face folder: safetensors, configuration, tokenizer."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from sdft_dist.commits import read_manifest
from sdft_dist.config import load_config
from sdft_dist.errors import UserError
from sdft_dist.model_card import model_card
from sdft_dist.rundir import RunDir


def export(rundir: RunDir, out: Path, *, weights: str = "student", step: int | None = None) -> Path:
    """Write the model of a checkpoint (the newest, unless `step` is given) into `out`.

    `weights` is "student" or "ema", its average. The folder loads with transformers and with vLLM, and its
    README tells where it comes from. Raises UserError where there is no such checkpoint or `out` is in use.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    from learner.checkpoint import read_full
    from sdft_dist.prompts import load_tokenizer

    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out: {out} is already in use")
    config = load_config(rundir.path / "config.yaml")
    checkpoint = rundir.checkpoint(step)
    manifest = read_manifest(checkpoint)  # raises where it is not sound
    settings = AutoConfig.from_pretrained(config.model.path, revision=config.model.revision)
    dtype = getattr(torch, config.model.dtype)
    lm = AutoModelForCausalLM.from_config(settings, dtype=dtype)
    named = dict(lm.named_parameters())
    full = read_full(
        checkpoint, {"student": "master", "ema": "ema"}[weights], {name: tuple(p.shape) for name, p in named.items()}
    )
    with torch.no_grad():
        for name, param in named.items():
            param.copy_(full[name])
    with suppress(OSError):  # a model folder need not have generation settings
        lm.generation_config = GenerationConfig.from_pretrained(config.model.path, revision=config.model.revision)
    disable_progress_bar()
    lm.save_pretrained(out)
    load_tokenizer(config).save_pretrained(out)
    (out / "README.md").write_text(model_card(rundir, config, manifest, weights))
    return out
