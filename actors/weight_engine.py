"""vLLM weight-transfer engine: the receivers' end of a push, over any transport.

The sender is rank 0 of a group of its own; every engine worker is another rank. A push is a fixed
sequence of messages, one per bucket: the bucket's bytes, then 8 bytes of checksum. Nothing is
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

from sdft_dist.adapters import Merger, half_of
from sdft_dist.transport import Transport, connect
from sdft_dist.types import TransportKind
from sdft_dist.wire import bucket_bytes, opened, unpack


@dataclass
class PushInitInfo(WeightTransferInitInfo):
    transport: TransportKind
    host: str
    port: int
    first_rank: int  # of this engine's workers in the group; the sender is 0
    group_size: int
    timeout_s: float
    keep: str | None = None  # name of a weight to keep as received: a teacher's output head


@dataclass
class PushUpdateInfo(WeightTransferUpdateInfo):
    buckets: list[Any]  # of sdft_dist.types.Bucket
    adapter_scale: float


class PushEngine(WeightTransferEngine[PushInitInfo, PushUpdateInfo]):
    init_info_cls = PushInitInfo
    update_info_cls = PushUpdateInfo
    _transport: Transport | None = None

    def init_transfer_engine(self, init_info: PushInitInfo) -> None:
        self.shutdown()
        timeout = timedelta(seconds=init_info.timeout_s)
        store = torch.distributed.TCPStore(init_info.host, init_info.port, is_master=False, timeout=timeout)
        rank = init_info.first_rank + self.parallel_config.rank
        self._device = next(self.model.parameters()).device
        self._transport = connect(init_info.transport, store, rank, init_info.group_size, timeout, self._device)
        self._loaded: set[str] = set()
        self._keep = init_info.keep
        self._merger = Merger()
        self.wire_s = 0.0  # how long the last push waited for messages
        self.kept: torch.Tensor | None = None

    def start_weight_update(self) -> None:
        self._loaded = set()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        try:
            self.receive_weights(self.parse_update_info(update_info))
            if self._device.type == "cuda":  # the base class does so without asking, which a CPU build cannot
                torch.cuda.synchronize(self._device)
        except Exception:
            self.shutdown()  # so that the sender does not wait for this end; who mends, connects anew
            raise

    def receive_weights(self, update_info: PushUpdateInfo) -> None:
        transport = self._transport
        assert transport is not None
        self.wire_s = 0.0
        names = [name for bucket in update_info.buckets for name in bucket.names]
        self._merger.begin(names, update_info.adapter_scale)
        parameters = dict(self.model.named_parameters())
        for bucket in update_info.buckets:
            started = time.perf_counter()
            message = transport.receive(bucket_bytes(bucket) + 8)
            self.wire_s += time.perf_counter() - started
            with torch.no_grad():
                weights = self._merger.merged(self._keeping(unpack(bucket, opened(bucket, message))), self._device)
                self._loaded |= set(self.model.load_weights(weights) or ())
            transport.taken()
        # Here, not in finish_weight_update: after an error there, vLLM takes the update to be under way for ever.
        missing = set() if all(map(half_of, names)) else parameters.keys() - self._loaded
        missing |= self._merger.unmerged()
        if self._loaded and missing:
            raise RuntimeError(f"weight push: {len(missing)} parameters were not in it, such as {min(missing)}")

    def _keeping(self, tensors: Iterator[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in tensors:
            if name == self._keep:
                self.kept = tensor.clone()
            yield name, tensor

    def finish_weight_update(self) -> None:
        """Nothing is left to do."""

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Not this end's: learner/push.py sends. vLLM 0.26 wants one to be there."""
        raise NotImplementedError

    def shutdown(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None
