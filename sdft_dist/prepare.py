"""What a run needs of its files, read and checked before anything starts."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.console import Console

from sdft_dist.config import Config
from sdft_dist.errors import ConfigError
from sdft_dist.evaluate import EvalSet, Scorer, load_eval_sets, load_scorer
from sdft_dist.inputs import Inputs, read_inputs
from sdft_dist.session import resolve_device
from sdft_dist.topology import push_transport


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run that may start."""

    config: Config
    inputs: Inputs
    eval_sets: list[EvalSet]
    scorer: Scorer
    num_steps: int
    on_evaluation: Callable[[dict[str, Any]], None]
    title: str
    console: Console | None


def prepare(
    config: Config, on_evaluation: Callable[[dict[str, Any]], None], title: str | None, console: Console | None
) -> Prepared:
    """Read and check all that the run needs. Raises UserError where configuration, data or model folder are wrong."""
    check_device(config)
    inputs = read_inputs(config)
    return Prepared(
        config=config,
        inputs=inputs,
        eval_sets=load_eval_sets(config, inputs.tokenizer),
        scorer=load_scorer(config.eval),
        num_steps=config.num_steps(len(inputs.problems)),
        on_evaluation=on_evaluation,
        title=title or config.method,
        console=console,
    )


def check_device(config: Config) -> None:
    """Raises ConfigError where the device cannot do what the configuration asks for, or a package is missing."""
    device = resolve_device(config)
    if device == "cpu" and config.model.dtype == "bfloat16" and config.cluster.device == "auto":
        raise ConfigError(
            "model.dtype: bfloat16 is for GPUs, and torch sees none here: use float32, or give cluster.device=cpu to "
            "try it without one"
        )
    if device == "cpu" and config.model.attention in ("varlen", "flash_attention_2"):
        raise ConfigError(f"model.attention: {config.model.attention} needs a GPU; with cluster.device=cpu use sdpa")
    if device == "cpu" and config.cluster.sleep:
        raise ConfigError("cluster.sleep: there is no GPU's memory to give up; set it to false")
    if config.loss.kernel == "liger" and not is_installed("liger_kernel"):
        raise ConfigError("loss.kernel: liger needs the package: pip install liger-kernel; or use auto")
    if config.wandb and not is_installed("wandb"):
        raise ConfigError("wandb: needs the package: pip install 'wandb>=0.31'; or leave the field out")
    push_transport(config, device)  # raises where there is no such way


def is_installed(package: str) -> bool:
    """Whether there is such a package; a folder of its name in the current one, as `wandb` leaves one, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None
