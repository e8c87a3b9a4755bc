"""Real actors that several tests share: learner processes that can be set up anew, and engines.

A learner process takes most of its start for imports, so the tests keep two of them and build each
new group inside.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from helpers import Allocations, config_of
from processes import PATIENCE_S

from actors.pool import Pool
from actors.rollout import Generator
from actors.teacher import Teacher
from learner.checkpoint import Shards
from learner.group import LearnerGroup
from learner.push import manifest
from learner.worker import LearnerRank
from learner.zero import add_gradients_directly, deepspeed_config, step_and_norm
from sdft_dist.cluster import stream
from sdft_dist.config import Config
from sdft_dist.export import checkpoint_model
from sdft_dist.loop import demonstrations
from sdft_dist.placement import environment
from sdft_dist.problems import ProblemSet
from sdft_dist.remote import Events
from sdft_dist.types import Problem, SampleKey, Span, TrainItem, WeightManifest
from sdft_dist.wire import pack

EVENTS = Events()
_retired: list[Any] = []  # engines replaced in a process: the end of one would end vLLM's groups for all


class ReusableRank(LearnerRank):
    """A learner process whose rank, configuration and data can be set anew."""

    def __init__(self) -> None:
        pass

    def reset(self, *args: Any) -> None:
        LearnerRank.__init__(self, *args)

    def keep_gradients(self) -> None:
        """Keep the full gradients of the next optimizer step, before clipping and averaging moments."""
        from deepspeed.utils import safe_get_full_grad

        step = self.engine.step

        def step_and_keep() -> None:
            self._kept = {name: safe_get_full_grad(p).float().cpu().numpy() for name, p in self._named.items()}
            step()

        self.engine.step = step_and_keep

    def damaged_plan(self, how: str) -> WeightManifest:
        """What a push of some messages consists of; "dropped" leaves a weight out."""
        shapes = {
            name: shape for name, shape in self._shapes.items() if how != "dropped" or name != "model.norm.weight"
        }
        return manifest(9, shapes, torch.float32, bucket_bytes=1 << 12)

    def send_damaged(self, how: str, plan: WeightManifest) -> None:
        """Send it to the generators; "altered" flips a bit on the way, "interrupted" goes after two messages."""
        sender = self._senders["generators"]
        for bucket in plan.buckets[: 2 if how == "interrupted" else None]:
            message = pack(bucket, self._source("generators")(list(bucket.names)), sender._transport.device)
            if how == "altered":
                message[5] ^= 1
            sender._sending.append(sender._thread.submit(sender._transport.send, message))
            if how == "altered":
                break  # the receiver gives up here
        sender.flush()
        if how == "interrupted":
            sender.close()

    def poison(self, on: bool) -> None:
        """Make losses and gradients NaN on this rank from now on, or sound again."""
        if not on:
            del self.student.forward
            return
        forward = self.student.forward

        def poisoned(batch: Any) -> Any:
            losses = forward(batch)
            return losses._replace(total=losses.total * float("nan"))

        self.student.forward = poisoned

    def teacher_head(self) -> np.ndarray:
        """The output head that a push to the teachers would send, fp32."""
        name = self.head_name()
        return self._source("teachers")([name])[name].float().numpy()

    def measure_step(self) -> None:
        """Note how many bytes the next optimizer step allocates at most, its gradients aside."""
        step = self.engine.step

        def step_and_measure() -> None:
            with Allocations() as found:
                step()
            self._step_bytes = found.peak

        self.engine.step = step_and_measure

    def step_bytes(self) -> tuple[int, int, int]:
        """What was noted, and the numbers of parameters, of all and of the largest tensor."""
        sizes = [math.prod(shape) for shape in self._shapes.values()]
        return self._step_bytes, sum(sizes), max(sizes)

    def norm_of_sum(self, gradients: list[float], directly: bool) -> float:
        """The gradient norm that DeepSpeed finds in a step of a model of one weight, whose micro-batches have these
        gradients."""
        import deepspeed

        model = torch.nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config=deepspeed_config(self.config)
        )
        if directly:
            add_gradients_directly(engine)
        for i, gradient in enumerate(gradients):
            engine.set_gradient_accumulation_boundary(i == len(gradients) - 1)
            engine.backward(engine(torch.tensor([gradient], dtype=torch.bfloat16)).sum())
        return step_and_norm(engine)

    def weights_after(self, steps: int, directly: bool) -> tuple[list[np.ndarray], list[float], bool]:
        """Of a small bf16 model with a bias, a weight that is used twice and one that is not used, trained by `steps`
        steps of three micro-batches: the weights, the gradient norms, and whether gradients were added directly."""
        import deepspeed

        torch.manual_seed(0)
        model = torch.nn.ModuleDict({"used": torch.nn.Linear(24, 24), "unused": torch.nn.Linear(5, 3)}).bfloat16()
        engine, *_ = deepspeed.initialize(
            model=model, model_parameters=list(model.parameters()), config=deepspeed_config(self.config)
        )
        if directly:
            add_gradients_directly(engine)
        model.forward = lambda x: model["used"](model["used"](x).tanh()).float().square().sum()
        norms = []
        for _ in range(steps):
            for i in range(3):
                engine.set_gradient_accumulation_boundary(i == 2)
                engine.backward(engine(torch.randn(7, 24, dtype=torch.bfloat16)))
            norms.append(step_and_norm(engine))
        weights = [p.detach().float().numpy() for p in model.parameters()]
        return weights, norms, "process_gradients" in vars(engine.optimizer)

    def kept_gradients(self) -> dict[str, np.ndarray]:
        """fp32, in the parameters' shapes."""
        return self._kept


class ReusableTeacher(Teacher):
    """A teacher that also reads sequences of the test's own."""

    def read(self, sequences: Sequence[np.ndarray], starts: Sequence[int]) -> list[np.ndarray]:
        return self.engine.states(sequences, starts, [""] * len(sequences))

    def computed(self, sequences: Sequence[np.ndarray], salts: Sequence[str]) -> list[int]:
        """Of each sequence the tokens that were not there already."""
        return [len(states) for states in self.engine._read([s[:-1] for s in sequences], salts, reuse=True)]

    def configure(self, config: Config) -> None:
        """Serve another loss with the same engine."""
        self.config = config

    def load(self, config: Config, problems: Any) -> None:
        """Serve another model in the same process."""
        _retired.append(self.engine)
        Teacher.__init__(self, config, "cpu", 102, problems)


class ReusableGenerator(Generator):
    """A generator whose loss can be changed."""

    def configure(self, config: Config) -> None:
        self.config = config

    def load(self, config: Config, problems: Any) -> None:
        """Serve another model in the same process."""
        _retired.append(self.engine)
        Generator.__init__(self, config, "cpu", [98], problems)


def cpu_options(sharing: int) -> dict[str, Any]:
    """Ray options of an actor that shares the cores with others; not 0 CPUs, which may go to any node."""
    return {"num_cpus": 0.01, "runtime_env": {"env_vars": environment(sharing)}}


def config_for(folder: Path, /, **sections: Any) -> Config:
    """A small run on the model in `folder`; sections are merged over the defaults."""
    tree: dict[str, Any] = {
        "model": {"path": str(folder), "max_length": 64},
        "data": {"train": "unused"},
        "rollout": {"max_completion_tokens": 12, "prompts_per_step": 8},
        "optim": {"learning_rate": 1e-2, "schedule": "constant", "warmup_steps": 0},
        "learner": {"tokens_per_microbatch": 128},
        "cluster": {"timeout_s": PATIENCE_S, "device": "cpu"},
    }
    return config_of(tree, **sections)


def random_problems(count: int) -> ProblemSet:
    """Problems of random token ids and unequal lengths."""
    rng = np.random.default_rng(0)

    def draw(low: int, high: int) -> np.ndarray:
        return rng.integers(1, 90, rng.integers(low, high)).astype(np.int32)

    return ProblemSet(
        Problem(prompt_ids=draw(3, 12), teacher_prompt_ids=draw(12, 30), demonstration_ids=draw(2, 10))
        for _ in range(count)
    )


def demonstration_items(problems: ProblemSet, step: int = 0) -> list[TrainItem]:
    """Every demonstration once."""
    return demonstrations(problems, [SampleKey(step, i, 0) for i in range(len(problems))])


class Ranks:
    """Learner processes to build groups from: one that works alone and a pair.

    DeepSpeed numbers modules and parameters by process-wide counters that all ranks of a group must
    agree on, so a process that has worked alone cannot join one that has not.
    """

    def __init__(self) -> None:
        threads = (1, 2, 2)
        self.actors = [ray.remote(ReusableRank).options(**cpu_options(n)).remote() for n in threads]

    def group(
        self,
        config: Config,
        problems: ProblemSet,
        *,
        pools: Sequence[Pool] = (),
        vocab_size: int = 102,
        resume: Path | None = None,
    ) -> LearnerGroup:
        """A started group of `config.learner.ranks` ranks, 1 or 2, which `pools` have joined for pushes."""
        n = config.learner.ranks
        table, actors = ray.put(problems), self.actors[:1] if n == 1 else self.actors[1:]
        ray.get([a.reset.remote(config, r, n, "cpu", vocab_size, table) for r, a in enumerate(actors)])
        group = LearnerGroup(config, actors, EVENTS, ignore)
        group.start(resume)
        for pool in pools:
            group.open_push(pool)
        return group

    def stop(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


def ignore(role: str, index: int, span: Span) -> None:
    """For whoever does not want to know what actors do."""


def rollouts(config: Config, problems: ProblemSet, generators: Pool, teachers: Pool, step: int) -> list[TrainItem]:
    """One scored sample of every problem."""
    keys, path = (
        [SampleKey(step, i, 0) for i in range(len(problems))],
        stream(config, generators, teachers, EVENTS, ignore),
    )
    path.submit(keys)
    return path.take(keys)


def engine_pools(config: Config, problems: ProblemSet) -> tuple[Pool, Pool]:
    """One generator and one teacher, ready."""
    table = ray.put(problems)
    make = lambda cls, *args: ray.remote(cls).options(**cpu_options(1)).remote(config, "cpu", *args)  # noqa: E731
    timeout_s, cluster = config.cluster.timeout_s, config.cluster
    generator, teacher = make(ReusableGenerator, [98], table), make(ReusableTeacher, 102, table)
    generators = Pool("generators", [generator], timeout_s, EVENTS, workers=cluster.generator_tensor_parallel)
    teachers = Pool("teachers", [teacher], timeout_s, EVENTS, workers=cluster.teacher_tensor_parallel)
    generators.wait_ready()
    teachers.wait_ready()
    return generators, teachers


def greedy(lm: Any, prompt: np.ndarray, count: int) -> list[int]:
    """What the model says, by Hugging Face."""
    ids = torch.tensor([prompt.tolist()])
    out = lm.generate(ids, max_new_tokens=count, do_sample=False, eos_token_id=98, pad_token_id=97)
    return out[0, len(prompt) :].tolist()


def assert_states(lm: Any, teachers: Pool, problems: ProblemSet) -> None:
    """The teacher's states of all demonstrations are the model's, to 1e-5."""
    sequences = [np.concatenate([p.teacher_prompt_ids, p.demonstration_ids]) for p in problems]
    starts = [len(p.teacher_prompt_ids) for p in problems]
    read = ray.get(teachers.actors[0].read.remote(sequences, starts))
    for tokens, start, states in zip(sequences, starts, read, strict=True):
        with torch.no_grad():
            expected = lm.model(torch.tensor([tokens.tolist()])).last_hidden_state[0, start - 1 : -1]
        assert states.shape == expected.shape
        assert np.abs(states - expected.numpy()).max() < 1e-5


def shapes_of(group: LearnerGroup) -> dict[str, tuple[int, ...]]:
    """Of all weights, by name."""
    buckets = ray.get(group.ranks[0].manifest.remote(0, True)).buckets
    return {name: shape for b in buckets for name, shape in zip(b.names, b.shapes, strict=True)}


def save(group: LearnerGroup, folder: Path) -> None:
    """Write a checkpoint's shards and wait for them."""
    folder.mkdir(parents=True, exist_ok=True)
    group.start_saving(folder)
    group.finish_saving(wait=True)


def exported(folder: Path, group: LearnerGroup, config: Config, kind: str = "master") -> Any:
    """The Hugging Face model in eval mode with the weights that the learner's checkpoint holds."""
    save(group, folder)
    with torch.no_grad():
        return checkpoint_model(config, Shards(folder), kind).eval()
