"""Items to micro-batches under a token budget, balanced over ranks. Pure.

All ranks get the same number of micro-batches, because ZeRO's collectives run inside forward and
backward; a rank with nothing to do gets an empty one.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

Plan = list[list[list[int]]]  # [rank][micro-batch][position in the batch]


def pack(num_tokens: Sequence[int], *, num_ranks: int, budget: int) -> Plan:
    """Spread items over `num_ranks` x k micro-batches of at most `budget` tokens, with the least k.

    Longest first into the emptiest bin, which keeps bins within a few percent of each other.
    `num_tokens[i]` is the length of item i. Raises ValueError for an item above the budget.
    """
    too_long = [i for i, n in enumerate(num_tokens) if n > budget]
    if too_long:
        i = too_long[0]
        raise ValueError(f"item {i} has {num_tokens[i]} tokens; learner.tokens_per_microbatch is {budget}")
    longest_first = sorted(range(len(num_tokens)), key=lambda i: (-num_tokens[i], i))
    k = max(1, ceil(sum(num_tokens) / (num_ranks * budget)))
    while True:
        bins: list[list[int]] = [[] for _ in range(num_ranks * k)]
        loads = [0] * len(bins)
        for i in longest_first:
            b = loads.index(min(loads))
            bins[b].append(i)
            loads[b] += num_tokens[i]
        if max(loads) <= budget:
            # Bins r, r + num_ranks, ... : the heaviest bins, filled first, fall on different ranks.
            return [bins[rank::num_ranks] for rank in range(num_ranks)]
        k += 1
