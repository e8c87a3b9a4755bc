"""What a model that is taught one task after another keeps: pure arithmetic on its accuracies.

Average accuracy, backward and forward transfer as in Lopez-Paz and Ranzato (arXiv 1706.08840, section 2),
forgetting as in Chaudhry et al. (arXiv 1801.10112, definition 3).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Retention:
    """`stages[i][name]` is the accuracy, 0 to 1, on the held-out set `name` after `i` tasks, `stages[0]` that
    of the start. `tasks` are the sets of the tasks in the order in which they were taught, `prior` the others."""

    tasks: Sequence[str]
    prior: Sequence[str]
    stages: Sequence[Mapping[str, float]]

    @property
    def taught(self) -> int:
        """How many tasks were taught so far."""
        return len(self.stages) - 1

    def average(self) -> float:
        """Mean accuracy over the tasks taught, at the end."""
        return statistics.mean(self.stages[-1][task] for task in self.tasks[: self.taught])

    def prior_mean(self, stage: int = -1) -> float | None:
        """Mean accuracy on the prior sets after a stage; None where there is no such set."""
        return statistics.mean(self.stages[stage][name] for name in self.prior) if self.prior else None

    def backward_transfer(self) -> float | None:
        """Mean over all but the last task of accuracy at the end minus accuracy just after its own stage; None
        before the second stage."""
        found = [self.stages[-1][task] - self.stages[i][task] for i, task in self._earlier()]
        return statistics.mean(found) if found else None

    def forgetting(self) -> float | None:
        """Mean over all but the last task of its best accuracy before the last stage, from its own stage on,
        minus that at the end; None before the second stage."""
        found = [max(stage[task] for stage in self.stages[i:-1]) - self.stages[-1][task] for i, task in self._earlier()]
        return statistics.mean(found) if found else None

    def forward_transfer(self) -> float | None:
        """Mean over all but the first task of accuracy just before its own stage minus that of the start; None
        before the second stage."""
        found = [self.stages[i][task] - self.stages[0][task] for i, task in enumerate(self.tasks[: self.taught]) if i]
        return statistics.mean(found) if found else None

    def measures(self) -> dict[str, float | None]:
        """All of them by name."""
        return {
            "average": self.average(),
            "forgetting": self.forgetting(),
            "backward transfer": self.backward_transfer(),
            "forward transfer": self.forward_transfer(),
            "prior, start": self.prior_mean(0),
            "prior, end": self.prior_mean(),
        }

    def _earlier(self) -> list[tuple[int, str]]:
        """The tasks before the last one taught, each with the number of the stage that ended with it."""
        return list(enumerate(self.tasks[: self.taught - 1], start=1)) if self.taught > 1 else []


def normalised(value: float, start: float, best: float) -> float | None:
    """An accuracy on a scale where 0 is that of the start and 1 the best that any method reached on that set;
    None where no method got better than the start."""
    return (value - start) / (best - start) if best > start else None
