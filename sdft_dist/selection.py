"""Which evaluation of a run is the best, and whether it is time to stop: pure functions of its records.

They are all that is needed after a restart too; nothing else remembers.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sdft_dist.config import MEAN, EvalConfig


def score(config: EvalConfig, record: Mapping[str, Any]) -> float:
    """What `eval.metric` names of one evaluation, 0 to 1."""
    if config.metric in config.sets:  # also where a set is called "mean"
        return float(record[config.metric])
    assert config.metric == MEAN
    return statistics.mean(record[name] for name in config.sets)


def best(config: EvalConfig, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first of the best evaluations after training began; None where there is none."""
    return max(_trained(config, records), key=lambda record: score(config, record), default=None)


def exhausted(config: EvalConfig, records: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the last `eval.patience` evaluations were all no better than the best before them."""
    trained = _trained(config, records)
    found = best(config, trained) if config.patience else None
    return found is not None and len(trained) - 1 - trained.index(found) >= config.patience


def exported(config: EvalConfig, records: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The evaluation of the weights that a finished run exports; None where it made none."""
    if config.keep_best:
        return best(config, records)
    return records[-1] if records else None


def _trained(config: EvalConfig, records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Without those of before training, and of before a resumed run got a further held-out set."""
    judged = [config.metric] if config.metric in config.sets else list(config.sets)
    return [record for record in records if record["step"] > 0 and all(name in record for name in judged)]
