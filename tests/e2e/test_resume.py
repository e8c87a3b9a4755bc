"""A learner that goes on from a checkpoint is, bit by bit, the one that never stopped."""

import pytest
import ray
import torch
from harness import config_for, demonstration_items, save, shapes_of
from helpers import assert_relative, tiny_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from learner.checkpoint import Shards


def config(model, stage, num_ranks, dtype="float32"):
    return config_for(
        model,
        method="sft",
        model={"dtype": dtype},
        learner={"zero_stage": stage, "ranks": num_ranks, "tokens_per_microbatch": 64},
        teacher={"kind": "ema", "ema_rate": 0.1},
        optim={"learning_rate": 1e-3, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.1},
    )


def steps(group, problems, first, last):
    return [group.update(step, 6, demonstration_items(problems, step))["loss"] for step in range(first, last)]


@pytest.fixture(scope="module")
def saved(ranks, problems, model, tmp_path_factory):
    """For a stage, a number of ranks and a type of weights: the folder of a checkpoint after 3 steps, the losses of
    3 more, and the folder of the state after those."""
    made = {}

    def make(stage, num_ranks, dtype="float32"):
        how = stage, num_ranks, dtype
        if how not in made:
            middle, end = (tmp_path_factory.mktemp("checkpoint") for _ in range(2))
            group = ranks.group(config(model, *how), problems)
            steps(group, problems, 0, 3)
            save(group, middle)
            losses = steps(group, problems, 3, 6)
            save(group, end)
            group.stop()
            made[how] = middle, losses, end
        return made[how]

    return make


@pytest.mark.parametrize(
    ("stage", "num_ranks", "dtype"),
    [
        *((*how, "float32") for how in [(0, 1), (1, 1), (2, 1), (3, 1), (0, 2), (2, 2), (3, 2)]),
        *((*how, "bfloat16") for how in [(1, 1), (2, 2), (3, 2)]),
    ],
)
def test_resumed_is_bit_equal_to_uninterrupted(ranks, problems, model, saved, tmp_path, stage, num_ranks, dtype):
    """Weights, both moments, the average, the count of updates, and random state."""
    middle, losses, end = saved(stage, num_ranks, dtype)
    group = ranks.group(config(model, stage, num_ranks, dtype), problems, resume=middle)
    save(group, tmp_path / "again")
    assert steps(group, problems, 3, 6) == losses
    save(group, tmp_path / "end")
    group.stop()
    for rank in range(num_ranks):
        name = f"rank-{rank:03d}.safetensors"
        for found, expected in ((tmp_path / "again", middle), (tmp_path / "end", end)):
            one, other = load_file(found / name), load_file(expected / name)
            assert one.keys() == other.keys()
            assert {key.split("|")[0] for key in one} == {"master", "exp_avg", "exp_avg_sq", "ema", "rng"}
            for key, tensor in one.items():
                assert torch.equal(tensor, other[key]), key


@pytest.mark.parametrize(("before", "after"), [((3, 2), (2, 1)), ((0, 1), (3, 2))])
@pytest.mark.fault("another number of ranks", "2 to 1, 1 to 2, other ZeRO stages", "goes on from the same state")
def test_another_stage_and_number_of_ranks_goes_on_from_the_same_state(
    ranks, problems, model, saved, tmp_path, before, after
):
    middle, losses, _ = saved(*before)
    group = ranks.group(config(model, *after), problems, resume=middle)
    shapes = shapes_of(group)
    save(group, tmp_path)
    one, other = Shards(middle), Shards(tmp_path)
    for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
        assert all(torch.equal(one.full(kind, *of), other.full(kind, *of)) for of in shapes.items()), kind
    again = steps(group, problems, 3, 6)
    group.stop()
    assert again == pytest.approx(losses, rel=1e-4)


def averages(folder, kind="ema"):
    shards = Shards(folder)
    return {name: shards.read(kind, name, 0, size) for name, size in shards.sizes(kind).items()}


def test_an_anchored_average_is_kept_by_its_run_and_by_a_fork_that_does_not_name_another(
    ranks, problems, model, tmp_path
):
    """A fork that names another anchor starts its average there, once."""
    anchors = {name: tiny_model(tmp_path / name, seed=seed) for seed, name in ((1, "a"), (2, "b"))}

    def anchored(name, run):
        teacher = {"reanchor": False, "anchor": str(anchors[name])}
        return config(model, 2, 1).changed(run_dir=str(tmp_path / run), teacher=teacher)

    def saved_by(settings, folder, *, resume=None, done=0):
        group = ranks.group(settings, problems, resume=resume)
        save(group, folder / "start")
        steps(group, problems, done, done + 2)
        save(group, folder / "end")
        group.stop()
        return averages(folder / "start"), averages(folder / "end")

    def equal(one, other):
        return all(torch.equal(tensor, other[name]) for name, tensor in one.items())

    first, second = tmp_path / "one" / "checkpoints", tmp_path / "two" / "checkpoints"
    start, end = saved_by(anchored("a", "one"), first)
    at_a, at_b = (
        {name: p.detach().flatten() for name, p in AutoModelForCausalLM.from_pretrained(path).named_parameters()}
        for path in anchors.values()
    )
    assert equal(start, at_a)
    assert not equal(end, at_a)
    for same in (anchored("a", "one"), anchored("a", "two"), anchored("b", "one")):
        again, _ = saved_by(same, tmp_path / "again", resume=first / "end", done=2)
        assert equal(again, end), "its own run's and an unchanged fork's goes on, also where the anchor was moved"
    forked, end = saved_by(anchored("b", "two"), second, resume=first / "end", done=2)
    assert equal(forked, at_b)
    assert equal(averages(second / "start", "master"), averages(first / "end", "master"))
    again, _ = saved_by(anchored("b", "two"), tmp_path / "again", resume=second / "end", done=4)
    assert equal(again, end)


def test_a_frozen_teacher_stays_the_base_when_the_student_is_resumed(ranks, problems, model, saved, tmp_path):
    """Its weights come from model.path, not from the checkpoint's student."""
    middle, _, _ = saved(2, 1)
    frozen = config(model, 2, 1).changed(method="sdft", teacher={"kind": "base"})
    group = ranks.group(frozen, problems, resume=middle)
    (head,) = ray.get([group.ranks[0].teacher_head.remote()])
    group.stop()
    base = AutoModelForCausalLM.from_pretrained(model).get_output_embeddings().weight.detach()
    assert_relative(torch.tensor(head), base, 1e-7)
