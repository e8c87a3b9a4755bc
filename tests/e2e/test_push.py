"""After a push the engines hold exactly the learner's weights: tokens and states are Hugging Face's."""

import numpy as np
import pytest
import ray
import torch
from harness import assert_states, config_for, demonstration_items, exported, greedy

from sdft_dist.wire import weight_sums

NOT_SERVED = "noticed; the engine serves nothing before a whole push"


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_engines_equal_hugging_face_on_the_exported_weights(served, ranks, problems, stage, num_ranks, tmp_path):
    generators, teachers = served.generators, served.teachers
    config = config_for(
        served.model,
        method="sft",
        learner={"zero_stage": stage, "ranks": num_ranks},
        teacher={"kind": "ema", "ema_rate": 0.3},
    )
    group = ranks.group(config, problems, pools=(generators, teachers))
    for step in range(2):
        group.update(step, 2, demonstration_items(problems))
    group.push(generators, 2, 2)
    group.push(teachers, 2, 2)
    student, ema = exported(tmp_path / "s", group, config), exported(tmp_path / "e", group, config, "ema")
    group.stop()

    moved = (student.model.embed_tokens.weight - ema.model.embed_tokens.weight).abs().max()
    assert moved > 1e-3, "the student must differ from its average, or the test could not fail"
    prompts = [p.prompt_ids for p in problems]
    sampled = generators.complete(prompts, 12)
    assert [s.tolist() for s in sampled] == [greedy(student, p, 12) for p in prompts]
    assert_states(ema, teachers, problems)
    actors = (generators.actors[0], teachers.actors[0])
    sums = ray.get([actor.__ray_call__.remote(lambda actor: actor.engine.weight_sums()) for actor in actors])
    assert sums == [weight_sums(student.parameters()), weight_sums(ema.model.parameters())]
    assert sums[0] != sums[1]


def test_logprobs_are_those_of_the_sampling_distribution(served, ranks, problems, tmp_path):
    """At temperature 0.7 the generator's log-probs are log-softmax(logits / 0.7) of the learner."""
    generators = served.generators
    config = config_for(served.model, method="sft", rollout={"temperature": 0.7, "max_completion_tokens": 12})
    served.configure(config)
    group = ranks.group(config, problems, pools=[generators])
    group.push(generators, 5, 5)
    student = exported(tmp_path, group, config)
    group.stop()
    for sample in generators.sample(range(len(problems))):
        assert [(s.version, s.start) for s in sample.policy_versions] == [(5, 0)]
        prompt = problems[sample.key.problem].prompt_ids
        ids = torch.tensor([np.concatenate([prompt, sample.completion_ids]).tolist()])
        with torch.no_grad():
            logp = (student(ids).logits[0, len(prompt) - 1 : -1] / 0.7).log_softmax(-1)
        expected = logp[range(len(sample.completion_ids)), sample.completion_ids.tolist()]
        assert np.abs(sample.logprobs - expected.numpy()).max() < 1e-5


def test_an_engine_without_a_whole_push_serves_nothing(served, ranks, problems):
    """As after an interrupted push; the next whole one puts it back to work."""
    generators = served.generators
    ray.get(generators.actors[0].__ray_call__.remote(lambda actor: setattr(actor.engine, "version", None)))
    with pytest.raises(RuntimeError, match="a push must succeed before it serves"):
        generators.complete([problems[0].prompt_ids], 4)
    generators.replace_lost()
    group = ranks.group(config_for(served.model, method="sft"), problems, pools=[generators])
    group.push(generators, 1, 1)
    group.stop()
    assert len(generators.complete([problems[0].prompt_ids], 4)) == 1


@pytest.fixture(params=["gloo", "ipc"])
def transport(request, served):
    """How weights travel to the generators."""
    served.generators.transport = request.param
    yield request.param
    served.generators.transport = "gloo"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        pytest.param(
            "altered", "checksum of the bucket", marks=pytest.mark.fault("push altered", "a flipped bit", NOT_SERVED)
        ),
        pytest.param(
            "dropped", "were not in it", marks=pytest.mark.fault("weight left out of a push", "fake sender", NOT_SERVED)
        ),
        pytest.param(
            "interrupted",
            None,
            marks=pytest.mark.fault("push interrupted", "the sender goes after two messages", NOT_SERVED),
        ),
    ],
)
def test_a_damaged_push_is_noticed_and_the_next_whole_one_serves(served, ranks, problems, transport, how, says):
    generators, prompts = served.generators, [p.prompt_ids for p in problems]
    group = ranks.group(config_for(served.model, method="sft"), problems, pools=[generators])
    group.push(generators, 1, 1, wait=True)
    before = generators.complete(prompts, 8)
    plan = ray.get(group.ranks[0].damaged_plan.remote(how))
    receiving = generators.actors[0].receive.remote(plan)
    ray.get(group.ranks[0].send_damaged.remote(how, plan))
    with pytest.raises(RuntimeError, match=says):
        ray.get(receiving, timeout=60)
    with pytest.raises(RuntimeError, match="a push must succeed before it serves"):
        generators.complete(prompts, 8)
    generators.replace_lost()
    group.open_push(generators)
    group.push(generators, 2, 2, wait=True)
    group.stop()
    assert [c.tolist() for c in generators.complete(prompts, 8)] == [c.tolist() for c in before]
