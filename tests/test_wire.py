"""The byte layout of a weight push."""

import pytest
import torch

from sdft_dist import wire
from sdft_dist.wire import bucket_bytes, checksum, opened, pack, plan_buckets, unpack, weight_sums


def test_tensors_come_back_as_they_were_cast():
    tensors = {"a": torch.randn(3, 5), "b": torch.randn(7), "c": torch.randn(2, 2)}
    (bucket,) = plan_buckets([(n, torch.bfloat16, tuple(t.shape)) for n, t in tensors.items()], 1 << 20)
    message = pack(bucket, tensors, torch.device("cpu"))
    assert len(message) == bucket_bytes(bucket) + 8
    back = dict(unpack(bucket, opened(bucket, message)))
    assert all(torch.equal(back[n], t.bfloat16()) for n, t in tensors.items())
    message[3] ^= 1
    with pytest.raises(RuntimeError, match="checksum of the bucket a … c is wrong"):
        opened(bucket, message)


def test_buckets_keep_the_order_and_the_size():
    weights = [(str(i), torch.float32, (100,)) for i in range(10)] + [("big", torch.float32, (1000,))]
    buckets = plan_buckets(weights, 1000)
    assert [n for b in buckets for n in b.names] == [n for n, _, _ in weights]
    assert [len(b.names) for b in buckets] == [2, 2, 2, 2, 2, 1]


@pytest.mark.fault("tensor altered on the way", "flipped bit, swapped words", "noticed before anything is served")
def test_checksum_sees_a_flipped_bit_and_swapped_words():
    payload = torch.arange(64, dtype=torch.uint8)
    flipped, swapped = payload.clone(), payload.clone()
    flipped[17] ^= 1
    swapped[:8], swapped[8:16] = payload[8:16], payload[:8]
    assert len({int(checksum(p)) for p in (payload, flipped, swapped)}) == 3


def test_checksum_is_that_of_all_words_at_once(monkeypatch):
    payload = torch.randint(0, 256, (8 * 23,), dtype=torch.uint8)
    words = payload.view(torch.int64)
    whole = int((words * torch.arange(1, 46, 2)).sum())
    monkeypatch.setattr(wire, "CHECKED_WORDS", 5)
    assert int(checksum(payload)) == whole


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_of_weights_do_not_depend_on_how_an_engine_lays_them_out(dtype, monkeypatch):
    a, b = torch.randn(7, 5).to(dtype), torch.randn(3, 5).to(dtype)
    a[0, 0] = 0.0
    joined = torch.cat([b, a, torch.zeros(6, 5, dtype=dtype)])
    joined[3, 0] = -0.0
    whole = weight_sums([a, b])
    assert weight_sums([joined]) == whole
    monkeypatch.setattr(wire, "CHECKED_WORDS", 4)
    assert weight_sums([a, b]) == whole
    joined.view(torch.int32 if dtype == torch.float32 else torch.int16)[1, 1] ^= 1
    assert weight_sums([joined]) != whole
    moved = b.clone()  # by bits that leave their sum as it was
    bits = moved.view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[0, 0] += 1
    bits[0, 1] -= 1
    assert weight_sums([a, moved]) != whole
