"""Pictures for reports and benchmarks."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's, which colour-blind readers tell apart; black is for what all others are compared with.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#F0E442")
plt.rcParams["axes.prop_cycle"] = plt.cycler(color=COLOURS)
PERCENT = (-3, 103)  # ends of an axis of percentages


class Curve(NamedTuple):
    """Points to be joined; `low` and `high` are the ends of each point's interval, where there is one, and `marks` are
    places along x to be marked."""

    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    marks: Sequence[float] = ()


class Point(NamedTuple):
    """A run: where it began and ended, in percent."""

    start: tuple[float, float]
    end: tuple[float, float]


def curves(title: str, runs: Mapping[str, Curve], xlabel: str, ylabel: str, *, percent: bool = False) -> Any:
    """A line for each run."""
    figure, axis = plt.subplots(figsize=(4.6, 3.6), layout="constrained")
    for name, curve in runs.items():
        (line,) = axis.plot(curve.x, curve.y, label=name, linewidth=1.6, marker="." if len(curve.x) < 40 else "")
        if curve.low is not None and curve.high is not None:
            axis.fill_between(curve.x, curve.low, curve.high, color=line.get_color(), alpha=0.15, linewidth=0)
        for x in curve.marks:
            axis.axvline(x, color=line.get_color(), linewidth=0.8, linestyle=":")
    axis.set(title=title, xlabel=xlabel, ylabel=ylabel)
    axis.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axis.grid(alpha=0.3)
    if percent:
        axis.set_ylim(*PERCENT)
    if len(runs) > 1:
        figure.legend(loc="outside lower center", ncols=min(len(runs), 3), frameon=False)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a picture and forget it."""
    figure.savefig(path, dpi=110)
    plt.close(figure)


def sequences(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]],
    ends: Mapping[str, Sequence[int]],
    tasks: Sequence[str],
    ylabel: str,
) -> Any:
    """A panel for each method, in it a colour for each of `tasks`, black for what else there is, and a line for each
    seed. `ends` holds the steps at which its stages end, each of which taught one of `tasks`."""
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(8, 0.8 + 2 * len(panels)), sharey=True, squeeze=False, layout="constrained"
    )
    colours = dict(zip(tasks, itertools.cycle(COLOURS), strict=False))
    for axis, (method, sets) in zip(axes[:, 0], panels.items(), strict=True):
        for name, seeds in sets.items():
            for j, curve in enumerate(seed for seed in seeds if seed.x):
                style = {"color": colours.get(name, "black"), "alpha": 0.8, "linewidth": 1.4}
                axis.plot(curve.x, curve.y, label=None if j else name, **style)
        for end in ends[method][:-1]:
            axis.axvline(end, color="black", linewidth=0.8, linestyle=":")
        for start, end, task in zip([0, *ends[method]], ends[method], tasks, strict=False):
            axis.annotate(f"taught: {task}", ((start + end) / 2, 1.03), xycoords=("data", "axes fraction"), ha="center")
        axis.set(ylabel=ylabel, xlim=(0, ends[method][-1]))
        low, high = axis.get_ylim()
        axis.set_ylim(min(low, PERCENT[0]), max(high, PERCENT[1]))
        axis.set_title(method, loc="left", pad=16, fontweight="bold")
        axis.grid(alpha=0.3)
    axes[-1, 0].set_xlabel("optimizer steps")
    handles, names = axes[0, 0].get_legend_handles_labels()
    if names:
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
    return figure


def pareto(points: Mapping[str, Point], new: str) -> Any:
    """What was learned against what was kept: an arrow for each run, from its start to its end."""
    figure, axis = plt.subplots(figsize=(4.6, 3.6), layout="constrained")
    for (name, point), colour in zip(points.items(), itertools.cycle(COLOURS), strict=False):
        axis.annotate("", point.end, point.start, arrowprops={"arrowstyle": "->", "color": colour, "alpha": 0.5})
        axis.scatter(*point.end, color=colour, label=name, zorder=3)
    axis.set(title="from start to end", xlabel="other sets, mean accuracy, %", ylabel=f"{new}, accuracy, %")
    axis.set(xlim=PERCENT, ylim=PERCENT)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=min(len(points), 3), frameon=False)
    return figure


def front(
    points: Mapping[str, Sequence[tuple[float, float]]], best: Mapping[str, Sequence[tuple[float, float]]]
) -> Any:
    """Trials by method: retained against new, %, with a line along those of each method that no other one of it
    beats in both."""
    figure, axis = plt.subplots(figsize=(5.2, 4.4), layout="constrained")
    looks = zip(itertools.cycle(COLOURS), itertools.cycle("os^Dv"))
    for (name, own), (colour, marker) in zip(points.items(), looks, strict=False):
        style: dict[str, Any] = {"color": colour, "marker": marker, "markerfacecolor": "none", "markersize": 8}
        axis.plot(*zip(*own, strict=True), linestyle="", label=f"{name}, {len(own)} trials", **style)
        axis.plot(*zip(*sorted(best[name]), strict=True), color=colour, linestyle=":", zorder=1)
    axis.set(xlabel="other sets, mean accuracy, %", ylabel="what was taught, accuracy, %")
    axis.set(xlim=PERCENT, ylim=PERCENT)
    axis.grid(alpha=0.3)
    if points:
        figure.legend(loc="outside lower center", ncols=min(len(points), 3), frameon=False)
    return figure


def matrix(rows: Mapping[str, Sequence[float]], columns: Sequence[str]) -> Any:
    """Percentages as coloured cells with their numbers."""
    figure, axis = plt.subplots(figsize=(2 + 0.8 * len(columns), 0.9 + 0.45 * len(rows)), layout="constrained")
    axis.imshow(list(rows.values()), cmap="RdYlGn", vmin=0, vmax=100, aspect="auto", alpha=0.8)
    for i, values in enumerate(rows.values()):
        for j, value in enumerate(values):
            axis.text(j, i, f"{value:.1f}", ha="center", va="center", fontsize=9)
    axis.set_xticks(range(len(columns)), columns)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    return figure


def shares(runs: Mapping[str, Mapping[str, float]]) -> Any:
    """Horizontal bars: share of the wall clock in which each thing was done. They may overlap in time."""
    what = sorted({name for found in runs.values() for name in found})
    figure, axis = plt.subplots(
        figsize=(6.4, 0.9 + len(what) * max(0.4, 0.08 + 0.08 * len(runs))), layout="constrained"
    )
    height = 0.8 / len(runs)
    for i, (name, found) in enumerate(runs.items()):
        places = [row + i * height for row in range(len(what))]
        axis.barh(places, [100 * found.get(w, 0.0) for w in what], height=height, label=name)
    axis.set_yticks([row + 0.4 - height / 2 for row in range(len(what))], what)
    axis.invert_yaxis()
    axis.set(xlabel="% of the wall clock, over all actors")
    axis.grid(alpha=0.3, axis="x")
    if len(runs) > 1:
        axis.legend(frameon=False)
    return figure


def timeline(trace: Path, out: Path) -> None:
    """A picture of who works and who waits: the last two seconds of a trace before the rollouts end."""
    seconds = 2.0
    events = json.loads(trace.read_text())
    names = {e["pid"]: e["args"]["name"] for e in events if e.get("ph") == "M"}
    bars = [e for e in events if e.get("ph") == "X"]
    end = max(e["ts"] for e in bars if e["name"] == "decode")
    start = end - seconds * 1e6
    bars = [e for e in bars if start < e["ts"] + e["dur"] and e["ts"] < end]
    lanes = sorted({(names[e["pid"]], e["tid"]) for e in bars}, reverse=True)
    colours = dict(zip(sorted({e["name"] for e in bars}), itertools.cycle(COLOURS), strict=False))
    figure, axis = plt.subplots(figsize=(10, 1.2 + 0.5 * len(lanes)), layout="constrained")
    for e in bars:
        row = lanes.index((names[e["pid"]], e["tid"]))
        axis.barh(row, e["dur"] / 1e6, left=(e["ts"] - start) / 1e6, color=colours[e["name"]], height=0.7)
    axis.set_yticks(range(len(lanes)), [f"{name} {index}" for name, index in lanes])
    axis.set(xlabel="seconds", xlim=(0, seconds))
    patches = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    figure.legend(patches, colours, loc="outside upper center", ncols=len(colours), frameon=False)
    save(figure, out)
