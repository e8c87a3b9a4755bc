"""Packing under a token budget."""

import random

import pytest

from sdft_dist.batching import pack, rows


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


def test_few_items_a_rank_are_balanced_by_exchanges():
    rng = random.Random(2)
    shares = []
    for _ in range(20):
        lengths = [int(rng.lognormvariate(5.5, 0.5)) for _ in range(32)]
        loads = [sum(lengths[i] for m in rank for i in m) for rank in pack(lengths, num_ranks=8, budget=8192)]
        assert sum(loads) == sum(lengths)
        shares.append(1 - sum(loads) / (8 * max(loads)))
    assert sum(shares) / len(shares) < 0.015


def test_one_long_item_is_left_alone():
    (plan,) = pack([1000, 10, 20, 30], num_ranks=1, budget=1000)
    assert [0] in plan


def test_fewer_items_than_ranks_leave_empty_micro_batches():
    assert sorted(pack([5], num_ranks=2, budget=10)) == [[[]], [[0]]]


def test_an_item_above_the_budget_is_refused():
    with pytest.raises(ValueError, match="item 1 has 11 tokens"):
        pack([5, 11], num_ranks=1, budget=10)


def cost(found, lengths, width):
    filled = max(sum(lengths[i] for i in row) for row in found)
    return len(found) * filled * (filled + 8 * width)


def test_rows_hold_every_sequence_once_and_cost_no_more_than_one_row_or_padding():
    rng = random.Random(3)
    for width in (64, 128, 2560):
        for _ in range(30):
            lengths = [rng.randint(1, rng.choice([9, 300])) for _ in range(rng.randint(1, 40))]
            found = rows(lengths, width=width)
            assert sorted(i for row in found for i in row) == list(range(len(lengths)))
            padded = [[i] for i in range(len(lengths))]
            assert cost(found, lengths, width) <= cost(padded, lengths, width)
            assert cost(found, lengths, width) <= 1.02 * cost([list(range(len(lengths)))], lengths, width)
    assert rows([], width=8) == []
    assert rows([5, 5, 5], width=128) == [[0], [1], [2]]


def test_the_wider_the_model_the_fewer_slots_are_left_free():
    """A wide model spends little of its time in attention, so it can have longer rows."""
    rng = random.Random(0)
    lengths = [rng.randint(100, 900) for _ in range(32)]
    shares = []
    for width in (64, 1024, 65_536):
        found = rows(lengths, width=width)
        slots = len(found) * max(sum(lengths[i] for i in row) for row in found)
        shares.append(1 - sum(lengths) / slots)
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.03
