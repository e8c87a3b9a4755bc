"""A discrete-event simulation of the pipeline on any number of GPUs, with the times of plan.py.

What the arithmetic leaves out: completions of unequal length, waiting for the longest, the lag of the
samples behind the weights, pushes, and the driver's time per step. Generators decode in slices of tokens,
as they do in a run; every request of a generator advances by a slice in the time that its batch takes.
"""

from __future__ import annotations

import heapq
import random
import statistics
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

from sdft_dist.config import Config
from sdft_dist.planning.dimensions import Dimensions
from sdft_dist.planning.plan import INFERENCE_EFFICIENCY, ROLES, Gpu, Lengths, Prediction, token_seconds
from sdft_dist.topology import sizes

SLICE_TOKENS = 16
PUSH_EXPOSED_S = 0.1  # gathering and copying, during which the learner does not train
DRIVER_S = 0.005  # of the driver per step
SPREAD = 0.5  # standard deviation of a completion's length over its mean


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """What the simulated run came to."""

    step_s: float  # over its second half
    idle_share: dict[str, float]  # over all of it, filling and emptying the pipeline counted in
    staleness_mean: float  # optimizer steps between the weights of a sample's first token and its use
    staleness_max: int
    decode_batch: float


@dataclass(kw_only=True, slots=True)
class _Generator:
    waiting: list[tuple[int, int]] = field(default_factory=list)  # (step, tokens)
    running: list[list[int]] = field(default_factory=list)  # [step, tokens left, version]
    busy: bool = False


class _Run:
    def __init__(self, config: Config, m: Dimensions, n: Lengths, gpu: Gpu, plan: Prediction, steps: int) -> None:
        self.config, self.m, self.n, self.gpu, self.plan, self.steps = config, m, n, gpu, plan, steps
        self.batch = config.rollout.prompts_per_step * config.rollout.completions_per_prompt
        self.rng = random.Random(0)
        self.now, self.order = 0.0, 0
        self.events: list[tuple[float, int, str, int]] = []
        # GPUs that an engine spans divide its work.
        self.spans = {role: size.gpus for role, size in sizes(config).items()}
        self.generators = [_Generator() for _ in range(plan.split["generator"] // self.spans["generator"])]
        self.teachers = [0.0] * (plan.split["teacher"] // self.spans["teacher"])  # when each is free
        self.scored = [0] * (steps + 1)
        self.version = self.submitted = 0
        self.training = False
        self.busy = dict.fromkeys(ROLES, 0.0)
        self.ends: list[float] = []
        self.lags: list[int] = []
        self.batches: list[int] = []
        self.born: dict[int, list[int]] = {}

    def at(self, delay: float, kind: str, which: int) -> None:
        self.order += 1
        heapq.heappush(self.events, (self.now + delay, self.order, kind, which))

    def submit(self) -> None:
        while self.submitted < min(self.steps, self.version + 1 + self.config.rollout.max_staleness):
            for i in range(self.batch):
                length = max(1, round(self.rng.gauss(self.n.completion, SPREAD * self.n.completion)))
                generator = self.generators[i % len(self.generators)]
                generator.waiting.append((self.submitted, length))
            self.submitted += 1
        for g in range(len(self.generators)):
            self.decode(g)

    def decode(self, g: int) -> None:
        generator, most = self.generators[g], self.plan.decode_limit
        if generator.busy:
            return
        new = 0
        while generator.waiting and len(generator.running) + 1 <= most:
            step, tokens = generator.waiting.pop(0)
            generator.running.append([step, tokens, self.version])
            new += 1
        if not generator.running:
            return
        size, prefill_s = len(generator.running), self.m.forward_flops(self.n.prompt) / self.gpu.product_flops
        prefill_s /= INFERENCE_EFFICIENCY * self.config.rollout.completions_per_prompt
        token_s = size * token_seconds(self.m, self.n, self.gpu, size, INFERENCE_EFFICIENCY)
        self.busy["generator"] += SLICE_TOKENS * token_s + new * prefill_s
        seconds = (SLICE_TOKENS * token_s + new * prefill_s) / self.spans["generator"]
        self.batches.append(size)
        generator.busy = True
        self.at(seconds, "decoded", g)

    def decoded(self, g: int) -> None:
        generator = self.generators[g]
        generator.busy = False
        for request in generator.running:
            request[1] -= SLICE_TOKENS
            if request[1] <= 0:
                self.score(request[0], request[2])
        generator.running = [request for request in generator.running if request[1] > 0]
        self.decode(g)

    def score(self, step: int, version: int) -> None:
        seconds = self.plan.seconds.teacher / self.spans["teacher"]
        t = self.teachers.index(min(self.teachers))
        self.teachers[t] = max(self.now, self.teachers[t]) + seconds
        self.busy["teacher"] += self.plan.seconds.teacher
        self.born.setdefault(step, []).append(version)
        self.at(self.teachers[t] - self.now, "scored", step)

    def scored_one(self, step: int) -> None:
        self.scored[step] += 1
        self.train()

    def train(self) -> None:
        if self.training or self.version >= self.steps or self.scored[self.version] < self.batch:
            return
        self.training = True
        self.lags += [self.version - born for born in self.born.pop(self.version)]
        seconds = self.batch * self.plan.seconds.learner / self.plan.split["learner"]
        self.busy["learner"] += seconds * self.plan.split["learner"]
        self.at(seconds + PUSH_EXPOSED_S + DRIVER_S, "trained", 0)

    def trained(self, _: int) -> None:
        self.training = False
        self.version += 1
        self.ends.append(self.now)
        self.submit()
        self.train()

    def run(self) -> Simulated:
        act = {"decoded": self.decoded, "scored": self.scored_one, "trained": self.trained}
        self.submit()
        while self.events and self.version < self.steps:
            self.now, _, kind, which = heapq.heappop(self.events)
            act[kind](which)
        half = len(self.ends) // 2
        return Simulated(
            step_s=(self.ends[-1] - self.ends[half]) / (len(self.ends) - 1 - half),
            idle_share={role: 1 - self.busy[role] / (self.now * self.plan.split[role]) for role in ROLES},
            staleness_mean=statistics.mean(self.lags),
            staleness_max=max(self.lags),
            decode_batch=statistics.mean(self.batches),
        )


def simulate(config: Config, m: Dimensions, n: Lengths, gpu: Gpu, plan: Prediction, *, steps: int = 20) -> Simulated:
    """`steps` optimizer steps on the split of `plan`, which needs 3 GPUs or more."""
    return _Run(config, m, n, gpu, plan, steps).run()


def show(plans: list[Prediction], outcomes: list[Simulated], console: Console) -> None:
    """One line for each number of GPUs."""
    table = Table(title=f"Simulated: pushes, who waits for whom, completions' lengths spread by {100 * SPREAD:.0f}%")
    for column in ("GPUs", "gen/tea/lea", "batch", "s/step", "SDFT/SFT", "idle, %", "staleness"):
        table.add_column(column, justify="right")
    for p, o in zip(plans, outcomes, strict=True):
        idle = "/".join(f"{100 * o.idle_share[role]:.0f}" for role in ROLES)
        ratio = p.ratio_with_waiting * o.step_s / p.step_s
        lag = f"{o.staleness_mean:.1f}, max {o.staleness_max}"
        split = "/".join(str(p.split[role]) for role in ROLES)
        table.add_row(str(p.gpus), split, f"{o.decode_batch:.0f}", f"{o.step_s:.2f}", f"{ratio:.2f}", idle, lag)
    console.print(table)
