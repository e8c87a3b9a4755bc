"""The exponential moving average of the student: fp32, sharded like the optimizer.

In bf16 most updates at rate 0.01 round to nothing; here each rank averages the fp32 master fragments
that it owns, with no communication until the average is gathered for a push.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from learner.zero import Fragment


class Ema:
    """One fp32 average per fragment of this rank, started at `anchor`: full weights by name, or the
    student's own where it is None."""

    def __init__(self, fragments: Iterable[Fragment], anchor: Mapping[str, torch.Tensor] | None = None) -> None:
        # By name: the offset in the flattened parameter, and the average, fp32 [n].
        self.averages = {f.name: (f.start, f.master.detach().clone()) for f in fragments}
        if anchor is not None:
            for name, (start, average) in self.averages.items():
                average.copy_(anchor[name].reshape(-1)[start : start + len(average)])

    def load(self, read: Callable[[str, int, int], torch.Tensor]) -> None:
        """Take averages over from `read(name, start, size)`, fp32 [size]."""
        for name, (start, average) in self.averages.items():
            average.copy_(read(name, start, len(average)))

    def update(self, fragments: Iterable[Fragment], rate: float) -> None:
        """average += rate · (student − average), for every fragment."""
        for f in fragments:
            self.averages[f.name][1].lerp_(f.master.detach(), rate)
