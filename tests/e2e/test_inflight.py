"""New weights between two decoding steps: requests under way go on, and know which weights sampled what."""

import numpy as np
import pytest
import ray
from harness import config_for, rollouts

from sdft_dist.pieces import fetch
from sdft_dist.types import SampleKey


def test_a_push_of_the_same_weights_changes_no_token_and_is_on_record(served, ranks, problems):
    """Stronger than an equal distribution: with each request's own seed the very tokens are equal."""
    generators = served.generators
    config = config_for(served.model, method="sft", rollout={"temperature": 1.0, "max_completion_tokens": 12})
    served.configure(config)
    group = ranks.group(config, problems)
    group.open_push(generators)
    group.push(generators, 1, 1)
    (actor,) = generators.actors
    keys = [SampleKey(0, i, copy) for i in range(len(problems)) for copy in range(4)]
    whole = {s.key: s for s in fetch([r.sample for r in ray.get(actor.rollout.remote(keys, None)).samples])}

    refs = ray.get(actor.rollout.remote(keys, 0.0)).samples
    version = 1
    while len(refs) < len(keys):
        version += 1
        group.push(generators, version, version)
        refs += ray.get(actor.rollout.remote([], 0.0)).samples
    group.stop()
    cut = {s.key: s for s in fetch([r.sample for r in refs])}
    assert cut.keys() == whole.keys()
    for key, sample in cut.items():
        assert sample.completion_ids.tolist() == whole[key].completion_ids.tolist()
        assert np.abs(sample.logprobs - whole[key].logprobs).max() < 1e-5
        spans = sample.policy_versions
        assert [s.start for s in spans[1:]] == [s.end for s in spans[:-1]]
        assert (spans[0].start, spans[-1].end) == (0, len(sample.completion_ids))
        assert len(spans) == len(sample.completion_ids), "one push for each decoding step"


def test_targets_of_two_teacher_versions_in_one_step(served, ranks, problems):
    """Each state meets the head of the teacher that made it: the loss is that of separate computations."""
    teacher = {"kind": "ema", "ema_rate": 0.5}
    config = config_for(served.model, teacher=teacher, rollout={"max_staleness": 2, "max_completion_tokens": 12})
    served.configure(config)
    kept = []

    def loss_of_the_second_step(select):
        """The first step is always the same; the second is on `select(items of version 0, of version 1)`."""
        group = ranks.group(config, problems)
        for pool in (served.generators, served.teachers):
            group.open_push(pool)
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
