"""What a model that is taught one task after another keeps: pure arithmetic on its accuracies."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence


def retention(
    tasks: Sequence[str], prior: Sequence[str], stages: Sequence[Mapping[str, float]]
) -> dict[str, float | None]:
    """Means by name, None where there is nothing to take one of:
    - average: accuracy at the end, over the tasks taught;
    - forgetting: the best accuracy after a task's own stage and before the last one, minus that at the end; over all
      tasks but the last;
    - backward transfer: accuracy at the end minus that just after a task's own stage; over all tasks but the last;
    - forward transfer: accuracy just before a task's own stage minus that at the start; over all tasks but the first;
    - prior, start and prior, end: accuracy over the prior sets.

    `stages[i][name]` is the accuracy, 0 to 1, on the held-out set `name` after `i` tasks. `tasks` are the sets of the
    tasks in the order in which they are taught, `prior` the others. Average and transfer are those of Lopez-Paz and
    Ranzato (arXiv 1706.08840, section 2), forgetting that of Chaudhry et al. (arXiv 1801.10112, definition 3).
    """
    start, end = stages[0], stages[-1]
    taught = tasks[: len(stages) - 1]
    earlier = list(enumerate(taught[:-1], start=1))  # with the numbers of their own stages
    return {
        "average": _mean(end[task] for task in taught),
        "forgetting": _mean(max(stage[task] for stage in stages[i:-1]) - end[task] for i, task in earlier),
        "backward transfer": _mean(end[task] - stages[i][task] for i, task in earlier),
        "forward transfer": _mean(stages[i][task] - start[task] for i, task in enumerate(taught) if i),
        "prior, start": _mean(start[name] for name in prior),
        "prior, end": _mean(end[name] for name in prior),
    }


def _mean(values: Iterable[float]) -> float | None:
    found = list(values)
    return statistics.mean(found) if found else None


def normalised(value: float, start: float, best: float) -> float | None:
    """An accuracy on a scale where 0 is that of the start and 1 the best that any method reached on that set;
    None where no method got better than the start."""
    return (value - start) / (best - start) if best > start else None
