"""What this project changes in vLLM, in every process of an engine: vLLM calls `prepare` in the workers that it starts
for tensor parallelism, as the plugin that pyproject.toml names, and llm.py calls it in its own.

It does nothing in processes of other engines, where the variable DEVICE is not set.
"""

from __future__ import annotations

import os

RECEIVER = "sdft"  # vLLM's name for weight_engine.py
DEVICE = "SDFT_ENGINE_DEVICE"  # "cuda" or "cpu", handed down to the workers


def prepare() -> None:
    """Register the push's receiver, and on CPU mend what the receiver and seeded sampling need mended."""
    device = os.environ.get(DEVICE)
    if device is None:
        return
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if RECEIVER not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(RECEIVER, "actors.weight_engine", "PushEngine")
    if device == "cpu":
        from actors import drafts
        from sdft_dist.vector_math import settle

        settle()
        _keep_plain_weights()
        drafts.mend_cpu_sampling()


def _keep_plain_weights() -> None:
    """oneDNN would prepack linear weights and drop the originals: updating them in place would leave
    the packed copies stale, without a warning."""
    import vllm._custom_ops as ops

    ops._supports_onednn = False
