"""What a run tells: metrics as JSON lines and TensorBoard events, timers, and a progress bar."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from sdft_dist.files import read_jsonl
from sdft_dist.trace import Trace
from sdft_dist.tracker import Tracker, untracked
from sdft_dist.types import Span, TrainItem
from sdft_dist.watch import Watch, item_metrics

LINE_S = 30.0  # between two lines of progress where no bar is seen
PACE_S = 3600.0  # of steps whose pace tells the time left; rich's own 30 s hold none where a step takes longer


class RunLog:
    """Writes `metrics.jsonl` and `events/` below `folder`, and a trace to the file `trace`. Use as a context
    manager. A record's `seconds` count from the start of its `attempt`; `on_step` hears the record of each optimizer
    step, and `on_samples` what it was taken on, and whether that made numbers that are not finite."""

    def __init__(
        self,
        folder: Path,
        *,
        title: str,
        console: Console | None = None,
        trace: Path | None = None,
        first_step: int = 1,
        attempt: int = 1,
        track: Tracker = untracked,
        on_step: Callable[[dict[str, Any]], None] = lambda record: None,
        on_samples: Callable[[int, Sequence[TrainItem], bool], None] = lambda step, items, bad: None,
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._metrics = (folder / "metrics.jsonl").open("a")
        self._events = SummaryWriter(str(folder / "events"), purge_step=first_step)
        self._started, self._attempt = time.monotonic(), attempt
        self._on_step, self._track = on_step, track
        self.samples = on_samples
        self._times: dict[str, float] = {}
        self._busy: dict[str, float] = {}
        self._request_s = 0.0  # seconds of decoding times requests
        self._trace = Trace(trace) if trace else None
        self._watch = Watch()
        self._title, self._next_line = title, -math.inf
        console = console or Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not console.is_terminal,
            speed_estimate_period=PACE_S,
        )
        self._task = self._progress.add_task(title, total=None, shown="starting")

    def __enter__(self) -> RunLog:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        self._metrics.close()
        self._events.close()
        if self._trace is not None:
            self._trace.close()

    @contextmanager
    def timer(self, name: str) -> Iterator[None]:
        """Adds the block's wall time to the current step's `time/NAME`, in seconds."""
        started = time.perf_counter()
        yield
        self._times[name] = self._times.get(name, 0.0) + time.perf_counter() - started

    def span(self, role: str, index: int, span: Span) -> None:
        """What an actor has done: adds to the current step's `busy/ROLE/WHAT`, in seconds over all actors, and to the
        mean of the requests that a generator decodes at a time."""
        name, seconds = f"{role}/{span.what}", span.end - span.start
        self._busy[name] = self._busy.get(name, 0.0) + seconds
        self._request_s += seconds * span.batch
        if self._trace is not None:
            self._trace.add(role, index, span)

    def say(self, text: str, *, now: bool = True) -> None:
        """What the run is doing now, in the progress bar; in a batch system's log as a line, of which those that come
        often (not `now`) are left out."""
        self._progress.update(self._task, shown=text)
        self._line(text, now)

    def _line(self, text: str, now: bool) -> None:
        clock = time.monotonic()
        if not self._progress.console.is_terminal and (now or clock >= self._next_line):
            self._next_line = clock + LINE_S
            told = f"{self._title}: {text}"
            self._progress.console.print(told, markup=False, highlight=False, soft_wrap=True)

    def step(self, step: int, num_steps: int, metrics: dict[str, Any], items: Sequence[TrainItem]) -> None:
        """Record one optimizer step."""
        record: dict[str, Any] = {
            **metrics,
            **item_metrics(step - 1, items),
            "samples": len(items),
            "samples_per_s": len(items) / max(1e-9, self._times.get("step", 0.0)),
            **{f"time/{name}": seconds for name, seconds in self._times.items()},
            **{f"busy/{name}": seconds for name, seconds in self._busy.items()},
        }
        if self._request_s:
            record["decode_batch_mean"] = self._request_s / self._busy["generator/decode"]
        self._times, self._busy, self._request_s = {}, {}, 0.0
        self.write("train", step, record)
        self._on_step({"step": step, **record})
        self.samples(step, items, record.get("skipped", 0) > 0)
        rate = record["samples_per_s"]
        taught = f"KL {metrics['divergence_per_token']:.4f} " if "staleness_mean" in record else ""  # by a teacher
        shown = f"loss {metrics['loss']:.4f} {taught}len {record['completion_tokens_mean']:.0f} {rate:.0f}/s"
        self._progress.update(self._task, completed=step, total=num_steps, shown=shown)
        left = self._progress.tasks[0].time_remaining
        shown += f", {timedelta(seconds=round(left))} left" if left else ""
        self._line(f"step {step} of {num_steps}: {shown}", step == num_steps)
        self.warn(step, self._watch.step(record))

    def evaluation(self, step: int, record: dict[str, Any]) -> None:
        """Record what was found on held-out rows."""
        self.write("eval", step, record)
        sets = [name.removesuffix("_interval") for name in record if name.endswith("_interval")]
        self.say(f"step {step}: " + ", ".join(f"{name} {record[name]:.1%}" for name in sets))
        self.warn(step, self._watch.evaluation(record))

    def warn(self, step: int, warnings: Sequence[str]) -> None:
        """Record what a person should look at, and print it."""
        for warning in warnings:
            self.write("warning", step, {"text": warning})
            self._progress.console.print(f"step {step}: warning: {warning}", markup=False, highlight=False)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the numbers among it to TensorBoard and the tracker."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        seconds = round(time.monotonic() - self._started, 3)
        place = {"kind": kind, "step": step, "attempt": self._attempt, "seconds": seconds}
        self._metrics.write(json.dumps(_strict({**place, **values}), allow_nan=False) + "\n")
        self._metrics.flush()
        # All numbers in one event: add_scalar costs a tenth of a millisecond for each.
        numbers = {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
        points = [Summary.Value(tag=f"{kind}/{name}", simple_value=value) for name, value in numbers.items()]
        self._events.file_writer.add_summary(Summary(value=points), step)
        self._track(kind, step, numbers)


def _strict(value: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON does not know."""
    if isinstance(value, dict):
        return {name: _strict(own) for name, own in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(own) for own in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(folder: Path, kind: str) -> list[dict[str, Any]]:
    """The records of one kind from a run's metrics.jsonl, in order; without a line that is still being written, and
    none of a run that has written nothing yet. Raises UserError where one is damaged."""
    return [record for record in read_jsonl(folder / "metrics.jsonl") if record["kind"] == kind]
