"""A teacher reads the prompt of several completions once, and its states are what they are without that."""

import numpy as np
import pytest
import ray
from harness import ReusableTeacher, config_for, cpu_options, exported
from helpers import tiny_model

from actors.pool import Pool
from sdft_dist.remote import Events

PROMPT, BLOCK = 300, 128  # tokens; vLLM's blocks on CPU, of which only whole ones are found again


@pytest.fixture(scope="module")
def teacher(ray_cluster, ranks, problems, tmp_path_factory):
    """An actor that serves a pushed model, and the model as Hugging Face's."""
    folder = tmp_path_factory.mktemp("prefix")
    model = tiny_model(folder, tied=False, max_position_embeddings=512)
    sections = {"model": {"max_length": 512}, "learner": {"tokens_per_microbatch": 512}}
    config = config_for(model, **sections, rollout={"completions_per_prompt": 4})
    actor = ray.remote(ReusableTeacher).options(**cpu_options(1)).remote(config, "cpu", 102, ray.put(problems))
    pool = Pool("teachers", [actor], config.cluster.timeout_s, Events())
    pool.wait_ready()
    group = ranks.group(config, problems, pools=[pool])
    group.push(pool, 0, 0, wait=True)
    yield actor, exported(folder / "exported", group, config)
    group.stop()
    ray.kill(actor)


def drawn(rng):
    """Three prompts with four completions each: two are equal, a third begins as they do."""
    sequences = []
    for _ in range(3):
        prompt, (first, last) = rng.integers(1, 90, PROMPT), rng.integers(1, 90, (2, BLOCK + 40))
        for completion in (first, first, np.concatenate([first[: BLOCK + 20], last[:20]]), last[:5]):
            sequences.append(np.concatenate([prompt, completion]).astype(np.int32))
    return sequences


def test_states_are_hugging_faces(teacher):
    import torch

    actor, model = teacher
    sequences = drawn(np.random.default_rng(0))
    read = ray.get(actor.read.remote(sequences, [PROMPT] * len(sequences)))
    for tokens, states in zip(sequences, read, strict=True):
        with torch.no_grad():
            expected = model.model(torch.tensor([tokens.tolist()])).last_hidden_state[0, PROMPT - 1 : -1]
        assert states.shape == expected.shape
        assert np.abs(states - expected.numpy()).max() < 1e-5


def test_a_prompt_is_read_once_in_a_step(teacher):
    actor, _ = teacher
    sequences = drawn(np.random.default_rng(1))
    computed = ray.get(actor.computed.remote(sequences, ["7"] * len(sequences)))
    whole = [len(tokens) - 1 for tokens in sequences]
    shared = PROMPT // BLOCK * BLOCK
    for i in range(0, len(sequences), 4):
        assert computed[i] == whole[i]
        assert computed[i + 3] == whole[i + 3] - shared
        assert max(computed[i + 1 : i + 3]) <= max(whole[i + 1 : i + 3]) - shared
    assert ray.get(actor.computed.remote(sequences[:1], ["8"])) == whole[:1], "of another step nothing is taken"
