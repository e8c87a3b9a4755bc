"""What `sdft bench` tells: from the steps' ends and records to ratios, shares and each role's account."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdft_dist.bench.account import WORK, accounts, mean_lengths, push_split, time_shares
from sdft_dist.bench.contestants import Ours, devices, spans
from sdft_dist.config import Config
from sdft_dist.errors import UserError
from sdft_dist.loop import batch_keys
from sdft_dist.problems import ProblemSet
from sdft_dist.runlog import read_metrics

SKIPPED = 2  # steps at the start of each segment, which fill the pipeline again
Ends = Mapping[str, Sequence[Sequence[float]]]  # of each contestant's segments: its start and its steps' ends, seconds


def figures(config: Config, ended: Ends, ours: Sequence[Ours], out: Path, fixed: bool) -> dict[str, Any]:
    """The report, of SDFT and SFT (`ours`) and whoever else took turns; their records are in `out`."""
    sdft, sft = ours
    batch = {contestant.name: len(batch_keys(contestant.config, contestant.inputs.problems, 0)) for contestant in ours}
    batch |= {"sync": batch["sdft"], "trl": config.rollout.prompts_per_step}
    rates = {name: [_rate(ends, batch[name]) for ends in segments[1:-1]] for name, segments in ended.items()}
    used = {"sdft": devices(sdft.config), "sft": devices(sft.config), "sync": devices(sdft.config), "trl": 1}
    cost = {name: [used[name] / r for r in found] for name, found in rates.items()}
    metrics = {method: read_metrics(out / method, "train") for method in ("sdft", "sft")}
    completion = statistics.median(m["completion_tokens_mean"] for m in metrics["sdft"])
    warm = {method: _warm(metrics[method], ended[method]) for method in metrics}
    busy = {method: _busy(warm[method], ended[method]) for method in warm}
    tokens = {each.name: _tokens(warm[each.name], each.inputs.problems) for each in ours}
    shares, step_s = time_shares(busy["sdft"], config), _wall(ended["sdft"]) / len(warm["sdft"])
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
        "roles": _roles(ended, ours, batch, busy, completion, decode_batch["planned"]),
    }
    for peer in rates.keys() & {"sync", "trl"}:
        report[f"sdft_over_{peer}_speed"] = summary([a / b for a, b in zip(rates["sdft"], rates[peer], strict=True)])
    return report


def _roles(
    ended: Ends,
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
        segments = ended[method]
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
    """What has become more than 10% worse than in `baseline`, or None. Raises UserError where `baseline` is of another
    measurement."""
    measure, name = ("batch_s", f"{report['role']} seconds") if "role" in report else ("sdft_over_sft", "SDFT / SFT")
    if report.get("role") != baseline.get("role") or measure not in baseline:
        raise UserError("--baseline: is not of the same kind of measurement")
    before, now = (r[measure]["median"] for r in (baseline, report))
    if now > 1.1 * before:
        return f"{name} was {before:.3g} and is {now:.3g}"
    return None
