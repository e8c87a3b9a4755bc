"""Targets that travelled from a remote teacher give the loss of a local two-model computation."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from harness import config_for, exported, rollouts

from sdft_dist.pieces import fetch
from sdft_dist.preflight import logprob_differences

RATE = 0.3


def config(model, **sections):
    base = {"teacher": {"kind": "ema", "ema_rate": RATE}, "rollout": {"temperature": 0.8, "max_completion_tokens": 12}}
    return config_for(model, **(base | sections))


def local_log_probs(lm, prompt, completion):
    """[C, V] at temperature 0.8, float64."""
    ids = torch.tensor([np.concatenate([prompt, completion]).tolist()])
    with torch.no_grad():
        logits = lm(ids).logits[0, len(prompt) - 1 : -1].double()
    return (logits / 0.8).log_softmax(-1)


def expected_loss(problems, student, teacher, samples, per_token):
    """Mean over each sequence's tokens, then over sequences."""
    means = []
    for s in samples:
        problem = problems[s.key.problem]
        logp = local_log_probs(student, problem.prompt_ids, s.completion_ids)
        logq = local_log_probs(teacher, problem.teacher_prompt_ids, s.completion_ids)
        means.append(per_token(logp, logq, torch.tensor(s.completion_ids.tolist())).mean())
    return float(torch.stack(means).mean())


def forward_kl(logp, logq, labels):
    return (logq.exp() * (logq - logp)).sum(-1)


def sampled(config, problems, served, step):
    items = rollouts(config, problems, served.generators, served.teachers, step)
    return items, fetch([item.sample for item in items])


def test_full_support_after_0_1_and_10_updates_of_the_average(served, ranks, problems, tmp_path):
    generators, teachers = served.generators, served.teachers
    c = config(served.model, learner={"zero_stage": 3, "ranks": 2})
    served.configure(c)
    group = ranks.group(c, problems, pools=(generators, teachers))
    done = 0
    for until in (0, 1, 10):
        while done < until - 1:
            group.push(generators, done, done)
            group.push(teachers, done, done)
            items, _ = sampled(c, problems, served, done)
            group.update(done, 20, items)
            done += 1
        group.push(generators, done, done)
        group.push(teachers, done, done)
        items, samples = sampled(c, problems, served, done)
        student = exported(tmp_path / f"s{until}", group, c)
        teacher = exported(tmp_path / f"t{until}", group, c, "ema")
        assert {item.teacher_version for item in items} == {done}
        metrics = group.update(done, 20, items)
        done += 1
        assert metrics["loss"] == pytest.approx(
            expected_loss(problems, student, teacher, samples, forward_kl), rel=1e-5
        )
    group.stop()


def tail_kl(ids_of):
    """Forward KL over chosen ids and the rest."""

    def per_token(logp, logq, labels):
        ids = ids_of(logp, logq, labels)
        p, q = (
            torch.cat([d.exp().gather(-1, ids), 1 - d.exp().gather(-1, ids).sum(-1, keepdim=True)], -1)
            for d in (logp, logq)
        )
        return (q * (q / p).log()).sum(-1)

    return per_token


CASES = {
    "topk of the teacher": ({"support": "topk", "top_k": 5}, tail_kl(lambda p, q, y: q.topk(5).indices)),
    "topk of the student": (
        {"support": "topk", "top_k": 5, "topk_from": "student"},
        tail_kl(lambda p, q, y: p.topk(5).indices),
    ),
    "sampled": ({"support": "sampled"}, tail_kl(lambda p, q, y: y[:, None])),
    "score function": (
        {"support": "sampled", "tail": False, "divergence": "reverse_kl"},
        lambda p, q, y: (p - q).gather(-1, y[:, None])[:, 0],
    ),
    "importance": ({"importance": "token"}, forward_kl),  # on-policy: all weights are 1
}


def test_chosen_ids_are_scored_remotely(served, ranks, problems, tmp_path):
    generators, teachers = served.generators, served.teachers
    for name, (loss, per_token) in CASES.items():
        c = config(served.model, loss=loss)
        served.configure(c)
        group = ranks.group(c, problems, pools=(generators, teachers))
        for version in range(2):
            group.push(generators, version, version)
            group.push(teachers, version, version)
            items, samples = sampled(c, problems, served, version)
            student = exported(tmp_path / f"{name}-s{version}", group, c)
            teacher = exported(tmp_path / f"{name}-t{version}", group, c, "ema")
            found = group.update(version, 2, items)["loss"]
            assert found == pytest.approx(
                expected_loss(problems, student, teacher, samples, per_token), rel=2e-5, abs=1e-7
            ), name
        group.stop()


def test_what_is_sampled_from_the_teachers_prompt_is_trained_under_the_students(served, ranks, problems, tmp_path):
    generators, teachers = served.generators, served.teachers
    c = config(served.model, rollout={"temperature": 0.8, "max_completion_tokens": 12, "from_teacher": True})
    served.configure(c)
    group = ranks.group(c, problems, pools=(generators, teachers))
    for pool in (generators, teachers):
        group.push(pool, 0, 0)
    items, samples = sampled(c, problems, served, 0)
    student, teacher = exported(tmp_path / "s", group, c), exported(tmp_path / "t", group, c, "ema")
    difference = logprob_differences(SimpleNamespace(generators=generators, learner=group), problems, c)
    loss = group.update(0, 2, items)["loss"]
    group.stop()
    assert loss == pytest.approx(expected_loss(problems, student, teacher, samples, forward_kl), rel=1e-5)
    for s in samples:
        problem, labels = problems[s.key.problem], torch.tensor(s.completion_ids.tolist())[:, None]
        shown, plain = (
            local_log_probs(student, ids, s.completion_ids).gather(-1, labels)[:, 0].numpy()
            for ids in (problem.teacher_prompt_ids, problem.prompt_ids)
        )
        assert np.abs(s.logprobs - shown).max() < 1e-5
        assert np.abs(s.logprobs - plain).max() > 1e-2, "else this would show nothing"
    assert difference.max() < 1e-5, "the preflight compares under the prompt that is sampled from"
