"""Items to micro-batches under a token budget, balanced over ranks, and a micro-batch to rows. Pure.

All ranks get the same number of micro-batches, because ZeRO's collectives run inside forward and
backward; a rank with nothing to do gets an empty one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np


def pack(num_tokens: Sequence[int], *, num_ranks: int, budget: int) -> list[list[list[int]]]:
    """Spread items over `num_ranks` x k micro-batches of at most `budget` tokens, with the least k.

    `num_tokens[i]` is the length of item i. Returns items as [rank][micro-batch][item]. Raises ValueError for an item
    above the budget.
    """
    too_long = [i for i, n in enumerate(num_tokens) if n > budget]
    if too_long:
        i = too_long[0]
        raise ValueError(f"item {i} has {num_tokens[i]} tokens; learner.tokens_per_microbatch is {budget}")
    k = max(1, ceil(sum(num_tokens) / (num_ranks * budget)))
    while True:
        bins, fullest = _balanced(num_tokens, num_ranks * k)
        if fullest <= budget:
            # Bins r, r + num_ranks, ... : the heaviest bins, filled first, fall on different ranks.
            return [bins[rank::num_ranks] for rank in range(num_ranks)]
        k += 1


def rows(num_tokens: Sequence[int], *, width: int) -> list[list[int]]:
    """Lay sequences one behind the other in rows of equal length; returns the sequences of each row.

    Where attention keeps sequences apart by a mask, a row of R tokens costs about R · (R + 8 · width)
    (`width` is the model's; measured with sdpa); with one sequence in each row there is no mask, and causal
    attention skips half. So many short rows are cheap in attention and few long ones leave fewer slots free;
    the cheapest of n, 4n/5, 16n/25, … balanced rows is taken.
    """
    if not num_tokens:
        return []
    best: tuple[float, list[list[int]]] | None = None
    count = len(num_tokens)
    while count:
        found, slots = _balanced(num_tokens, count)
        attention = slots / 2 if count == len(num_tokens) else slots
        cost = count * slots * (attention + 8.0 * width)
        if best is None or cost < best[0]:
            best = cost, found
        count = count * 4 // 5
    assert best is not None
    return best[1]


def one_after_another(num_tokens: Sequence[int]) -> list[list[int]]:
    """A single row, as FlashAttention's kernels for sequences of unequal length want it."""
    return [list(range(len(num_tokens)))]


def _balanced(num_tokens: Sequence[int], num_bins: int) -> tuple[list[list[int]], int]:
    """Longest first into the emptiest bin, then exchanges with the fullest one; returns the bins and the load
    of the fullest."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [0] * num_bins
    for i in sorted(range(len(num_tokens)), key=lambda i: (-num_tokens[i], i)):
        b = loads.index(min(loads))
        bins[b].append(i)
        loads[b] += num_tokens[i]
    while _exchange(num_tokens, bins, loads):
        pass
    return bins, max(loads)


def _exchange(num_tokens: Sequence[int], bins: list[list[int]], loads: list[int]) -> bool:
    """Lighten the fullest bin by moving one item to another bin, the emptiest that it helps with, or by
    swapping it for a shorter one there. False where nothing gains more than 0.2%."""
    fullest = loads.index(max(loads))
    least = loads[fullest] // 500
    mine = np.array([num_tokens[i] for i in bins[fullest]])
    for other in sorted(range(len(bins)), key=lambda b: (loads[b], b)):
        gap = loads[fullest] - loads[other]
        if gap <= 2 * least:
            break
        theirs = np.array([*(num_tokens[i] for i in bins[other]), 0])  # the last: nothing comes back
        moved = mine[:, None] - theirs
        gain = np.minimum(moved, gap - moved)  # of the fuller of the two
        a, b = np.unravel_index(gain.argmax(), gain.shape)
        if gain[a, b] > least:
            bins[other].append(bins[fullest].pop(int(a)))
            if b < len(theirs) - 1:
                bins[fullest].append(bins[other].pop(int(b)))
            loads[fullest] -= int(moved[a, b])
            loads[other] += int(moved[a, b])
            return True
    return False
