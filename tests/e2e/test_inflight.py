"""New weights between two decoding steps: requests under way go on, and know which weights sampled what."""

import numpy as np
import pytest
import ray
from harness import EVENTS, ReusableGenerator, config_for, cpu_options, demonstration_items, rollouts

from actors.pool import Pool
from sdft_dist.types import SampleKey


class AheadGenerator(ReusableGenerator):
    """One whose engine begins a step before the last one is answered, as vLLM's engines do by default on CUDA."""

    def __init__(self, *args):
        from vllm.platforms.cpu import CpuPlatform

        check = CpuPlatform.check_and_update_config

        def ahead(vllm_config):
            check(vllm_config)
            vllm_config.scheduler_config.async_scheduling = True

        CpuPlatform.check_and_update_config = staticmethod(ahead)
        super().__init__(*args)

    def ahead(self):
        """Whether a step is under way whose answer has not been taken in."""
        return bool(self.engine._llm.llm_engine.engine_core.engine_core.batch_queue)


@pytest.fixture(scope="module")
def ahead(served, problems):
    config = config_for(served.model, loss={"top_k": 50})
    actor = ray.remote(AheadGenerator).options(**cpu_options(1)).remote(config, "cpu", [98], ray.put(problems))
    yield Pool("generators", [actor], config.cluster.timeout_s, EVENTS)
    ray.kill(actor)


@pytest.mark.parametrize("begins_ahead", [False, True])
def test_a_push_of_the_same_weights_changes_no_token_and_is_on_record(served, ranks, problems, begins_ahead, request):
    """Stronger than an equal distribution: with each request's own seed the very tokens are equal."""
    generators = request.getfixturevalue("ahead") if begins_ahead else served.generators
    config = config_for(served.model, method="sft", rollout={"temperature": 1.0, "max_completion_tokens": 12})
    served.configure(config)
    group = ranks.group(config, problems, pools=[generators])
    group.push(generators, 1, 1)
    (actor,) = generators.actors
    keys = [SampleKey(0, i, copy) for i in range(len(problems)) for copy in range(4)]
    whole = {s.key: s for s in ray.get(actor.rollout.remote(keys, None))[1]}

    samples = ray.get(actor.rollout.remote(keys, 0.0))[1]
    version = 1
    while len(samples) < len(keys):
        version += 1
        group.push(generators, version, version)
        samples += ray.get(actor.rollout.remote([], 0.0))[1]
    group.stop()
    cut = {s.key: s for s in samples}
    assert cut.keys() == whole.keys()
    for key, sample in cut.items():
        assert sample.completion_ids.tolist() == whole[key].completion_ids.tolist()
        assert np.abs(sample.logprobs - whole[key].logprobs).max() < 1e-5
        spans = sample.policy_versions
        assert [s.start for s in spans[1:]] == [s.end for s in spans[:-1]]
        assert (spans[0].start, spans[-1].end) == (0, len(sample.completion_ids))
        assert len(spans) == len(sample.completion_ids), "one push for each decoding step"


def test_a_step_begun_before_the_push_is_the_old_weights(served, ahead, ranks, problems):
    """Up to where its first span ends, a completion is that of the old weights to the last bit; then it is not."""
    config = config_for(served.model, method="sft", rollout={"temperature": 1.0, "max_completion_tokens": 12})
    group = ranks.group(config, problems, pools=[ahead])
    group.push(ahead, 0, 0, wait=True)
    (actor,) = ahead.actors
    ray.get(actor.configure.remote(config))
    keys = [SampleKey(0, i, copy) for i in range(len(problems)) for copy in range(4)]
    old = {s.key: s for s in ray.get(actor.rollout.remote(keys, None))[1]}
    samples = [s for part in range(4) for s in ray.get(actor.rollout.remote(keys if part == 0 else [], 0.0))[1]]
    assert ray.get(actor.ahead.remote())
    group.update(0, 3, demonstration_items(problems))
    group.push(ahead, 1, 1, wait=True)
    assert not ray.get(actor.ahead.remote())
    samples += ray.get(actor.rollout.remote([], None))[1]
    group.stop()
    both = [s for s in samples if len(s.policy_versions) == 2]
    assert both
    for sample in both:
        before, after = sample.policy_versions
        assert (before.version, before.end, after.version) == (0, 4, 1)
        assert sample.logprobs[:4].tolist() == old[sample.key].logprobs[:4].tolist()
        assert sample.logprobs[4] != old[sample.key].logprobs[4]


def test_targets_of_two_teacher_versions_in_one_step(served, ranks, problems):
    """Each state meets the head of the teacher that made it: the loss is that of separate computations."""
    teacher = {"kind": "ema", "ema_rate": 0.5}
    config = config_for(served.model, teacher=teacher, rollout={"max_staleness": 2, "max_completion_tokens": 12})
    served.configure(config)
    kept = []

    def loss_of_the_second_step(select):
        """The first step is always the same; the second is on `select(items of version 0, of version 1)`."""
        group = ranks.group(config, problems, pools=(served.generators, served.teachers))
        for version in range(2):
            group.push(served.generators, version, version)
            group.push(served.teachers, version, 0)
            if len(kept) == version:
                kept.append(rollouts(config, problems, served.generators, served.teachers, version))
            if version == 0:
                group.update(0, 4, kept[0])
        loss = group.update(1, 4, select(*kept))["loss"]
        group.stop()
        return loss

    first, second = (loss_of_the_second_step(lambda *parts, i=i: parts[i]) for i in range(2))
    mixed = loss_of_the_second_step(lambda *parts: [item for pair in zip(*parts, strict=True) for item in pair])
    assert [{item.teacher_version for item in part} for part in kept] == [{0}, {1}]
    assert first != second
    assert mixed == pytest.approx((first + second) / 2, rel=1e-5)
