"""The cost model against figures worked out by hand and by an independent table."""

import io
from dataclasses import replace

import pytest
from helpers import config_of
from rich.console import Console

from sdft_dist.bench.synthetic import SHAPES
from sdft_dist.errors import UserError
from sdft_dist.planning import simulate
from sdft_dist.planning.dimensions import dimensions
from sdft_dist.planning.plan import GPUS, Lengths, as_json, flops, own_plan, plan, seconds, show, token_seconds

QWEN4B = dimensions(SHAPES["qwen3-4b"])
SHORT, LONG = (Lengths(prompt=p, demonstration=d, completion=c) for p, d, c in ((300, 400, 400), (1000, 600, 600)))


def test_parameters_are_those_of_the_published_models():
    assert dimensions(SHAPES["qwen3-4b"]).total == pytest.approx(4.02e9, rel=0.005)
    assert dimensions(SHAPES["qwen3-8b"]).total == pytest.approx(8.19e9, rel=0.005)
    assert dimensions(SHAPES["qwen3-1.7b"]).total == pytest.approx(1.72e9, rel=0.005)
    assert dimensions(SHAPES["qwen3-0.6b"]).total == pytest.approx(0.596e9, rel=0.005)


@pytest.mark.parametrize(
    ("lengths", "efficiency", "decode_batch", "ratio"),
    [
        (SHORT, 1.0, 1e9, 1.66), (SHORT, 0.6, 1e9, 2.10), (SHORT, 0.6, 16, 4.0), (SHORT, 0.6, 32, 3.0),
        (SHORT, 0.6, 64, 2.4), (SHORT, 0.6, 128, 2.2),
        (LONG, 1.0, 1e9, 1.75), (LONG, 0.6, 1e9, 2.25), (LONG, 0.6, 16, 3.5), (LONG, 0.6, 32, 2.8),
        (LONG, 0.6, 64, 2.5), (LONG, 0.6, 128, 2.3),
    ],
)  # fmt: skip
def test_qwen3_4b_on_an_h200(lengths, efficiency, decode_batch, ratio):
    """A table that was worked out independently; its figures are rounded."""
    found = seconds(QWEN4B, lengths, GPUS["h200"], decode_batch=decode_batch, efficiency=efficiency).ratio
    assert found == pytest.approx(ratio, abs=0.06)


def test_operations_of_a_sample_by_hand():
    """Head alone: 2 for a product; forward and backward of it 6, and 2 more for the teacher's in the learner. The
    generator and the teacher read what they read once; the teacher applies no head."""
    found, n = flops(QWEN4B, SHORT), SHORT.prompt + SHORT.completion
    head = QWEN4B.head * SHORT.completion
    assert found["sft"] == 3 * QWEN4B.forward_flops(n) + 6 * head
    assert found["learner"] == 3 * QWEN4B.forward_flops(n) + 8 * head
    assert found["generator"] == QWEN4B.forward_flops(n) + 2 * head
    assert found["teacher"] == QWEN4B.forward_flops(n + SHORT.demonstration)


def test_decoding_is_bound_by_the_room_for_keys_and_values():
    settings = config_of(
        rollout={"max_staleness": 4, "prompts_per_step": 4096},
        learner={"gradient_checkpointing": "full"},
        cluster={"max_sequences": 100_000},
    )
    found = plan(settings, QWEN4B, SHORT, GPUS["h200"], 8)
    kv = found.memory_parts_gib["generator"]["kv"] * 2**30
    a_request = QWEN4B.kv_bytes * (SHORT.prompt + SHORT.completion)
    assert found.decode_batch == found.decode_limit == pytest.approx(kv / a_request)


def test_several_completions_of_a_prompt_share_its_prefill():
    one, eight = (seconds(QWEN4B, SHORT, GPUS["h200"], decode_batch=128, completions_per_prompt=n) for n in (1, 8))
    assert eight.generator < one.generator
    both, completion = (QWEN4B.forward_flops(n) for n in (SHORT.prompt + SHORT.demonstration, SHORT.completion))
    assert one.teacher - eight.teacher == pytest.approx(7 / 8 * both / (0.6 * GPUS["h200"].product_flops))
    assert eight.teacher * 0.6 * GPUS["h200"].product_flops > completion
    assert eight.learner == one.learner


def test_the_split_balances_the_roles_and_more_gpus_are_faster():
    fast = config_of(rollout={"max_staleness": 2, "prompts_per_step": 512}, learner={"gradient_checkpointing": "full"})
    plans = [plan(fast, QWEN4B, SHORT, GPUS["h200"], n) for n in (8, 16, 64)]
    assert all(p.fits for p in plans)
    assert [p.gpus for p in plans] == [sum(p.split.values()) for p in plans]
    assert plans[0].step_s > 1.5 * plans[1].step_s > 4 * plans[2].step_s
    assert plans[2].split["learner"] > plans[2].split["generator"] > 0
    assert max(plans[2].idle_share.values()) < 0.2


def test_what_does_not_fit_is_said():
    big = dimensions(SHAPES["qwen3-8b"])
    settings = config_of(learner={"gradient_checkpointing": "full"})
    assert not plan(settings, big, SHORT, GPUS["a100"], 1).fits
    offloaded = config_of(learner={"gradient_checkpointing": "full", "offload": "optimizer", "zero_stage": 1})
    assert not plan(settings, big, SHORT, GPUS["h100"], 2).fits
    assert plan(offloaded, big, SHORT, GPUS["h100"], 2).fits
    engines = config_of(cluster={"gpu_memory_utilization": 0.1})
    assert not plan(engines, big, SHORT, GPUS["h100"], 8).fits, "the weights do not fit into an engine's share"
    with pytest.raises(UserError, match="this is sft"):
        own_plan(config_of(method="sft"), big, SHORT, GPUS["h200"])


def test_a_teacher_that_takes_less_leaves_it_to_the_generators_keys_and_values():
    def shared(**cluster):
        together = {"colocate": "teachers", "max_sequences": 4096, **cluster}
        settings = config_of(cluster=together, learner={"gradient_checkpointing": "full"})
        return own_plan(settings, QWEN4B, SHORT, GPUS["h200"])

    alike, apart = shared(gpu_memory_utilization=0.4), shared(gpu_memory_utilization=0.6, teacher_memory=0.2)
    for role, more in (("generator", 0.2), ("teacher", -0.2)):
        gained = apart.memory_parts_gib[role]["kv"] - alike.memory_parts_gib[role]["kv"]
        assert gained == pytest.approx(more * GPUS["h200"].memory_gib)
    assert apart.decode_limit > alike.decode_limit
    assert (apart.fits, shared(teacher_memory=0.05).fits) == (True, False)


def test_the_table_is_explained_and_says_what_to_try_where_nothing_fits():
    big, settings = dimensions(SHAPES["qwen3-8b"]), config_of(learner={"gradient_checkpointing": "full"})
    found = {n: plan(settings, big, SHORT, GPUS["a100"], n) for n in (1, 16)}
    assert (found[1].fits, found[16].fits) == (False, True)
    for numbers, nothing in (([1], True), ([1, 16], False)):
        console = Console(file=io.StringIO(), width=80)
        show([found[n] for n in numbers], console)
        shown = " ".join(console.file.getvalue().split())
        assert "gen/tea/lea: GPUs of generators, teachers and learner. " in shown
        assert "GiB: memory on one GPU of each role" in shown
        assert "┃ gen/tea/lea ┃" in shown
        assert ("Nothing fits. Try learner.offload=optimizer, " in shown) == nothing
        assert " NO " in shown
        assert (" yes " in shown) != nothing
        assert ("On 16 GPUs most of their time is waiting: raise rollout.prompts_per_step" in shown) != nothing
    ahead = config_of(rollout={"max_staleness": 4, "prompts_per_step": 512})
    console = Console(file=io.StringIO(), width=80)
    show([plan(ahead, QWEN4B, SHORT, GPUS["h200"], 8)], console)
    assert "waiting:" not in console.file.getvalue()


def test_memory_is_told_by_what_holds_it():
    """An engine's keys and values take what is left of its share; 4.02 B parameters are 7.49 GiB in bf16, and 8,192
    tokens of 4 widths and 2 MLP widths 0.45 GiB."""
    recipe = config_of(learner={"gradient_checkpointing": "full"}, cluster={"generator_tensor_parallel": 2})
    (found,) = as_json([own_plan(recipe, QWEN4B, SHORT, GPUS["h200"])])
    parts, memory = found["memory_parts_gib"], found["memory_gib"]
    assert parts["teacher"] == pytest.approx({"weights": 7.49, "activations": 0.45, "kv": 0.85 * 139 - 7.94}, abs=0.01)
    assert parts["generator"]["weights"] == parts["teacher"]["weights"] / 2
    assert sum(parts["generator"].values()) == pytest.approx(0.85 * 139)
    learner = parts["learner"]
    together = ("weights", "optimizer", "ema", "teacher_heads", "gradients", "activations")
    assert sum(learner[name] for name in together) == pytest.approx(memory["learner"])
    assert learner["activations"] > learner["step"]
    crowded = own_plan(config_of(cluster={"gpu_memory_utilization": 0.05}), QWEN4B, SHORT, GPUS["h200"])
    assert crowded.memory_parts_gib["teacher"]["kv"] == 0
    console = Console(file=io.StringIO(), width=300)
    show([crowded], console)
    assert "teacher: weights 7.5, activations 0.5; learner: weights 7.5, optimizer " in console.file.getvalue()


def test_what_the_recipe_itself_asks_for():
    own = own_plan(
        config_of(learner={"ranks": 2}, cluster={"generators": 2, "teachers": 2, "colocate": "teachers"}),
        QWEN4B, SHORT, GPUS["h200"],
    )  # fmt: skip
    assert (own.gpus, own.groups) == (4, (("learner",), ("generator", "teacher")))
    alone = own_plan(config_of(cluster={"generator_tensor_parallel": 2}), QWEN4B, SHORT, GPUS["h200"])
    assert (alone.gpus, alone.split["generator"]) == (4, 2)
    assert alone.memory_gib["generator"] < own.memory_gib["generator"]


def test_the_simulation_agrees_with_the_arithmetic_where_nothing_is_left_out(monkeypatch):
    """Equal lengths, no push, no driver, and rollouts far ahead."""
    for name in ("SPREAD", "PUSH_EXPOSED_S", "DRIVER_S"):
        monkeypatch.setattr(simulate, name, 0.0)
    far = config_of(rollout={"max_staleness": 8, "prompts_per_step": 256}, learner={"gradient_checkpointing": "full"})
    predicted = plan(far, QWEN4B, SHORT, GPUS["h200"], 8)
    found = simulate.simulate(far, QWEN4B, SHORT, GPUS["h200"], predicted, steps=40)
    assert found.step_s == pytest.approx(predicted.step_s, rel=0.15)


def test_the_simulation_knows_what_completions_share_and_what_a_generator_has_room_for(monkeypatch):
    for name in ("SPREAD", "PUSH_EXPOSED_S", "DRIVER_S"):
        monkeypatch.setattr(simulate, name, 0.0)
    long = Lengths(prompt=2000, demonstration=200, completion=100)
    steps = []
    for prompts, copies in ((256, 1), (32, 8)):
        rollout = {"max_staleness": 8, "prompts_per_step": prompts, "completions_per_prompt": copies}
        c = config_of(rollout=rollout, learner={"gradient_checkpointing": "full"})
        predicted = own_plan(c, QWEN4B, long, GPUS["h200"])
        found = simulate.simulate(c, QWEN4B, long, GPUS["h200"], predicted, steps=40)
        assert found.step_s == pytest.approx(predicted.step_s, rel=0.15)
        steps.append(found.step_s)
    assert steps[1] <= steps[0]
    tight = config_of(cluster={"gpu_memory_utilization": 0.12}, rollout={"max_staleness": 4, "prompts_per_step": 256})
    predicted = plan(tight, QWEN4B, long, GPUS["h200"], 8)
    found = simulate.simulate(tight, QWEN4B, long, GPUS["h200"], predicted)
    assert found.decode_batch <= predicted.decode_limit < tight.cluster.max_sequences


@pytest.mark.parametrize(("spans", "copies"), [(1, 1), (2, 1), (1, 2)])
def test_a_simulated_step_by_hand(monkeypatch, spans, copies):
    """Four completions of two slices each, strictly one thing after another."""
    monkeypatch.setattr(simulate, "SPREAD", 0.0)
    cluster = {"generator_tensor_parallel": spans, "teacher_tensor_parallel": spans}
    rollout = {"prompts_per_step": 4 // copies, "completions_per_prompt": copies}
    c, gpu = config_of(cluster=cluster, rollout=rollout, learner={"ranks": 2}), GPUS["h200"]
    n = Lengths(prompt=300, demonstration=400, completion=2 * simulate.SLICE_TOKENS)
    p = own_plan(c, QWEN4B, n, gpu)
    prefill = 4 * QWEN4B.forward_flops(300) / (0.6 * gpu.product_flops * copies)
    slices = 2 * simulate.SLICE_TOKENS * 4 * token_seconds(QWEN4B, n, gpu, 4, 0.6)
    busy = {"generator": prefill + slices, "teacher": 4 * p.seconds.teacher, "learner": 4 * p.seconds.learner}
    gpus = {"generator": spans, "teacher": spans, "learner": 2}
    step_s = sum(busy[role] / gpus[role] for role in busy) + simulate.PUSH_EXPOSED_S + simulate.DRIVER_S
    found = simulate.simulate(c, QWEN4B, n, gpu, p, steps=5)
    assert found.step_s == pytest.approx(step_s)
    for role, seconds_ in busy.items():
        assert found.idle_share[role] == pytest.approx(1 - seconds_ / (step_s * gpus[role]))
    assert (found.decode_batch, found.staleness_mean, found.staleness_max) == (4, 0, 0)


def test_a_simulated_generator_takes_as_many_requests_as_it_has_room_for_and_the_table_says_so(monkeypatch):
    monkeypatch.setattr(simulate, "SPREAD", 0.0)
    n = Lengths(prompt=300, demonstration=400, completion=simulate.SLICE_TOKENS)
    c = config_of(rollout={"prompts_per_step": 7})
    p = replace(own_plan(c, QWEN4B, n, GPUS["h200"]), decode_limit=4.0)
    found = simulate.simulate(c, QWEN4B, n, GPUS["h200"], p)
    assert found.decode_batch == 3.5  # 4, then 3
    out = io.StringIO()
    simulate.show([p], [found], Console(file=out, width=120))
    row = out.getvalue().splitlines()[-2].replace("│", " ").split()
    ratio = p.ratio_with_waiting * found.step_s / p.step_s
    assert row[:5] == ["3", "1/1/1", "4", f"{found.step_s:.2f}", f"{ratio:.2f}"]


def test_engines_that_span_gpus_get_whole_spans():
    four = {"generator_tensor_parallel": 4, "teacher_tensor_parallel": 2}
    found = plan(config_of(cluster=four), QWEN4B, SHORT, GPUS["h200"], 16)
    assert (found.split["generator"] % 4, found.split["teacher"] % 2) == (0, 0)
    outcome = simulate.simulate(config_of(cluster=four), QWEN4B, SHORT, GPUS["h200"], found)
    assert all(0 <= idle < 1 for idle in outcome.idle_share.values())
    for gpus in (2, 6):
        with pytest.raises(UserError, match=f"--gpus {gpus}: engines that span 4 and 2 GPUs .* need 7"):
            plan(config_of(cluster=four), QWEN4B, SHORT, GPUS["h200"], gpus)


def test_engines_that_sleep_leave_room_for_the_learner():
    shared = {"colocate": "all", "gpu_memory_utilization": 0.2}
    selective = {"gradient_checkpointing": "selective"}
    awake, asleep = (
        own_plan(config_of(cluster=shared | {"sleep": sleep}, learner=selective), QWEN4B, SHORT, GPUS["h200"])
        for sleep in (False, True)
    )
    assert (awake.fits, asleep.fits) == (False, True)


@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_simulated_samples_are_never_staler_than_allowed_and_running_ahead_pays(staleness):
    ahead, sync = (
        config_of(rollout={"max_staleness": s, "prompts_per_step": 128}, learner={"gradient_checkpointing": "full"})
        for s in (staleness, 0)
    )
    times = []
    for c in (ahead, sync):
        outcome = simulate.simulate(c, QWEN4B, SHORT, GPUS["h200"], plan(c, QWEN4B, SHORT, GPUS["h200"], 8))
        assert outcome.staleness_max == c.rollout.max_staleness
        times.append(outcome.step_s)
    assert times[0] < 0.7 * times[1] if staleness else times[0] == times[1]


def test_roles_with_gpus_of_their_own_get_them_whole_whatever_the_recipe_shares():
    apart, shared = config_of(), config_of(cluster={"colocate": "teachers"})
    assert plan(apart, QWEN4B, SHORT, GPUS["h100"], 8) == plan(shared, QWEN4B, SHORT, GPUS["h100"], 8)


def test_a_configuration_with_other_names_is_refused_by_name():
    with pytest.raises(UserError, match="has no intermediate_size"):
        dimensions({name: 8 for name in SHAPES["lab"] if name != "intermediate_size"})
    with pytest.raises(UserError, match="has num_experts: the plan's arithmetic is about dense models"):
        dimensions(SHAPES["lab"] | {"num_experts": 128})
