"""vLLM weight-transfer engine over gloo: on CPU the only one, on GPU the one that works everywhere.

The sender is rank 0 of a group of its own; every engine worker is another rank. A push is a fixed
sequence of broadcasts, one per bucket: the bucket's bytes, then 8 bytes of checksum. Nothing is
served after a failed push until a whole one has succeeded; engine.py holds that.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from sdft_dist.wire import bucket_bytes, checksum, unpack


@dataclass
class GlooInitInfo(WeightTransferInitInfo):
    host: str
    port: int
    first_rank: int  # of this engine's workers in the group; the sender is 0
    group_size: int
    timeout_s: float
    keep: str | None = None  # name of a weight to keep as received: a teacher's output head


@dataclass
class GlooUpdateInfo(WeightTransferUpdateInfo):
    buckets: list[Any]  # of sdft_dist.types.Bucket


class GlooWeightTransferEngine(WeightTransferEngine[GlooInitInfo, GlooUpdateInfo]):
    init_info_cls = GlooInitInfo
    update_info_cls = GlooUpdateInfo

    def init_transfer_engine(self, init_info: GlooInitInfo) -> None:
        timeout = timedelta(seconds=init_info.timeout_s)
        store = torch.distributed.TCPStore(init_info.host, init_info.port, is_master=False, timeout=timeout)
        rank = init_info.first_rank + self.parallel_config.rank
        self._group = torch.distributed.ProcessGroupGloo(store, rank, init_info.group_size, timeout)
        self._loaded: set[str] = set()
        self._keep = init_info.keep
        self.wire_s = 0.0  # how long the last push waited for messages
        self.kept: torch.Tensor | None = None

    def start_weight_update(self) -> None:
        self._loaded = set()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # The base class synchronizes the accelerator, which a CPU build does not have.
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: GlooUpdateInfo) -> None:
        self.wire_s = 0.0
        for bucket in update_info.buckets:
            started = time.perf_counter()
            buffer = torch.empty(bucket_bytes(bucket) + 8, dtype=torch.uint8)
            self._group.broadcast(buffer, 0).wait()
            self.wire_s += time.perf_counter() - started
            payload, claimed = buffer[:-8], int(buffer[-8:].view(torch.int64))
            if checksum(payload) != claimed:
                raise RuntimeError(
                    f"weight push: checksum of the bucket {bucket.names[0]} … {bucket.names[-1]} is wrong"
                )
            with torch.no_grad():
                self._loaded |= set(self.model.load_weights(self._keeping(unpack(bucket, payload))) or ())
        # Here, not in finish_weight_update: after an error there, vLLM takes the update to be under way for ever.
        missing = {name for name, _ in self.model.named_parameters()} - self._loaded
        if self._loaded and missing:
            raise RuntimeError(f"weight push: {len(missing)} parameters were not in it, such as {min(missing)}")

    def _keeping(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            if name == self._keep:
                self.kept = tensor.clone()
            yield name, tensor

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    def shutdown(self) -> None:
        self._group = None
