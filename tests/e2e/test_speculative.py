"""Drafted tokens: the student's own distribution and log-probs, in fewer decoding steps."""

from collections import Counter

import numpy as np
import pytest
import ray
import torch
from harness import EVENTS, config_for, cpu_options
from helpers import tiny_model
from transformers import AutoModelForCausalLM

from actors.pool import Pool
from actors.rollout import Generator
from sdft_dist.problems import ProblemSet
from sdft_dist.types import Problem, SampleKey

COPIES, TOKENS, SLOTS, VOCAB, TEMPERATURE = 6000, 8, 1024, 12, 1.5


@pytest.fixture(scope="module", params=["ngram", "suffix"])
def sampled(ray_cluster, ranks, tmp_path_factory, request):
    """Model folder, prompt, samples of it, and the decoding steps until the first of them was done. With few
    tokens to choose from, many drafts are accepted and many rejected."""
    if request.param == "suffix":
        pytest.importorskip("arctic_inference.suffix_decoding", reason="needs the package arctic-inference")
    model = tiny_model(tmp_path_factory.mktemp("model"), vocab_size=VOCAB, eos_token_id=None, pad_token_id=0)
    # Repeats itself, so that there is something to draft from.
    prompt = np.array([1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2], dtype=np.int32)
    problems = ProblemSet([Problem(prompt_ids=prompt, teacher_prompt_ids=prompt, demonstration_ids=prompt)])
    config = config_for(
        model,
        method="sft",
        rollout={"speculative": request.param, "max_completion_tokens": TOKENS, "temperature": TEMPERATURE},
        cluster={"max_sequences": SLOTS},
    )
    actor = ray.remote(Generator).options(**cpu_options(1)).remote(config, "cpu", [], ray.put(problems))
    pool = Pool("generators", [actor], config.cluster.timeout_s, EVENTS)
    group = ranks.group(config, problems, vocab_size=VOCAB, pools=[pool])
    group.push(pool, 0, 0, wait=True)
    group.stop()
    samples = ray.get(actor.rollout.remote([SampleKey(0, 0, copy) for copy in range(COPIES)], 0.0))[1]
    steps = 1
    while not samples:
        samples += ray.get(actor.rollout.remote([], 0.0))[1]
        steps += 1
    samples += ray.get(actor.rollout.remote([], None))[1]
    ray.kill(actor)
    return model, prompt, samples, steps


def logprobs_after(model, prompt, continuations):
    """Exact log-probs of the next token after each continuation: float64 [N, V]."""
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    ids = torch.tensor([[*prompt.tolist(), *c] for c in continuations])
    with torch.no_grad():
        last = torch.cat([lm(part).logits[:, -1] for part in ids.split(512)])
    return torch.log_softmax(last.double() / TEMPERATURE, -1)


def test_the_distribution_is_the_models_own(sampled):
    """Chi-squared of the first three tokens against exact probabilities."""
    model, prompt, samples, _ = sampled
    seen = Counter(tuple(s.completion_ids[:3].tolist()) for s in samples)
    first = logprobs_after(model, prompt, [()])
    second = logprobs_after(model, prompt, [(a,) for a in range(VOCAB)])
    pairs = [(a, b) for a in range(VOCAB) for b in range(VOCAB)]
    third = logprobs_after(model, prompt, pairs)
    joint = (first.view(-1, 1, 1) + second.view(VOCAB, VOCAB, 1) + third.view(VOCAB, VOCAB, VOCAB)).exp()
    expected = {tuple(t.tolist()): COPIES * float(joint[tuple(t)]) for t in (COPIES * joint >= 5).nonzero()}
    statistic = sum((seen[t] - e) ** 2 / e for t, e in expected.items())
    rest, found = COPIES - sum(expected.values()), COPIES - sum(seen[t] for t in expected)
    statistic += (found - rest) ** 2 / rest
    assert len(expected) > 20
    p_value = float(torch.special.gammaincc(torch.tensor(len(expected) / 2).double(), torch.tensor(statistic / 2)))
    print(f"{len(expected)} categories, p = {p_value:.3f}")
    assert p_value > 1e-3


def test_log_probs_are_those_of_the_distribution_sampled_from(sampled):
    model, prompt, samples, _ = sampled
    for s in samples[:20]:
        ids = s.completion_ids.tolist()
        for i, token in enumerate(ids):
            exact = logprobs_after(model, prompt, [tuple(ids[:i])])[0, token]
            assert s.logprobs[i] == pytest.approx(float(exact), abs=1e-4)


def test_drafts_save_decoding_steps(sampled):
    _, _, samples, steps = sampled
    print(f"the first of {len(samples)} samples of {TOKENS} tokens was done after {steps} steps")
    assert {len(s.completion_ids) for s in samples} == {TOKENS}
    assert steps < TOKENS, "without drafts a step gives one token"
