"""The byte layout of one bucket of a weight push, shared by the sender and the receivers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

import torch

from sdft_dist.types import Bucket

CHECKED_WORDS = 1 << 20  # at a time: the sum's own memory stays small beside a bucket


def plan_buckets(weights: Iterable[tuple[str, torch.dtype, tuple[int, ...]]], bucket_bytes: int) -> list[Bucket]:
    """Consecutive weights (name, type on the wire, shape) in buckets of at most `bucket_bytes`; a
    larger tensor gets a bucket of its own."""
    buckets: list[list[tuple[str, str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, dtype, shape in weights:
        size = prod(shape) * dtype.itemsize
        if buckets[-1] and filled + size > bucket_bytes:
            buckets.append([])
            filled = 0
        buckets[-1].append((name, str(dtype).removeprefix("torch."), tuple(shape)))
        filled += size
    return [
        Bucket(names=tuple(n for n, _, _ in b), dtypes=tuple(d for _, d, _ in b), shapes=tuple(s for _, _, s in b))
        for b in buckets
    ]


def bucket_bytes(bucket: Bucket) -> int:
    """Payload bytes of a bucket; a multiple of 8."""
    return -(-sum(size for _, _, _, size in _layout(bucket)) // 8) * 8


def pack(bucket: Bucket, tensors: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """The bucket's message, uint8 [bucket_bytes + 8] on `device`: payload, then its checksum. Tensors are cast."""
    message = torch.zeros(bucket_bytes(bucket) + 8, dtype=torch.uint8, device=device)
    offset = 0
    for name, dtype, _, size in _layout(bucket):
        flat = tensors[name].detach().to(device=device, dtype=dtype).reshape(-1).contiguous()
        message[offset : offset + size] = flat.view(torch.uint8)
        offset += size
    message[-8:].view(torch.int64).copy_(checksum(message[:-8]))
    return message


def opened(bucket: Bucket, message: torch.Tensor) -> torch.Tensor:
    """The payload of a message. Raises RuntimeError where it is not what was sent."""
    payload = message[:-8]
    if int(checksum(payload)) != int(message[-8:].view(torch.int64)):
        raise RuntimeError(f"weight push: checksum of the bucket {bucket.names[0]} … {bucket.names[-1]} is wrong")
    return payload


def unpack(bucket: Bucket, payload: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors of a payload, as views."""
    offset = 0
    for name, dtype, shape, size in _layout(bucket):
        yield name, payload[offset : offset + size].view(dtype).reshape(shape)
        offset += size


def checksum(payload: torch.Tensor) -> torch.Tensor:
    """Sum of the payload's 64-bit words, each times an odd number of its own, modulo 2^64: sees a flipped bit and
    swapped words. `payload` is uint8 [8·n]; int64 [] on its device."""
    total, first = torch.zeros((), dtype=torch.int64, device=payload.device), 0
    odd = torch.arange(1, 2 * CHECKED_WORDS, 2, device=payload.device)
    for words in payload.view(torch.int64).split(CHECKED_WORDS):
        total += (words * odd[: len(words)]).sum() + 2 * first * words.sum()
        first += len(words)
    return total


def weight_sums(tensors: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Sums over the bits of all numbers and over their squares, modulo 2^64: the same for the same weights, also where
    an engine joins or pads them; `checksum` is about their order. -0.0 counts as 0.0, which it becomes where an adapter
    is added."""
    total = squares = 0
    for tensor in tensors:
        for part in tensor.detach().reshape(-1).split(CHECKED_WORDS):
            bits = (part + 0).view(torch.int32 if part.dtype == torch.float32 else torch.int16).long()
            total, squares = total + int(bits.sum()), squares + int((bits * bits).sum())
    return total % 2**64, squares % 2**64


def _layout(bucket: Bucket) -> Iterator[tuple[str, torch.dtype, tuple[int, ...], int]]:
    for name, dtype_name, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        dtype: torch.dtype = getattr(torch, dtype_name)
        yield name, dtype, shape, prod(shape) * dtype.itemsize
