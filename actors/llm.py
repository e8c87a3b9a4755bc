"""Makes vLLM's engine as this project uses it: its options, its environment, and what padded vocabularies need."""

from __future__ import annotations

import glob
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from pydantic import ValidationError

from actors import drafts, plugin
from sdft_dist.config import Config
from sdft_dist.errors import UserError

Runner = Literal["generate", "pooling"]


def make_llm(config: Config, runner: Runner, device: str, vocab_size: int | None) -> Any:
    """vLLM's LLM for `model.path`, in this process; with `vocab_size` later ids get no probability. Raises UserError
    for settings and models that vLLM refuses."""
    _prepare_environment(device, config.cluster.kv_cache_gib)
    from vllm import LLM

    plugin.prepare()
    options = options_for(config, runner, device)
    try:
        with _plain_path(config.model.path) as path:
            llm = LLM(**{**options, "model": path})
    except (ValueError, AssertionError, NotImplementedError, ImportError) as e:
        if not isinstance(e, ValidationError) and "memory" in str(e).lower():  # which others may give back
            raise
        problems = [error["msg"] for error in e.errors()] if isinstance(e, ValidationError) else [str(e)]
        said = "; ".join(problem.removeprefix("Value error, ") for problem in problems)
        raise UserError(
            f"model.path: {config.model.path}: vLLM refuses it with this configuration: {said or type(e).__name__}"
        ) from e
    if vocab_size is not None:
        llm.collective_rpc(_leave_out_padding, args=(vocab_size,))
    return llm


def options_for(config: Config, runner: Runner, device: str) -> dict[str, Any]:
    """What vLLM's LLM is made with."""
    from vllm.config import PoolerConfig, WeightTransferConfig

    cluster = config.cluster
    spans = cluster.generator_tensor_parallel if runner == "generate" else cluster.teacher_tensor_parallel
    options: dict[str, Any] = {
        "model": config.model.path,
        "revision": config.model.revision,
        "dtype": config.model.dtype,
        "max_model_len": config.model.max_length,
        "max_num_batched_tokens": max(8192, config.model.max_length),
        "max_num_seqs": cluster.max_sequences,
        "seed": config.seed,
        "tensor_parallel_size": spans,
        "disable_log_stats": True,
        "weight_transfer_config": WeightTransferConfig(backend=plugin.RECEIVER),
    }
    if spans > 1:
        # In a placement group vLLM would look for Ray workers of its own.
        options["distributed_executor_backend"] = "mp"
    if device == "cpu":
        options["enforce_eager"] = True
        options["enable_chunked_prefill"] = False  # a seeded request's first chunk rewinds a generator
    else:
        role = "generator" if runner == "generate" else "teacher"
        options["gpu_memory_utilization"] = cluster.engine_memory(role)
        options["enable_sleep_mode"] = cluster.sleep
        # Other kernels for mixtures of experts reorder weights after loading, which a push would not.
        options["moe_backend"] = "triton"
    if runner == "generate":
        options["skip_tokenizer_init"] = True  # ids in, ids out
        # Log-probs after temperature: those of the distribution that was sampled from.
        options["logprobs_mode"] = "processed_logprobs"
        options["max_logprobs"] = config.loss.top_k
        if config.model.dtype != "float32":
            # As the learner forms them: bf16 would round what is sampled from, by up to 0.06 at logits of 16 and more.
            options["hf_overrides"] = {"head_dtype": "float32"}
        if config.rollout.speculative != "none":
            options["speculative_config"] = drafts.settings(config.rollout)
        elif device == "cuda":
            options["compilation_config"] = {"cudagraph_capture_sizes": _graph_sizes(cluster.max_sequences)}
    else:
        options["runner"], options["convert"] = "pooling", "embed"
        # Calls are of more tokens than CUDA graphs are made for, and vLLM 0.26 keeps a first chunk's states where the
        # next step of one writes its own.
        options["enforce_eager"] = True
        options["enable_chunked_prefill"] = False
        options["enable_prefix_caching"] = config.rollout.completions_per_prompt > 1
        # Without use_activation=False the states come L2-normalised.
        options["pooler_config"] = PoolerConfig(task="token_embed", use_activation=False)
        if config.model.dtype != "float32":
            options["hf_overrides"] = {"head_dtype": "model"}
    return options


def _graph_sizes(max_sequences: int) -> list[int]:
    """Decode batches that CUDA graphs are made for; others run as the next larger one. vLLM's own choice has four times
    as many, each of which takes time at the start and memory, for batches that take as long: the weights' reading."""
    top = min(max_sequences, 512)
    return [*(size for size in (1, 2, 4, 8, 16) if size < top), *range(32, top, 32), top]


@contextmanager
def _plain_path(path: str) -> Iterator[str]:
    """`path`, or while the block runs a link to the folder where vLLM would take its path for a pattern of others."""
    if not os.path.isdir(path) or glob.escape(path) == path:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = os.path.join(folder, "model")
        os.symlink(os.path.abspath(path), link)
        yield link


def _prepare_environment(device: str, kv_cache_gib: int) -> None:
    """vLLM reads these when it is imported."""
    os.environ[plugin.DEVICE] = device
    os.environ.update(
        VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine lives in the actor's process
        VLLM_NO_USAGE_STATS="1",
        VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
    )
    if device == "cpu":
        os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(kv_cache_gib)
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # several engines share the cores


def _leave_out_padding(worker: Any, vocab_size: int) -> None:
    """Ids from `vocab_size` on get no probability."""
    model = worker.get_model()
    logits_of = model.compute_logits

    def compute_logits(*args: Any, **kwargs: Any) -> Any:
        logits = logits_of(*args, **kwargs)
        if logits is not None:  # as on all but the first of the processes that an engine spans
            logits[..., vocab_size:] = -float("inf")
        return logits

    model.compute_logits = compute_logits
