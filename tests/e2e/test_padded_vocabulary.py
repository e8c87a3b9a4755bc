"""A head that has more rows than the tokenizer has ids: what is beyond is never sampled, and takes no probability."""

import numpy as np
import pytest
import ray
import torch
from harness import EVENTS, ReusableGenerator, config_for, cpu_options
from helpers import tiny_model

from actors.pool import Pool
from learner.model import load_causal_lm
from sdft_dist.errors import UserError

VOCABULARY, ROWS = 102, 128  # of the lab's tokenizer; of the head


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """A model whose padding is the likeliest by far."""
    folder = tiny_model(tmp_path_factory.mktemp("padded") / "model [1]", tied=False, vocab_size=ROWS)
    model = load_causal_lm(config_for(folder).model)
    with torch.no_grad():
        model.lm_head.weight[VOCABULARY:] *= 20
    model.save_pretrained(folder)
    return folder, model.eval()


def test_padding_is_never_sampled_and_takes_no_probability(ray_cluster, problems, padded):
    """Also where more ids are asked for than there are, and from a folder whose path reads as a pattern."""
    folder, model = padded
    config = config_for(folder, loss={"support": "topk", "topk_from": "student", "top_k": 200})
    started = ray.remote(ReusableGenerator).options(**cpu_options(1))
    actor = started.remote(config, "cpu", [98], ray.put(problems), VOCABULARY)
    Pool("generators", [actor], config.cluster.timeout_s, EVENTS).wait_ready()
    ray.get(actor.__ray_call__.remote(lambda generator: setattr(generator.engine, "version", 0)))
    samples = ray.get(actor.sample.remote(range(len(problems))))
    ray.kill(actor)
    for sample in samples:
        prompt = problems[sample.key.problem].prompt_ids
        ids = torch.tensor([np.concatenate([prompt, sample.completion_ids]).tolist()])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        assert (logits.argmax(-1) >= VOCABULARY).float().mean() > 0.5, "else this would show nothing"
        logp = logits[:, :VOCABULARY].log_softmax(-1)
        own = logp[torch.arange(len(logp)), sample.completion_ids.astype(np.int64)]
        assert np.abs(own.numpy() - sample.logprobs).max() < 1e-4
        assert sample.completion_ids.max() < VOCABULARY
        assert (np.sort(sample.top_ids) == np.arange(VOCABULARY)).all()


def test_what_vllm_refuses_is_the_users_error(ray_cluster, problems, padded):
    folder, _ = padded
    config = config_for(folder, model={"max_length": 4096}, learner={"tokens_per_microbatch": 4096})
    actor = ray.remote(ReusableGenerator).options(**cpu_options(1)).remote(config, "cpu", [98], ray.put(problems))
    pool = Pool("generators", [actor], config.cluster.timeout_s, EVENTS)
    with pytest.raises(
        UserError, match=r"vLLM refuses it with this configuration: User-specified max_model_len \(4096"
    ):
        pool.wait_ready()
    ray.kill(actor)
