"""Signs of trouble in a run's metrics, each with its likely cause and the setting to change. Pure.

Every sign is told once. Shares are 0 to 1, lengths in tokens, log-probs in nats.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import fmean as mean
from typing import Any

from sdft_dist.types import TrainItem

LONG = 16  # tokens of completions whose first three are not most of what there is
WINDOW = 20  # steps that a length drift is judged over
MANY_CUT, MOST_CUT = 0.25, 0.5  # of the completions: sampled; held-out ones, which a run may get over
NUM_FIRST, NUM_DECILES = 32, 10  # bins of the divergence by position


def position_bin(position: int, length: int) -> int:
    """Bin of a completion position: itself for the first 32 tokens, then the decile of the rest."""
    if position < NUM_FIRST:
        return position
    return NUM_FIRST + min(NUM_DECILES - 1, NUM_DECILES * (position - NUM_FIRST) // max(1, length - NUM_FIRST))


def item_metrics(step: int, items: Sequence[TrainItem]) -> dict[str, Any]:
    """What the completions' metadata shows; `step` is the number of optimizer steps done before. How many samples
    are 0, 1, 2, … steps old is in `staleness_counts`."""
    lengths = [item.num_completion_tokens for item in items]
    lags = [step - item.policy_version for item in items if item.policy_version >= 0]
    return {
        "completion_tokens_mean": mean(lengths) if lengths else 0.0,
        "empty_share": mean(n <= 1 for n in lengths) if items else 0.0,
        **(_staleness(lags) if lags else {}),
    }


def _staleness(lags: Sequence[int]) -> dict[str, Any]:
    counts = [lags.count(lag) for lag in range(1 + max(lags))]
    return {"staleness_mean": mean(lags), "staleness_max": max(lags), "staleness_counts": counts}


def length_signs(num_steps: int, warmup_steps: int) -> list[str]:
    """What is amiss with a run of `num_steps`, before its first."""
    if warmup_steps < num_steps:
        return []
    return [
        f"the run has {num_steps} steps and warms up for {warmup_steps}: the rate never reaches optim.learning_rate; "
        "lower optim.warmup_steps, or raise epochs"
    ]


class Watch:
    """Feed it each step's metrics; it gives the warnings that are new."""

    def __init__(self) -> None:
        self._first: list[float] = []
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._best: dict[str, tuple[float, float]] = {}  # of each held-out set: accuracy, lower end of its interval
        self._cut_at_first: float | None = None
        self._told: set[str] = set()

    def step(self, metrics: dict[str, Any]) -> list[str]:
        """Warnings that this step gives rise to for the first time."""
        length = metrics["completion_tokens_mean"]
        if len(self._first) < WINDOW:
            self._first.append(length)
        self._last.append(length)
        if self._cut_at_first is None:
            self._cut_at_first = metrics["cut_share"]
        signs = _signs(metrics)
        if "cut" in signs and self._cut_at_first <= MANY_CUT:
            signs["cut"] += (
                f". At first it was {100 * self._cut_at_first:.0f}%: where samples/ shows that they do not end any "
                "more, lower optim.learning_rate instead"
            )
        return self._fresh({**signs, **self._drift()})

    def evaluation(self, record: dict[str, Any]) -> list[str]:
        """Warnings that this evaluation gives rise to for the first time."""
        shares = {
            name.removesuffix("_cut_share"): share for name, share in record.items() if name.endswith("_cut_share")
        }
        return self._fresh(
            {
                f"cut {name}": f"{100 * share:.0f}% of the completions on {name} are cut, and judged as they are: "
                "raise eval.max_completion_tokens, unless the model has yet to learn where to end"
                for name, share in shares.items()
                if share > MOST_CUT
            }
            | self._fallen(record)
        )

    def _fallen(self, record: dict[str, Any]) -> dict[str, str]:
        """Of the held-out set that lost most of its best accuracy, where their 95% intervals are apart."""
        falls: list[tuple[float, str]] = []
        for name in (key.removesuffix("_interval") for key in record if key.endswith("_interval")):
            now, (low, high) = record[name], record[f"{name}_interval"]
            best, best_low = self._best.get(name, (now, low))
            self._best[name] = max((best, best_low), (now, low))
            if high < best_low:
                falls.append((best - now, f"accuracy on {name} has fallen from {best:.0%} to {now:.0%}"))
        if not falls:
            return {}
        return {
            "fallen": f"{max(falls)[1]}: lower optim.learning_rate, or train for fewer steps; with eval.metric, "
            "eval.keep_best keeps the best and eval.patience stops early"
        }

    def _fresh(self, signs: dict[str, str]) -> list[str]:
        fresh = [text for name, text in signs.items() if name not in self._told]
        self._told |= signs.keys()
        return fresh

    def _drift(self) -> dict[str, str]:
        if len(self._first) < WINDOW:
            return {}
        before, now = max(1.0, mean(self._first)), max(1.0, mean(self._last))
        if 0.5 <= now / before <= 2:
            return {}
        return {
            "drift": f"completions went from {before:.0f} to {now:.0f} tokens on average: the student drifts; "
            "look at samples/ in the run directory, lower optim.learning_rate, or use loss.divergence=forward_kl"
        }


def _signs(m: dict[str, Any]) -> dict[str, str]:
    signs = {}
    if m.get("logprob_difference_mean", 0.0) > 0.1:
        signs["mismatch"] = (
            f"generator and learner differ by {m['logprob_difference_mean']:.2f} nats a token: stale or different "
            "weights, or numerics; check model.dtype, or weight samples with loss.importance=token"
        )
    if m["cut_share"] > MANY_CUT:
        signs["cut"] = (
            f"{100 * m['cut_share']:.0f}% of the completions are cut: raise rollout.max_completion_tokens, or leave "
            "them out with rollout.cut_completions=drop"
        )
    if m["empty_share"] > 0.1:
        signs["empty"] = (
            f"{100 * m['empty_share']:.0f}% of the completions are empty: the student ends at once; check the chat "
            "template and the demonstrations"
        )
    if m.get("trained_tokens", 1) == 0:
        signs["untrained"] = (
            "no token of the step was trained: no completion is longer than loss.skip_first_tokens; lower it"
        )
    if m.get("effective_sample_share", 1.0) < 0.5:
        signs["ess"] = (
            f"importance weights leave {100 * m['effective_sample_share']:.0f}% of the tokens effective: samples are "
            "too stale or too far off; lower loss.importance_clip or the learning rate"
        )
    bins = m.get("divergence_by_position", [])[:NUM_FIRST]  # None where nothing was trained, as what is skipped already
    first, rest = ([value for value in part if value is not None] for part in (bins[:3], bins[3:]))
    sampled = "staleness_mean" in m
    if sampled and first and len(first + rest) > LONG and mean(first) > 10 * mean(rest) > 0:
        signs["first tokens"] = (
            "the divergence sits in the first three tokens: the teacher opens as the demonstration does; consider "
            "loss.skip_first_tokens=3"
        )
    return signs
