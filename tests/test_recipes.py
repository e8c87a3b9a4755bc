"""The presets hold, field by field, what their sources publish."""

from pathlib import Path

import pytest

from sdft_dist.config import load_config

RECIPES = Path(__file__).parent.parent / "deploy" / "recipes"
PUBLISHED = {
    "paper": {
        "loss.support": "full", "loss.divergence": "forward_kl", "loss.skip_first_tokens": 3,
        "loss.normalisation": "sequences", "loss.importance": "sequence", "loss.importance_clip": 2.0,
        "teacher.kind": "ema", "teacher.ema_rate": 0.01, "teacher.sync_every": 1,
        "rollout.temperature": 1.0, "rollout.completions_per_prompt": 1, "rollout.max_completion_tokens": 1024,
        "data.max_prompt_tokens": 1024, "optim.schedule": "cosine", "optim.warmup_steps": 10,
        "optim.weight_decay": 0.0, "optim.grad_clip": 1.0,
    },
    "trl": {
        "loss.support": "topk", "loss.top_k": 100, "loss.topk_from": "student", "loss.divergence": "jsd",
        "loss.beta": 0.5, "loss.skip_first_tokens": 0, "loss.normalisation": "sequences", "loss.importance": "none",
        "teacher.kind": "base", "rollout.temperature": 1.0, "rollout.completions_per_prompt": 8,
        "rollout.max_completion_tokens": 256, "data.max_prompt_tokens": 512,
    },
    "tinker": {
        "loss.support": "topk", "loss.top_k": 20, "loss.topk_from": "teacher", "loss.divergence": "forward_kl",
        "loss.skip_first_tokens": 3, "loss.importance": "none", "teacher.kind": "base", "rollout.temperature": 1.0,
        "rollout.completions_per_prompt": 1, "rollout.max_completion_tokens": 2048, "optim.learning_rate": 2e-5,
        "rollout.prompts_per_step": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_presets(name):
    tree = load_config(RECIPES / f"{name}.yaml").model_dump()
    for field, expected in PUBLISHED[name].items():
        section, leaf = field.split(".")
        assert tree[section][leaf] == expected, field


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_recipe_loads(path):
    assert load_config(path).model.path
