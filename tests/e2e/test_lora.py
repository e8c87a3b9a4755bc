"""Adapters: trained, averaged, saved and pushed alone; engines add them to the weights that they hold."""

import pytest
import torch
from harness import assert_states, config_for, demonstration_items, exported, greedy, save
from peft import PeftModel
from processes import lab_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learner.checkpoint import Shards
from sdft_dist.errors import UserError
from sdft_dist.export import export_adapter
from sdft_dist.lab.base import shipped_base
from sdft_dist.planning.dimensions import read_dimensions
from sdft_dist.train import run


def lora_config(model, stage=2, ranks=1, **sections):
    return config_for(
        model,
        model={"lora": {"rank": 4, "alpha": 8}},
        method="sft",
        learner={"zero_stage": stage, "ranks": ranks},
        **({"teacher": {"kind": "ema", "ema_rate": 0.3}} | sections),
    )


def train_and_push(group, served, problems):
    """Two steps, pushed at the start, after one, and at the end. Returns what was pushed before each, MiB."""
    for pool in (served.generators, served.teachers):
        group.open_push(pool)
    pushed = []
    for step in range(3):
        for pool in (served.generators, served.teachers):
            group.push(pool, step, step, wait=True)
        if step < 2:
            pushed.append(group.update(step, 2, demonstration_items(problems))["pushed_mib"])
    return pushed


@pytest.mark.parametrize(("stage", "num_ranks"), [(0, 1), (2, 2), (3, 2)])
def test_engines_equal_hugging_face_on_the_merged_weights(served, ranks, problems, stage, num_ranks, tmp_path):
    config = lora_config(served.model, stage, num_ranks)
    group = ranks.group(config, problems)
    whole, adapters = train_and_push(group, served, problems)
    student, average = exported(tmp_path / "s", group, config), exported(tmp_path / "e", group, config, "ema")
    group.stop()

    base = AutoModelForCausalLM.from_pretrained(served.model).eval()
    assert torch.equal(base.model.embed_tokens.weight, student.model.embed_tokens.weight)
    prompts = [p.prompt_ids for p in problems]
    expected = [greedy(student, p, 12) for p in prompts]
    assert expected != [greedy(base, p, 12) for p in prompts], "the student must have moved, or the test could not fail"
    assert [s.tolist() for s in served.generators.complete(prompts, 12)] == expected
    query = student.model.layers[0].self_attn.q_proj.weight
    assert (query - average.model.layers[0].self_attn.q_proj.weight).abs().max() > 1e-4
    assert_states(average, served.teachers, problems)
    assert adapters < 0.5 * whole


def test_a_base_teacher_is_what_the_adapters_are_added_to(served, ranks, problems, tmp_path):
    config = lora_config(served.model, teacher={"kind": "base"})
    group = ranks.group(config, problems)
    train_and_push(group, served, problems)
    group.stop()
    assert_states(AutoModelForCausalLM.from_pretrained(served.model).eval(), served.teachers, problems)


def test_adapters_without_the_weights_that_they_belong_to_are_refused(served, ranks, problems):
    group = ranks.group(lora_config(served.model), problems, pools=[served.generators])
    group._whole.add("generators")
    with pytest.raises(Exception, match="never the weight itself"):
        group.push(served.generators, 0, 0, wait=True)
    group.stop()


@pytest.mark.parametrize(("stage", "num_ranks"), [(2, 2), (3, 2)])
def test_resumed_is_bit_equal_to_uninterrupted(served, ranks, problems, tmp_path, stage, num_ranks):
    config = lora_config(served.model, stage, num_ranks)

    def steps(group, first, last):
        return [group.update(step, 4, demonstration_items(problems, step))["loss"] for step in range(first, last)]

    group = ranks.group(config, problems)
    steps(group, 0, 2)
    save(group, tmp_path / "middle")
    losses = steps(group, 2, 4)
    save(group, tmp_path / "end")
    group.stop()
    kinds = Shards(tmp_path / "middle").sizes("master")
    assert kinds
    assert all(".lora_" in name for name in kinds)

    group = ranks.group(config, problems, resume=tmp_path / "middle")
    assert steps(group, 2, 4) == losses
    save(group, tmp_path / "again")
    group.stop()
    for file in sorted((tmp_path / "end").iterdir()):
        again = load_file(tmp_path / "again" / file.name)
        assert all(torch.equal(tensor, again[key]) for key, tensor in load_file(file).items())


def test_the_exported_adapter_loads_with_peft_and_equals_the_merged_model(ray_cluster, tmp_path):
    lora = {"path": str(shipped_base()), "max_length": 64, "lora": {"rank": 4}}
    config = lab_config(tmp_path, steps=3, method="sft", model=lora, optim={"learning_rate": 1e-2})
    rundir = run(config)
    merged = AutoModelForCausalLM.from_pretrained(rundir.path / "model").eval()
    base = AutoModelForCausalLM.from_pretrained(shipped_base())
    adapted = PeftModel.from_pretrained(base, rundir.path / "adapter").eval()
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        assert (merged(ids).logits - adapted(ids).logits).abs().max() < 1e-4
        with adapted.disable_adapter():
            assert (merged(ids).logits - adapted(ids).logits).abs().max() > 1e-3
    trained = Shards(rundir.checkpoint(None)).sizes("master")
    assert sum(trained.values()) == read_dimensions(config).adapters(4), "what the plan counts"
    with pytest.raises(UserError, match="already in use"):
        export_adapter(rundir, rundir.path / "adapter")
