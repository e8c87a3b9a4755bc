"""A run's checkpoint as an ordinary Hugging Face folder: safetensors, configuration, tokenizer; or its adapters
as a peft folder."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_dist.commits import read_manifest
from sdft_dist.config import Config
from sdft_dist.errors import UserError
from sdft_dist.files import refuse_used
from sdft_dist.fingerprint import refuse_another_base
from sdft_dist.model_card import model_card
from sdft_dist.recipe import load_config
from sdft_dist.rundir import RunDir

if TYPE_CHECKING:
    import torch

    from learner.checkpoint import Shards

KINDS = {"student": "master", "ema": "ema"}


def export(rundir: RunDir, out: Path, *, weights: str = "student", step: int | None = None) -> Path:
    """Write the model of a checkpoint (the newest, unless `step` is given) into `out`; adapters are merged.

    `weights` is "student" or "ema", its average. The folder loads with transformers and with vLLM, and its
    README tells where it comes from. Raises UserError where there is no such checkpoint, the run kept no average to
    export, `out` is in use, or model.path holds another model by now.
    """
    import torch
    from transformers import GenerationConfig
    from transformers.utils.logging import disable_progress_bar

    from sdft_dist.prompts import load_tokenizer

    config, shards, facts = _read(rundir, out, weights, step)
    tokenizer = load_tokenizer(config)  # of a hub id this tells the commit
    refuse_another_base(config, facts["fingerprint"])
    disable_progress_bar()
    with torch.no_grad():
        lm = checkpoint_model(config, shards, KINDS[weights])
    # The base's own settings for generation as they are: transformers refuses to save some that it loads.
    lm.generation_config = GenerationConfig.from_model_config(lm.config)
    lm.save_pretrained(out)
    with suppress(OSError):  # a model folder need not have them
        settings = GenerationConfig.from_pretrained(config.model.path, revision=config.model.revision)
        settings.to_json_file(out / "generation_config.json")
    tokenizer.save_pretrained(out)
    (out / "README.md").write_text(model_card(rundir, config, facts, weights))
    return out


def export_adapter(rundir: RunDir, out: Path, *, weights: str = "student", step: int | None = None) -> Path:
    """Write the adapters of a checkpoint, fp32, into `out`, as peft and vLLM load them. Arguments and errors as
    of `export`; raises UserError where the run has trained no adapters."""
    from safetensors.torch import save_file

    from learner.lora import peft_config

    config, shards, _ = _read(rundir, out, weights, step)
    lora = config.model.lora
    if not lora.rank:
        raise UserError(f"--adapter: {rundir.path} has trained all weights: there is no adapter")
    found = _adapters(shards, KINDS[weights], lora.rank)
    modules = [weight.removesuffix(".weight") for weight in found]
    record = peft_config(lora)
    record.base_model_name_or_path, record.inference_mode = config.model.path, True
    if lora.targets == ("all-linear",):
        record.target_modules = {module.rpartition(".")[2] for module in modules}
    out.mkdir(parents=True, exist_ok=True)
    record.save_pretrained(out)
    tensors = {
        f"base_model.model.{module}.lora_{half}.weight": tensor.contiguous()
        for module, halves in zip(modules, found.values(), strict=True)
        for half, tensor in zip("AB", halves, strict=True)
    }
    save_file(tensors, out / "adapter_model.safetensors", {"format": "pt"})
    return out


def _read(rundir: RunDir, out: Path, weights: str, step: int | None) -> tuple[Config, Shards, dict[str, Any]]:
    from learner.checkpoint import Shards

    refuse_used(out)
    checkpoint = rundir.checkpoint(step)
    facts = read_manifest(checkpoint)  # raises where it is not sound
    config, shards = load_config(rundir.path / "config.yaml"), Shards(checkpoint)
    if not shards.has(KINDS[weights]):
        raise UserError(
            f"--weights {weights}: the run kept no average (teacher.kind={config.teacher.kind}): use student"
        )
    return config, shards, facts


def checkpoint_model(config: Config, shards: Shards, kind: str) -> Any:
    """The model of `kind` in the type that it was trained in."""
    import torch
    from transformers import AutoModelForCausalLM

    from sdft_dist.adapters import add

    source, lora = config.model, config.model.lora
    # The base whole: checkpoints hold what is trained, and not what a model keeps besides its parameters.
    dtype = getattr(torch, source.dtype)
    try:
        lm = AutoModelForCausalLM.from_pretrained(source.path, revision=source.revision, dtype=dtype)
    except (OSError, ValueError) as e:
        raise UserError(f"model.path: {source.path}: the model that the run began with cannot be loaded: {e}") from e
    named = dict(lm.named_parameters())
    if lora.rank:
        for name, (a, b) in _adapters(shards, kind, lora.rank).items():
            named[name].copy_(add(named[name], a, b, lora.scale))
    else:
        for name, param in named.items():
            param.copy_(shards.full(kind, name, tuple(param.shape)))
    return lm


def _adapters(shards: Shards, kind: str, rank: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """By the adapted weight's name its halves A [r, in] and B [out, r], fp32."""
    from sdft_dist.adapters import half_of

    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, size in shards.sizes(kind).items():
        half = half_of(name)
        assert half is not None
        halves.setdefault(half.weight, {})[half.half] = shards.full(
            kind, name, (rank, size // rank) if half.half == "A" else (size // rank, rank)
        )
    return {weight: (pair["A"], pair["B"]) for weight, pair in halves.items()}
