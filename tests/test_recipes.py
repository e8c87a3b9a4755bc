"""The presets hold, field by field, what their sources publish."""

from pathlib import Path

import pytest

from sdft_dist.bench.synthetic import SHAPES
from sdft_dist.cli import main
from sdft_dist.errors import ConfigError
from sdft_dist.planning.dimensions import dimensions
from sdft_dist.planning.plan import GPUS, Lengths, own_plan
from sdft_dist.recipe import load_config

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


MODELS, SIZES = (sorted((RECIPES / folder).glob("*.yaml")) for folder in ("models", "sizes"))


@pytest.mark.parametrize("size", SIZES, ids=lambda p: p.stem)
@pytest.mark.parametrize("model", MODELS, ids=lambda p: p.stem)
def test_every_model_fits_every_size(model, size, capsys):
    """By the models' published configurations; 300/400/400 and 1000/600/600 tokens."""
    config = load_config(RECIPES / "paper.yaml", [str(model), str(size)])
    name = "h200" if "h200" in size.stem else "h100"
    for prompt, demonstration, completion in ((300, 400, 400), (1000, 600, 600)):
        lengths = Lengths(prompt=prompt, demonstration=demonstration, completion=completion)
        found = own_plan(config, dimensions(SHAPES[model.stem]), lengths, GPUS[name])
        assert found.fits
        assert found.gpus == int(size.stem.partition("x")[0])
        assert found.decode_batch >= 8
    for command in ("train", "sft"):
        assert main([command, str(RECIPES / "paper.yaml"), str(model), str(size), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"# learner ranks {config.learner.ranks} × 1" in shown or "learner ranks + generators" in shown
    assert f": {found.gpus} GPUs on cuda" in shown


@pytest.mark.parametrize("task", sorted((RECIPES / "tasks").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_task_loads(task):
    config = load_config(RECIPES / "paper.yaml", [str(task)])
    assert config.eval.every
    assert config.run_dir == f"runs/{task.stem}"


def test_a_later_file_replaces_fields_and_leaves_the_rest(tmp_path):
    layer = tmp_path / "mine.yaml"
    layer.write_text("teacher: {ema_rate: 0.02}\n")
    plain, layered = load_config(RECIPES / "paper.yaml"), load_config(RECIPES / "paper.yaml", [str(layer), "seed=3"])
    assert layered.teacher == plain.teacher.model_copy(update={"ema_rate": 0.02})
    assert (layered.loss, layered.seed) == (plain.loss, 3)
    with pytest.raises(ConfigError, match="no such file"):
        load_config(RECIPES / "paper.yaml", ["missing.yaml"])
