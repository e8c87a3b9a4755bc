"""The learner over ZeRO stages and ranks: the average, the gradient, and the checkpoint."""

import numpy as np
import pytest
import ray
import torch
from harness import config_for, demonstration_items, save, shapes_of
from helpers import assert_relative, tiny_model
from safetensors.torch import load_file

from learner.checkpoint import Shards
from learner.model import Student, load_causal_lm
from learner.worker import LearnerRank, objective
from sdft_dist.batching import pack
from sdft_dist.logits import LogitTransform
from sdft_dist.pieces import bound, sample_refs, split, train_items
from sdft_dist.planning import memory as plan_memory
from sdft_dist.types import Sample, SampleKey, TeacherTargets, VersionSpan


@pytest.mark.parametrize(
    ("stage", "num_ranks", "dtype"),
    [(2, 2, "float32"), (3, 2, "float32"), (0, 1, "float32"), (1, 1, "bfloat16"), (3, 2, "bfloat16")],
)
def test_the_average_is_a_float64_reference_after_50_steps(ranks, problems, model, tmp_path, stage, num_ranks, dtype):
    """Of the fp32 master weights, whatever the type of those that compute."""
    rate = 0.01
    config = config_for(
        model,
        method="sft",
        model={"dtype": dtype},
        learner={"zero_stage": stage, "ranks": num_ranks},
        teacher={"kind": "ema", "ema_rate": rate},
        optim={"learning_rate": 1e-3},
    )
    group = ranks.group(config, problems)
    shapes = shapes_of(group)

    def read(kind):
        save(group, tmp_path)
        shards = Shards(tmp_path)
        return {name: shards.full(kind, name, shape).double() for name, shape in shapes.items()}

    reference = read("master")
    start = {name: t.clone() for name, t in reference.items()}
    for step in range(50):
        group.update(step, 50, demonstration_items(problems, step))
        for name, student in read("master").items():
            reference[name] += rate * (student - reference[name])
    averages = read("ema")
    group.stop()
    for name, average in averages.items():
        assert_relative(average, reference[name], 1e-6)
    assert max((averages[n] - start[n]).abs().max() for n in start) > 1e-3, "it must have moved"


def scored_items(problems):
    """A random completion of every problem, with what a teacher might believe of its tokens."""
    rng, samples, targets = np.random.default_rng(1), [], []
    for i in range(len(problems)):
        ids = rng.integers(1, 90, rng.integers(2, 10)).astype(np.int32)
        logprobs = rng.uniform(-5, -0.1, len(ids)).astype(np.float32)
        key, tail = SampleKey(0, i, 0), np.log1p(-np.exp(logprobs))
        versions = (VersionSpan(0, 0, len(ids)),)
        samples.append(
            Sample(key=key, completion_ids=ids, logprobs=logprobs, finish_reason="stop", policy_versions=versions)
        )
        targets.append(
            TeacherTargets(
                key=key, teacher_version=0, dtype="float32", ids=ids[:, None], logprobs=logprobs[:, None], tail=tail
            )
        )
    refs = bound(sample_refs(samples, problems), [ray.put(samples)])
    places, lists = split(targets, 1)
    return bound(train_items(refs, places, 0), list(map(ray.put, lists)))


def gradients(ranks, problems, model, num_ranks, stage, budget, normalisation="sequences", **learner):
    config = config_for(
        model,
        model={"max_length": min(budget, 64)},
        learner={"zero_stage": stage, "ranks": num_ranks, "tokens_per_microbatch": budget, **learner},
        loss={"support": "sampled", "skip_first_tokens": 2, "normalisation": normalisation},
        optim={"learning_rate": 1.0, "grad_clip": 1e9},
    )
    group = ranks.group(config, problems)
    for rank in group.ranks:
        rank.keep_gradients.remote()
    items = scored_items(problems)
    metrics = group.update(0, 1, items)
    assert metrics["trained_tokens"] == sum(max(0, item.num_completion_tokens - 2) for item in items)
    found = ray.get([rank.kept_gradients.remote() for rank in group.ranks])[0]
    group.stop()
    return metrics, found


@pytest.fixture(scope="module")
def alone(ranks, problems, model):
    """One rank, one micro-batch, no ZeRO."""
    return gradients(ranks, problems, model, 1, 0, 4096)


@pytest.mark.parametrize(
    ("num_ranks", "stage", "budget"),
    [(1, 0, 64), (1, 1, 64), (1, 2, 64), (1, 3, 64), (2, 0, 64), (2, 1, 64), (2, 2, 64), (2, 3, 64), (2, 2, 4096)],
)
def test_the_gradient_does_not_depend_on_ranks_stage_or_packing(
    ranks, problems, model, alone, num_ranks, stage, budget
):
    agree(gradients(ranks, problems, model, num_ranks, stage, budget), alone)


@pytest.mark.parametrize(("num_ranks", "stage"), [(1, 1), (2, 3)])
def test_the_gradient_is_that_of_sequences_each_in_a_micro_batch_of_its_own(
    ranks, problems, model, alone, num_ranks, stage
):
    lengths = [item.num_tokens for item in scored_items(problems)]
    plan = pack(lengths, num_ranks=num_ranks, budget=max(lengths))
    assert {len(micro_batch) for mine in plan for micro_batch in mine} == {1}
    agree(gradients(ranks, problems, model, num_ranks, stage, max(lengths)), alone)


def test_a_mean_over_tokens_has_a_gradient_that_does_not_depend_on_ranks_or_packing(ranks, problems, model, alone):
    metrics, gradient = gradients(ranks, problems, model, 1, 0, 4096, "tokens")
    assert metrics["loss"] == pytest.approx(metrics["divergence_per_token"], rel=1e-6)
    assert metrics["loss"] != pytest.approx(alone[0]["loss"], rel=1e-2), "else this would show nothing"
    for num_ranks, stage, budget in ((1, 1, 64), (2, 2, 64), (2, 3, 16)):
        agree(gradients(ranks, problems, model, num_ranks, stage, budget, "tokens"), (metrics, gradient))


@pytest.mark.parametrize(
    ("stage", "how"),
    [
        (2, {"gradient_checkpointing": "full"}),
        (3, {"gradient_checkpointing": "full"}),
        (2, {"gradient_checkpointing": "selective"}),
        (3, {"gradient_checkpointing": "selective"}),
        (2, {"compile": True}),
        (2, {"compile": True, "gradient_checkpointing": "selective"}),
    ],
)
def test_the_gradient_does_not_depend_on_what_is_recomputed_or_compiled(ranks, problems, model, alone, stage, how):
    agree(gradients(ranks, problems, model, 1, stage, 64, **how), alone)


def agree(one, other):
    """Loss, norm and gradient, to 1e-5 of the largest."""
    (metrics, found), (reference, expected) = one, other
    assert metrics["loss"] == pytest.approx(reference["loss"], rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-5)
    scale = max(np.abs(g).max() for g in expected.values())
    assert scale > 1e-4
    for name, gradient in found.items():
        assert np.abs(gradient - expected[name]).max() <= 1e-5 * scale, name


@pytest.mark.parametrize("method", ["sft", "dft"])
def test_a_demonstration_is_imitated_from_its_first_token_on(ranks, problems, model, method):
    """Whatever the recipe skips of what the student samples; also where the demonstration is no longer than that."""
    losses = []
    for skip in (0, 3):
        group = ranks.group(config_for(model, method=method, loss={"skip_first_tokens": skip}), problems)
        metrics = group.update(0, 1, demonstration_items(problems))
        group.stop()
        assert metrics["trained_tokens"] == sum(len(p.demonstration_ids) for p in problems)
        losses.append(metrics["loss"])
    assert losses[0] == losses[1]


def test_a_checkpoint_of_two_ranks_is_that_of_one(ranks, problems, model, tmp_path):
    """Master weights after one step, put together from shards, are the same for 1 and 2 ranks."""
    full = []
    for num_ranks, stage in ((1, 0), (2, 3)):
        config = config_for(model, method="sft", learner={"zero_stage": stage, "ranks": num_ranks})
        group = ranks.group(config, problems)
        shapes = shapes_of(group)
        group.update(0, 1, demonstration_items(problems))
        folder = tmp_path / str(num_ranks)
        save(group, folder)
        group.stop()
        shards = Shards(folder)
        full.append([{n: shards.full(kind, n, s) for n, s in shapes.items()} for kind in ("master", "exp_avg")])
    (master, moment), (other_master, other_moment) = full
    for name in master:
        assert_relative(other_moment[name], moment[name], 1e-5)
        # Adam's first step divides by the gradient's own size, which magnifies rounding.
        assert_relative(other_master[name], master[name], 1e-3)


@pytest.mark.parametrize(
    ("num_ranks", "stage", "dtype"),
    [*((*how, "float32") for how in [(1, 0), (1, 1), (2, 2), (2, 3)]), (2, 2, "bfloat16"), (2, 3, "bfloat16")],
)
@pytest.mark.fault("NaN in loss or gradient", "on one rank, ZeRO 0-3", "left out on all ranks, state unchanged")
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(
    ranks, problems, model, tmp_path, num_ranks, stage, dtype
):
    config = config_for(model, method="sft", model={"dtype": dtype}, learner={"zero_stage": stage, "ranks": num_ranks})
    group = ranks.group(config, problems)
    group.update(0, 3, demonstration_items(problems))
    save(group, tmp_path / "before")
    ray.get(group.ranks[-1].poison.remote(True))
    metrics = group.update(1, 3, demonstration_items(problems))
    assert not np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    save(group, tmp_path / "after")
    ray.get(group.ranks[-1].poison.remote(False))
    metrics = group.update(2, 3, demonstration_items(problems))
    group.stop()
    assert np.isfinite([metrics["loss"], metrics["grad_norm"]]).all()
    for rank in range(num_ranks):
        before, after = (load_file(tmp_path / name / f"rank-{rank:03d}.safetensors") for name in ("before", "after"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("stage", "num_ranks"), [(1, 1), (2, 2), (3, 2)])
def test_an_optimizer_in_host_memory_makes_the_same_updates(ranks, problems, model, tmp_path, stage, num_ranks):
    """On CPU both are host memory: this holds the paths, fragments and checkpoints; not what a GPU saves."""
    states = {}
    for offload in ("none", "optimizer"):
        config = config_for(
            model,
            method="sft",
            learner={"zero_stage": stage, "ranks": num_ranks, "offload": offload},
            teacher={"kind": "ema", "ema_rate": 0.3},
        )
        group = ranks.group(config, problems)
        losses = [group.update(step, 3, demonstration_items(problems, step))["loss"] for step in range(3)]
        save(group, tmp_path / offload)
        group.stop()
        found = {k: t for f in sorted((tmp_path / offload).iterdir()) for k, t in load_file(f).items()}
        states[offload] = losses, found
    losses, found = states["optimizer"]
    assert losses == pytest.approx(states["none"][0], rel=1e-5)
    assert found.keys() == states["none"][1].keys()
    for key, tensor in states["none"][1].items():
        if not key.startswith("rng"):
            assert_relative(found[key], tensor, 1e-4)


@pytest.mark.parametrize(("stage", "directly"), [(2, True), (2, False), (3, False)])
def test_small_gradients_of_bf16_weights_are_not_lost_beside_a_large_one(ranks, problems, model, stage, directly):
    """64 micro-batches, of which each adds 2^-9 of what the first does: in bf16 their sum would be the first."""
    config = config_for(model, method="sft", model={"dtype": "bfloat16"}, learner={"zero_stage": stage})
    group = ranks.group(config, problems)
    norm = ray.get(group.ranks[0].norm_of_sum.remote([1.0] + 64 * [2.0**-9], directly))
    group.stop()
    assert norm == pytest.approx(1 + 64 * 2.0**-9, rel=1e-6)


def test_gradients_that_are_added_directly_make_the_same_updates(ranks, problems, model):
    """On one rank, at the one stage where DeepSpeed would add them in fp32 to a sum of all."""
    config = config_for(model, method="sft", model={"dtype": "bfloat16"}, learner={"zero_stage": 2})
    group = ranks.group(config, problems)
    ours, theirs = (ray.get(group.ranks[0].weights_after.remote(4, directly)) for directly in (True, False))
    group.stop()
    assert (ours[2], theirs[2]) == (True, False)
    assert ours[1] == theirs[1]
    assert all(norm > 0 for norm in ours[1])
    for own, other in zip(ours[0], theirs[0], strict=True):
        assert np.array_equal(own, other)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_step_needs_what_the_plan_counts(ranks, problems, tmp_path, stage):
    """Beside the gradients, after a step in which moments are made: at ZeRO-1 bf16 ones, flattened and in fp32; at 2
    the largest tensor in float64; at 3 fp32 ones, flattened."""
    folder = tiny_model(tmp_path, hidden_size=256, intermediate_size=1024)
    group = ranks.group(
        config_for(folder, method="sft", model={"dtype": "bfloat16"}, learner={"zero_stage": stage}), problems
    )
    group.update(0, 3, demonstration_items(problems))
    ray.get(group.ranks[0].measure_step.remote())
    group.update(1, 3, demonstration_items(problems, 1))
    found, parameters, largest = ray.get(group.ranks[0].step_bytes.remote())
    group.stop()
    print(f"ZeRO-{stage}: {found / parameters:.2f} bytes a parameter, {found / largest:.2f} of the largest tensor")
    assert found == pytest.approx(plan_memory.step_bytes(stage, parameters, largest), rel=0.1)


@pytest.mark.parametrize(("support", "kept"), [("full", [2, 3]), ("topk", []), ("sampled", [])])
def test_heads_of_teachers_are_kept_only_where_teachers_send_states(model, support, kept):
    config = config_for(model, loss={"support": support}, teacher={"kind": "live"})
    rank = LearnerRank(config, 0, 1, "cpu", 102, [])
    rank.student = Student(load_causal_lm(config.model), 102, objective(config, LogitTransform()))
    rank._named, rank._frozen, rank.ema, rank._moved = dict(rank.student.named_weights()), {}, None, False
    rank._shapes = {name: tuple(p.shape) for name, p in rank._named.items()}
    for version in range(4):
        rank.push("teachers", version, True, version - 1)
        rank.push("generators", version, True, version - 1)
    assert sorted(rank._teacher_heads) == kept
