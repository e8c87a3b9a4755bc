"""Packing under a token budget."""

import random

import pytest

from sdft_dist.batching import pack


def test_every_item_is_packed_once_and_no_bin_is_over_budget():
    rng = random.Random(0)
    lengths = [rng.randrange(1, 500) for _ in range(97)]
    plan = pack(lengths, num_ranks=3, budget=1000)
    assert sorted(i for rank in plan for m in rank for i in m) == list(range(97))
    assert len({len(rank) for rank in plan}) == 1
    assert max(sum(lengths[i] for i in m) for rank in plan for m in rank) <= 1000


def test_ranks_are_balanced():
    rng = random.Random(1)
    lengths = [rng.randrange(100, 900) for _ in range(256)]
    loads = [sum(lengths[i] for m in rank for i in m) for rank in pack(lengths, num_ranks=8, budget=4096)]
    assert max(loads) / (sum(loads) / len(loads)) < 1.03


def test_fewer_items_than_ranks_leave_empty_micro_batches():
    assert sorted(pack([5], num_ranks=2, budget=10)) == [[[]], [[0]]]


def test_an_item_above_the_budget_is_refused():
    with pytest.raises(ValueError, match="item 1 has 11 tokens"):
        pack([5, 11], num_ranks=1, budget=10)
