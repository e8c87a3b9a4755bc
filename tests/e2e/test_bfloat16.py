"""All roles in bfloat16, as on GPUs, by the CPU's kernels: they hold the same weights, and differ by rounding alone.

How much that is, is measured: Hugging Face's model in bfloat16 against the same weights computed in float32.
"""

import copy

import numpy as np
import pytest
import ray
import torch
from harness import config_for, exported, rollouts
from helpers import tiny_model

from sdft_dist.pieces import fetch
from sdft_dist.wire import weight_sums

WITHIN = 1.5  # times the rounding of Hugging Face's model


def computed(lm, prompt, completion):
    """The final states and the log-probabilities of all ids, float32, at the positions before the completion's."""
    ids = torch.tensor([np.concatenate([prompt, completion]).tolist()])
    with torch.no_grad():
        states = lm.model(ids).last_hidden_state[0, len(prompt) - 1 : -1]
        return states.float(), lm.lm_head(states).float().log_softmax(-1)


def apart(ours, exact):
    """By how much each state differs, of its length."""
    return ((ours - exact).norm(dim=-1) / exact.norm(dim=-1)).tolist()


@pytest.mark.parametrize(("tied", "stage"), [(True, 1), (True, 2), (False, 3)])
def test_roles_differ_by_rounding_alone(hosts, ranks, problems, tmp_path, tied, stage):
    generators, teachers = hosts
    folder = tiny_model(tmp_path / "model", tied=tied)
    config = config_for(
        folder,
        model={"dtype": "bfloat16"},
        learner={"zero_stage": stage, "ranks": 2},
        teacher={"kind": "ema", "ema_rate": 0.3},
    )
    ray.get([pool.actors[0].load.remote(config, ray.put(problems)) for pool in hosts])
    group = ranks.group(config, problems, pools=hosts)
    for step in range(3):
        for pool in hosts:
            group.push(pool, step, step)
        items = rollouts(config, problems, generators, teachers, step)
        if step == 2:
            student, average = exported(tmp_path / "s", group, config), exported(tmp_path / "a", group, config, "ema")
        metrics = group.update(step, 4, items)
    group.stop()

    assert student.dtype == average.dtype == torch.bfloat16
    actors = (generators.actors[0], teachers.actors[0])
    sums = ray.get([actor.__ray_call__.remote(lambda actor: actor.engine.weight_sums()) for actor in actors])
    assert sums == [weight_sums(student.parameters()), weight_sums(average.model.parameters())]
    assert sums[0] != sums[1]

    student32, average32 = copy.deepcopy(student).float(), copy.deepcopy(average).float()
    rounding, generator, rounding_of_states, teacher, losses = [], [], [], [], []
    for item, sample in zip(items, fetch([item.sample for item in items]), strict=True):
        problem, completion = problems[sample.key.problem], sample.completion_ids
        labels = torch.tensor(completion.tolist())[:, None]
        (_, half), (_, exact) = (computed(lm, problem.prompt_ids, completion) for lm in (student, student32))
        chosen = exact.gather(-1, labels)[:, 0]
        rounding += (half.gather(-1, labels)[:, 0] - chosen).abs().tolist()
        generator += (torch.tensor(sample.logprobs) - chosen).abs().tolist()
        (states, _), (exact_states, logq) = (
            computed(lm, problem.teacher_prompt_ids, completion) for lm in (average, average32)
        )
        read = torch.tensor(fetch([item.targets])[0].states).view(torch.bfloat16).float()
        rounding_of_states += apart(states, exact_states)
        teacher += apart(read, exact_states)
        losses.append((logq.exp() * (logq - exact)).sum(-1).mean())
    for what, found in {
        "log-probs, rounding": rounding,
        "log-probs, generator": generator,
        "states, rounding": rounding_of_states,
        "states, teacher": teacher,
    }.items():
        print(f"{what}: mean {np.mean(found):.4f}, max {max(found):.4f}")
    to_learner = metrics["logprob_difference_mean"]
    print(f"generator to learner: mean {to_learner:.4f}, max {metrics['logprob_difference_max']:.4f}")
    print(f"loss {metrics['loss']:.4f}, exact {np.mean(losses):.4f}")
    assert np.mean(generator) < WITHIN * np.mean(rounding)
    assert to_learner < WITHIN * np.mean(rounding)
    assert np.mean(teacher) < WITHIN * np.mean(rounding_of_states)
    assert metrics["loss"] == pytest.approx(float(np.mean(losses)), rel=0.01)
