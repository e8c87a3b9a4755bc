"""One step end to end for model families beyond Qwen, on tiny random models."""

import numpy as np
import pytest
import ray
import torch
import transformers
from harness import config_for, exported, rollouts

from learner.model import load_causal_lm
from sdft_dist.errors import UserError
from sdft_dist.lab.tokenizer import build_tokenizer
from sdft_dist.pieces import fetch

SIZES = {
    "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.1, "bos_token_id": None,
}  # fmt: skip
FAMILIES = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Gemma2": {"head_dim": 32, "final_logit_softcapping": 5.0, "sliding_window": 64},
    "Olmo2": {},
    "Phi3": {},
}


def save(family, folder):
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    ends = {
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = getattr(transformers, f"{family}Config")(**(SIZES | ends | FAMILIES[family]))
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_attention_that_leaves_out_the_models_cap_is_refused(tmp_path):
    config = config_for(save("Gemma2", tmp_path))
    with pytest.raises(UserError, match="caps attention logits, which sdpa cannot: use eager"):
        load_causal_lm(config.model)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_one_step(hosts, ranks, problems, tmp_path, family):
    generators, teachers = hosts
    attention = "eager" if family == "Gemma2" else "sdpa"
    folder = save(family, tmp_path / "model")
    config = config_for(
        folder,
        model={"attention": attention},
        learner={"zero_stage": 2, "ranks": 2},
    )
    ray.get([pool.actors[0].load.remote(config, ray.put(problems)) for pool in hosts])
    group = ranks.group(config, problems, pools=hosts)
    for pool in hosts:
        group.push(pool, 0, 0)
    items = rollouts(config, problems, generators, teachers, 0)
    student = exported(tmp_path / "before", group, config)
    first = group.update(0, 2, items)
    assert first["logprob_difference_max"] < 1e-4, "generator and learner agree"
    assert first["grad_norm"] > 0

    expected = []
    for sample in fetch([item.sample for item in items]):
        problem = problems[sample.key.problem]
        views = [
            torch.tensor([np.concatenate([p, sample.completion_ids]).tolist()])
            for p in (problem.prompt_ids, problem.teacher_prompt_ids)
        ]
        with torch.no_grad():
            rows = [student(v).logits[0, -len(sample.completion_ids) - 1 : -1].double().log_softmax(-1) for v in views]
        expected.append((rows[1].exp() * (rows[1] - rows[0])).sum(-1).mean())
    assert first["loss"] == pytest.approx(float(torch.stack(expected).mean()), rel=1e-4)
    assert group.update(1, 2, items)["loss"] < first["loss"]
    group.stop()
