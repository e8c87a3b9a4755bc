"""`sdft bench`: SDFT beside SFT, and beside TRL's trainer or itself on-policy, in one run, taking turns.

All contestants stand ready at once and work in segments of some steps, one after the other, so that a
slow minute of the machine hits all of them. The headline is the median over the segments of
(machine-seconds per sample of SDFT) / (those of SFT): every device counts that a method uses.
"""

from __future__ import annotations

import itertools
import json
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from sdft_dist.bench.account import WORK, Machine, accounts, mean_lengths, push_split, time_shares
from sdft_dist.cluster import launch
from sdft_dist.config import Config
from sdft_dist.errors import UserError
from sdft_dist.fleet import Fleet
from sdft_dist.inputs import Inputs, read_inputs
from sdft_dist.loop import batch_keys, train
from sdft_dist.prepare import check_device
from sdft_dist.problems import ProblemSet
from sdft_dist.recipe import parse_config
from sdft_dist.report.charts import timeline
from sdft_dist.runlog import RunLog, read_metrics
from sdft_dist.session import ray_session, resolve_device
from sdft_dist.topology import lacking, needs, num_gpus, sizes
from sdft_dist.types import Problem

SKIPPED = 2  # steps at the start of each segment, which fill the pipeline again


class Contestant(Protocol):
    """Does optimizer steps; `after_step` blocks while others have their turn."""

    @property
    def name(self) -> str: ...

    def __call__(self, num_steps: int, after_step: Callable[[int], None]) -> None: ...


@dataclass(frozen=True, kw_only=True)
class Ours:
    """One of our methods on a fleet of its own; metrics and trace go to `folder`."""

    name: str
    config: Config
    inputs: Inputs
    folder: Path
    machines: list[Machine] = field(default_factory=list)  # one, when it has come to its end

    def __call__(self, num_steps: int, after_step: Callable[[int], None]) -> None:
        config = self.config.model_copy(update={"steps": num_steps})
        self.folder.mkdir(parents=True, exist_ok=True)
        console = Console(quiet=True)
        with (
            RunLog(self.folder, title=self.name, console=console, trace=self.folder / "trace.json") as log,
            launch(config, self.inputs, on_span=log.span) as fleet,
        ):
            train(config, self.inputs.problems, fleet.rollouts, fleet, fleet, log, after_step=after_step)
            self.machines.append(machine(fleet))


def machine(fleet: Fleet) -> Machine:
    """What the fleet has needed, and what its devices reach."""
    peak_gib = fleet.peak_gib()  # first: measuring takes memory too
    return Machine(**fleet.learner.roofline()._asdict(), peak_gib=peak_gib)


class Turns:
    """Lets the contestants' threads work one at a time, a segment each, and notes every step's end."""

    def __init__(self, names: Sequence[str], segment: int, num_steps: int) -> None:
        self.ends: dict[str, list[list[float]]] = {name: [] for name in names}
        self._names, self._segment, self._num_steps = list(names), segment, num_steps
        self._now, self._left = 0, set(names)
        self._changed = threading.Condition()
        self.error: Exception | None = None

    def after_step(self, name: str) -> Callable[[int], None]:
        """The callback of one contestant."""

        def act(step: int) -> None:
            if step:
                self.ends[name][-1].append(time.perf_counter())
            if step % self._segment == 0 and step != self._num_steps:
                if step:
                    self._pass_on()
                self._await(name)
                self.ends[name].append([time.perf_counter()])

        return act

    def run(self, contestants: Sequence[Contestant]) -> None:
        """All contestants to their end. Raises the first one's error."""
        threads = [threading.Thread(target=self._guard, args=(c,), daemon=True) for c in contestants]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.error is not None:
            raise self.error

    def _guard(self, contestant: Contestant) -> None:
        # Consumes its turns, produces `ends`, waits in `_await`, unblocked by `_pass_on` or an error.
        try:
            self._await(contestant.name)  # also to start: one engine at a time is loaded
            contestant(self._num_steps, self.after_step(contestant.name))
        except Exception as e:  # raised by `run`, in the thread that waits for all
            self.error = self.error or e
        finally:
            with self._changed:
                self._left.discard(contestant.name)
            self._pass_on()

    def _await(self, name: str) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.error is not None or self._names[self._now] == name)
        if self.error is not None:
            raise RuntimeError("another contestant failed")

    def _pass_on(self) -> None:
        with self._changed:
            for _ in self._names:
                self._now = (self._now + 1) % len(self._names)
                if self._names[self._now] in self._left:
                    break
            self._changed.notify_all()


def bench(config: Config, out: Path, *, pairs: int, segment: int, fixed: bool, peer: str | None) -> dict[str, Any]:
    """Measure and return the report, which is also written to `out/bench.json` with a picture beside it.

    `fixed` runs every completion to `rollout.max_completion_tokens`. Raises UserError as a run would.
    """
    out.mkdir(parents=True, exist_ok=True)
    least = max(SKIPPED + 2, config.rollout.max_staleness + 1)
    if segment < least:
        raise UserError(f"--segment: {segment} steps are too few: give {least}, of which {SKIPPED} are not counted")
    contestants: list[Any] = [contestant(config, method, out, fixed=fixed) for method in ("sdft", "sft")]
    if peer == "sync":
        rollout = config.rollout.model_copy(update={"max_staleness": 0})
        on_policy = contestants[0].config.model_copy(update={"rollout": rollout})
        contestants.append(replace(contestants[0], name="sync", config=on_policy, folder=out / "sync", machines=[]))
    if peer == "trl":
        from sdft_dist.bench.peer import Trl

        inputs = contestants[0].inputs
        contestants.append(
            Trl(config=config, tokenizer=inputs.tokenizer, rows=inputs.rows, fixed=fixed, folder=out / "trl")
        )
    # Not counted are the first segment of each, which warms up, and the last, whose rollouts end early.
    turns = Turns([c.name for c in contestants], segment, segment * (pairs + 2))
    with ray_session(config):
        _refuse_too_few_gpus([c.config for c in contestants if isinstance(c, Ours)])
        turns.run(contestants)
    report = _report(config, turns, contestants[:2], out, fixed)
    (out / "bench.json").write_text(json.dumps(report, indent=2) + "\n")
    timeline(out / "sdft" / "trace.json", out / "timeline.png")
    return report


def _refuse_too_few_gpus(configs: Sequence[Config]) -> None:
    """Raises UserError where the contestants, which all stay while they take turns, do not fit beside each other."""
    import ray

    wanted = [need for config in configs for need in needs(config, resolve_device(config))]
    if missing := lacking(wanted, ray.nodes()):
        raise UserError(
            f"bench: SDFT and SFT take turns, and each keeps its GPUs: {missing}; with fewer, measure a role at a "
            "time (--learner-only, with method=sft too, --generator-only, --teacher-only)"
        )


def contestant(config: Config, method: str, out: Path, *, fixed: bool) -> Ours:
    """One of our methods on the recipe's rows; one without a teacher keeps no average. With `fixed` all completions
    have `rollout.max_completion_tokens`, and the demonstrations that are imitated too."""
    check_device(config)
    inputs = read_inputs(config)
    if fixed:
        problems = _imitating(inputs.problems, config.rollout.max_completion_tokens)
        inputs = replace(inputs, problems=problems, stop_ids=[])
    fields = {**config.model_dump(), "method": method, "run_dir": str(out / method)}
    if method != "sdft":
        fields["teacher"]["kind"] = "base"
    return Ours(name=method, config=parse_config(fields), inputs=inputs, folder=out / method)


def devices(config: Config) -> int:
    """Those that the method's roles take, in evaluation none. On CPU all share one."""
    roles = ("learner", "generator", "teacher") if config.method == "sdft" else ("learner",)
    if resolve_device(config) == "cpu":
        return 1
    return num_gpus(needs(config, "cuda", roles))


def spans(config: Config) -> dict[str, int]:
    """Devices of one actor of each role."""
    on_cpu = resolve_device(config) == "cpu"
    return {role: 1 if on_cpu else size.gpus for role, size in sizes(config).items()}


def _imitating(problems: ProblemSet, num_tokens: int) -> ProblemSet:
    """The same prompts with demonstrations of as many tokens as SDFT's completions have."""
    import numpy as np

    return ProblemSet(
        Problem(
            prompt_ids=p.prompt_ids,
            teacher_prompt_ids=p.teacher_prompt_ids,
            demonstration_ids=np.resize(p.demonstration_ids, num_tokens),
        )
        for p in problems
    )


def _report(config: Config, turns: Turns, ours: Sequence[Ours], out: Path, fixed: bool) -> dict[str, Any]:
    sdft, sft = ours
    batch = {contestant.name: len(batch_keys(contestant.config, contestant.inputs.problems, 0)) for contestant in ours}
    batch |= {"sync": batch["sdft"], "trl": config.rollout.prompts_per_step}
    rates = {name: [_rate(ends, batch[name]) for ends in segments[1:-1]] for name, segments in turns.ends.items()}
    used = {"sdft": devices(sdft.config), "sft": devices(sft.config), "sync": devices(sdft.config), "trl": 1}
    cost = {name: [used[name] / r for r in found] for name, found in rates.items()}
    metrics = {method: read_metrics(out / method, "train") for method in ("sdft", "sft")}
    completion = statistics.median(m["completion_tokens_mean"] for m in metrics["sdft"])
    warm = {method: _warm(metrics[method], turns.ends[method]) for method in metrics}
    busy = {method: _busy(warm[method], turns.ends[method]) for method in warm}
    tokens = {each.name: _tokens(warm[each.name], each.inputs.problems) for each in ours}
    shares, step_s = time_shares(busy["sdft"], config), _wall(turns.ends["sdft"]) / len(warm["sdft"])
    planned = batch["sdft"] * (1 + config.rollout.max_staleness) / config.cluster.generators
    decode_batch = {"measured": _decode_batch(warm["sdft"]), "planned": min(planned, config.cluster.max_sequences)}
    report: dict[str, Any] = {
        "sdft_over_sft": summary([a / b for a, b in zip(cost["sdft"], cost["sft"], strict=True)]),
        "samples_per_s": {name: summary(found) for name, found in rates.items()},
        "tokens_per_device_s": {
            name: {what: summary([number / c for c in cost[name]]) for what, number in found.items()}
            for name, found in tokens.items()
        },
        "devices": {name: used[name] for name in rates},
        "batch": {name: batch[name] for name in rates},  # samples of a step
        "segments": len(rates["sdft"]),
        "fixed_lengths": fixed,
        "completion_tokens": completion,
        "max_staleness": config.rollout.max_staleness,
        "staleness_shares": _shares(metrics["sdft"]),
        "decode_batch": decode_batch,  # requests of one generator at a time
        "padding_share": {name: statistics.mean(m["padding_share"] for m in found) for name, found in warm.items()},
        "busy_share": busy["sdft"],
        "time_share": shares,
        "push_in_a_step": push_split(shares, step_s),
        "roles": _roles(turns, ours, batch, busy, completion, decode_batch["planned"]),
    }
    for peer in rates.keys() & {"sync", "trl"}:
        report[f"sdft_over_{peer}_speed"] = summary([a / b for a, b in zip(rates["sdft"], rates[peer], strict=True)])
    return report


def _roles(
    turns: Turns,
    ours: Sequence[Ours],
    batch: dict[str, int],
    busy: dict[str, dict[str, float]],
    completion: float,
    decode_batch: float,
) -> dict[str, dict[str, float]]:
    """Each role's account: the time in which it worked, whatever the others did meanwhile."""
    sdft, sft = ours
    config, each = sdft.config, spans(sdft.config)

    def per_sample(method: str, what: str) -> float:
        segments = turns.ends[method]
        return busy[method][what] * _wall(segments) / (batch[method] * sum(len(ends) - 1 for ends in segments[1:-1]))

    device_s = {role: each[role] * per_sample("sdft", f"{role}/{work}") for role, work in WORK.items()}
    lengths = mean_lengths(sdft.inputs.problems, completion)
    found = accounts(config, lengths, sdft.machines[0], device_s, decode_batch)
    imitated = statistics.mean(len(p.demonstration_ids) for p in sft.inputs.problems)
    alone = accounts(
        sft.config,
        mean_lengths(sft.inputs.problems, imitated),
        sft.machines[0],
        {"sft": per_sample("sft", "learner/train")},
        1,
    )
    return found | alone


def _rate(ends: Sequence[float], batch: int) -> float:
    """Samples per second of one segment, without its first steps."""
    return batch * (len(ends) - 1 - SKIPPED) / (ends[-1] - ends[SKIPPED])


def _wall(segments: Sequence[Sequence[float]]) -> float:
    """Seconds of the counted segments."""
    return sum(ends[-1] - ends[0] for ends in segments[1:-1])


def _warm(metrics: Sequence[dict[str, Any]], segments: Sequence[Sequence[float]]) -> Sequence[dict[str, Any]]:
    """The steps of the counted segments."""
    steps = len(segments[0]) - 1
    return metrics[steps:-steps]


def _busy(warm: Sequence[dict[str, Any]], segments: Sequence[Sequence[float]]) -> dict[str, float]:
    """Share of the wall clock in which each thing was done, of the counted segments."""
    names = sorted({name for m in warm for name in m if name.startswith("busy/")})
    return {name.removeprefix("busy/"): sum(m.get(name, 0.0) for m in warm) / _wall(segments) for name in names}


def _decode_batch(warm: Sequence[dict[str, Any]]) -> float:
    """Requests that a generator decoded at a time, mean over the time in which it did."""
    decoded = [(m["busy/generator/decode"], m["decode_batch_mean"]) for m in warm if "decode_batch_mean" in m]
    return sum(seconds * size for seconds, size in decoded) / sum(seconds for seconds, _ in decoded)


def _tokens(warm: Sequence[dict[str, Any]], problems: ProblemSet) -> dict[str, float]:
    """Per sample: those with a loss, and all that the learner reads."""
    samples = sum(m["samples"] for m in warm)
    completion = sum(m["samples"] * m["completion_tokens_mean"] for m in warm) / samples
    prompt = statistics.mean(len(p.prompt_ids) for p in problems)
    return {"trained": sum(m["trained_tokens"] for m in warm) / samples, "processed": prompt + completion}


def _shares(metrics: Sequence[dict[str, Any]]) -> list[float]:
    """Share of samples that were 0, 1, 2, … optimizer steps old when they were trained on."""
    counted = [m["staleness_counts"] for m in metrics]
    sums = [sum(column) for column in itertools.zip_longest(*counted, fillvalue=0)]
    return [n / sum(sums) for n in sums]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def spread(found: dict[str, float], digits: int) -> str:
    """A summary as text."""
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} – {found['high']:.{digits}f})"


def show(report: dict[str, Any], console: Console) -> None:
    """The report as two tables."""
    table = Table(title=f"{report['segments']} segments each, taking turns; median (lowest – highest)")
    for column in ("", "samples/s", "devices", "trained", "processed"):
        table.add_column(column)
    for name, r in report["samples_per_s"].items():
        tokens = report["tokens_per_device_s"].get(name, {})  # of those that tell
        numbers = [f"{number['median']:.0f}" for number in tokens.values()]
        table.add_row(name, spread(r, 1), str(report["devices"][name]), *numbers)
    console.print(table)
    console.print("trained: tokens/s of a device that have a loss; processed: with their prompts")
    console.print(f"device-seconds per sample, SDFT / SFT: {spread(report['sdft_over_sft'], 2)}")
    for peer, what in (("trl", "ours / TRL"), ("sync", "asynchronous / synchronous")):
        if f"sdft_over_{peer}_speed" in report:
            console.print(f"samples/s, {what}: {spread(report[f'sdft_over_{peer}_speed'], 2)}")
    table = Table(title="SDFT: what one actor does with its time, %")
    for column in ("", "work", "waits for weights", "sync", "waits for data"):
        table.add_column(column, justify="right" if column else "left")
    for role, spent in report["time_share"].items():
        table.add_row(role, *(f"{100 * share:.0f}" for share in spent.values()))
    console.print(table)
    lags = ", ".join(f"{lag}: {100 * share:.0f}%" for lag, share in enumerate(report["staleness_shares"]))
    pushes, decoding = report["push_in_a_step"], report["decode_batch"]
    split = ", ".join(f"{name.removesuffix('_s').replace('_', ' ')} {1e3 * s:.1f}" for name, s in pushes.items())
    console.print(
        f"samples by their age in steps: {lags}\n"
        f"pushes, ms of each step: {split}\n"
        f"decode batch: {decoding['measured']:.1f}, planned {decoding['planned']:.0f}",
        highlight=False,
    )
    table = Table(title="At work: device-ms per sample, tokens/s of a device, utilisation, peak memory of one actor")
    for column in ("", "measured", "predicted", "tokens/s", "MFU", "GiB", "predicted GiB"):
        table.add_column(column, justify="right" if column else "left")
    for role, a in report["roles"].items():
        times = (f"{1e3 * a['device_s']:.2f}", f"{1e3 * a['predicted_s']:.2f}")
        gib = (f"{a['peak_gib']:.2f}", f"{a['predicted_gib']:.2f}" if "predicted_gib" in a else "–")
        table.add_row(role, *times, f"{a['tokens_per_device_s']:.0f}", f"{100 * a['mfu']:.1f}%", *gib)
    console.print(table)


def regression(report: dict[str, Any], baseline: dict[str, Any]) -> str | None:
    """What has become more than 10% worse than in `baseline`, or None. Raises UserError where that is of
    something else."""
    measure, name = ("batch_s", f"{report['role']} seconds") if "role" in report else ("sdft_over_sft", "SDFT / SFT")
    if report.get("role") != baseline.get("role") or measure not in baseline:
        raise UserError("--baseline: is not of the same kind of measurement")
    before, now = (r[measure]["median"] for r in (baseline, report))
    if now > 1.1 * before:
        return f"{name} was {before:.3g} and is {now:.3g}"
    return None
