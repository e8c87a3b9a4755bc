"""Taking turns, rates and the account of who works; the contestants are fakes."""

import io
import json
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import config_of
from rich.console import Console

from sdft_dist.bench import synthetic as synthetic_module
from sdft_dist.bench.account import Machine, accounts, mean_lengths, push_split, time_shares
from sdft_dist.bench.contest import Turns, _refuse_too_few_gpus, timeline
from sdft_dist.bench.contestants import contestant, devices
from sdft_dist.bench.figures import SKIPPED, _rate, figures, regression, show
from sdft_dist.bench.synthetic import SHAPES, parse_lengths, synthetic, write_model, write_rows
from sdft_dist.errors import UserError
from sdft_dist.planning.dimensions import read_dimensions
from sdft_dist.planning.memory import memory_gib
from sdft_dist.planning.plan import Lengths
from sdft_dist.recipe import load_config
from sdft_dist.trace import Trace
from sdft_dist.types import Problem, Span


class Fake:
    def __init__(self, name, order, fail_at=None):
        self.name, self.order, self.fail_at = name, order, fail_at

    def __call__(self, num_steps, after_step):
        after_step(0)
        for step in range(1, num_steps + 1):
            self.order.append((self.name, step))
            if step == self.fail_at:
                raise ValueError("contestant failed")
            time.sleep(0.001)
            after_step(step)


def test_contestants_work_one_segment_at_a_time():
    order = []
    turns = Turns(["a", "b", "c"], segment=4, num_steps=8)
    turns.run([Fake(name, order) for name in "abc"])
    assert order == [(name, first + i) for first in (1, 5) for name in "abc" for i in range(4)]
    assert {name: [len(s) for s in segments] for name, segments in turns.ends.items()} == {
        name: [5, 5] for name in "abc"
    }


def test_the_first_failure_ends_all():
    turns = Turns(["a", "b"], segment=4, num_steps=8)
    with pytest.raises(ValueError, match="contestant failed"):
        turns.run([Fake("a", []), Fake("b", [], fail_at=2)])


def test_a_rate_leaves_out_the_first_steps_of_a_segment():
    ends = [0.0, 9.0, 10.0, 10.5, 11.0]  # two slow ones, then half a second each
    assert SKIPPED == 2
    assert _rate(ends, batch=32) == pytest.approx(64)


def test_a_regression_is_over_ten_percent():
    def report(ratio):
        return {"sdft_over_sft": {"median": ratio}}

    assert regression(report(2.19), report(2.0)) is None
    assert "was 2 and is 2.21" in regression(report(2.21), report(2.0))
    role = {"role": "teacher", "batch_s": {"median": 1.0}}
    assert regression(role, role) is None
    assert "teacher seconds was 0.5 and is 1" in regression(role, {**role, "batch_s": {"median": 0.5}})
    for other in (report(2.0), {**role, "role": "learner"}):
        with pytest.raises(UserError, match="same kind"):
            regression(role, other)


def test_an_account_sets_a_role_beside_its_device_and_the_plan(tmp_path):
    model = write_model(tmp_path / "model", "lab", "float32", 64)
    config = config_of(model={"path": str(model)})
    problem = Problem(
        prompt_ids=np.zeros(10, np.int32), teacher_prompt_ids=np.zeros(25, np.int32), demonstration_ids=np.zeros(5)
    )
    lengths = mean_lengths([problem, problem], 8.4)
    assert lengths == Lengths(prompt=10, demonstration=15, completion=8)
    machine = Machine(device="cpu", product_flops=1e11, bandwidth=1e10, peak_gib={"learner": 2.0, "teacher": 1.0})
    found = accounts(config, lengths, machine, {"teacher": 1e-3, "sft": 2e-3}, decode_batch=4)
    m = read_dimensions(config)
    assert found["teacher"]["mfu"] == pytest.approx(m.forward_flops(33) / 1e-3 / 1e11)
    assert found["teacher"]["peak_gib"] == 1.0
    assert found["teacher"]["tokens_per_device_s"] == pytest.approx(33 / 1e-3)
    assert "predicted_gib" not in found["teacher"], "the plan's memory is a GPU's"
    sft = 3 * m.forward_flops(18) + 6 * m.head * 8
    assert found["sft"]["mfu"] == pytest.approx(sft / 2e-3 / 1e11)
    assert found["sft"]["predicted_s"] == pytest.approx(sft / (0.45 * 1e11))
    assert found["sft"]["peak_gib"] == 2.0


def test_an_account_knows_the_data_sheets_of_gpus(tmp_path):
    model = write_model(tmp_path / "model", "lab", "bfloat16", 64)
    config = config_of(model={"path": str(model)})
    machine = Machine(device="NVIDIA H200", product_flops=7e14, bandwidth=4e12, peak_gib={"teacher": 1.0})
    lengths = Lengths(prompt=10, demonstration=15, completion=8)
    found = accounts(config, lengths, machine, {"teacher": 1e-6}, decode_batch=4)
    assert found["teacher"]["mfu"] == pytest.approx(read_dimensions(config).forward_flops(33) / 1e-6 / 989e12)
    assert found["teacher"]["predicted_gib"] == pytest.approx(0.85 * 139), (
        "what cluster.gpu_memory_utilization gives it"
    )
    peak = accounts(config, lengths, replace(machine, peak_gib={"learner": 9.0}), {"learner": 1e-6}, decode_batch=4)
    assert peak["learner"]["predicted_gib"] == memory_gib(config, read_dimensions(config), 1)["learner"]


def test_a_trace_gives_a_picture(tmp_path):
    trace = Trace(tmp_path / "trace.json")
    for i in range(3):
        trace.add("generator", i % 2, Span("decode", 100.0 + i, 100.5 + i))
        trace.add("learner", 0, Span("train", 100.5 + i, 101.0 + i))
    trace.close()
    timeline(tmp_path / "trace.json", tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 2000


def test_synthetic_rows_have_the_lengths_asked_for(tmp_path):
    from transformers import AutoTokenizer

    model = write_model(tmp_path / "model", "lab", "float32", 128)
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert len(tokenizer) == SHAPES["lab"]["vocab_size"]
    rows = [json.loads(line) for line in write_rows(tmp_path / "r.jsonl", "lab", [(12, 7), (9, 5)], 20).open()]
    assert len(rows) == 40
    for row, (prompt, demonstration) in zip(rows, [(12, 7)] * 20 + [(9, 5)] * 20, strict=True):
        chat = [{"role": "user", "content": row["prompt"]}]
        assert len(tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]) == prompt
        assert len(tokenizer(row["demonstration"])["input_ids"]) == demonstration - 1
    assert parse_lengths("3/4/5") == (3, 4, 5)
    with pytest.raises(UserError, match="--lengths: got '3/4'"):
        parse_lengths("3/4")


@pytest.mark.parametrize("tied", [True, False])
def test_random_weights_are_those_that_transformers_would_draw(tmp_path, monkeypatch, tied):
    from transformers import AutoModelForCausalLM

    monkeypatch.setitem(SHAPES, "lab", SHAPES["lab"] | {"tie_word_embeddings": tied})
    monkeypatch.setattr(synthetic_module, "BLOCK", 5000)  # most matrices are of several
    made = [AutoModelForCausalLM.from_pretrained(write_model(tmp_path / n, "lab", "float32", 64)) for n in "ab"]
    weights = dict(made[0].named_parameters())
    assert ("lm_head.weight" in weights) is not tied
    assert all(torch.equal(weight, weights[name]) for name, weight in made[1].named_parameters())
    for name, weight in weights.items():
        if weight.dim() == 1:
            assert (weight == 1).all(), name
        else:
            assert weight.mean().item() == pytest.approx(0, abs=1e-3), name
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
    assert not weights["model.embed_tokens.weight"][made[0].config.pad_token_id].any()


def test_plain_fine_tuning_pays_for_no_average(tmp_path):
    """What it is measured against would look faster otherwise."""
    made = synthetic(tmp_path / "inputs", "lab", ["12/7/5"], 4, "float32")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("teacher: {kind: ema}\nrollout: {max_completion_tokens: 5}\n")
    config = load_config(recipe, [made])
    kinds = {m: contestant(config, m, tmp_path, fixed=True).config.teacher.kind for m in ("sdft", "sft")}
    assert kinds == {"sdft": "ema", "sft": "base"}


def test_samples_are_counted_as_each_method_takes_them(tmp_path):
    """Of a prompt with eight completions plain SFT reads one demonstration."""
    made = synthetic(tmp_path / "inputs", "lab", ["12/7/5"], 4, "float32")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rollout: {prompts_per_step: 2, completions_per_prompt: 8}\ncluster: {device: cpu}\n")
    config = load_config(recipe, [made])
    used = Machine(
        device="cpu", product_flops=1e11, bandwidth=1e10, peak_gib=dict.fromkeys(("learner", "generator", "teacher"), 1)
    )
    ours = [replace(contestant(config, m, tmp_path, fixed=True), machines=[used]) for m in ("sdft", "sft")]
    turns = Turns(["sdft", "sft"], segment=4, num_steps=12)
    busy = {"busy/learner/train": 0.25, "busy/generator/decode": 0.5, "busy/teacher/score": 0.25}
    busy |= {
        "busy/learner/gather weights": 0.1,
        "busy/generator/await weights": 0.2,
        "busy/generator/load weights": 0.05,
    }
    for contestant_ in ours:
        turns.ends[contestant_.name] = [[float(i) for i in range(5)] for _ in range(3)]  # a step takes a second
        samples = 16 if contestant_.name == "sdft" else 2
        counted = {"samples": samples, "trained_tokens": 4 * samples, "padding_share": 0.1, "staleness_counts": [1]}
        record = {"kind": "train", "completion_tokens_mean": 5, "decode_batch_mean": 7.0, **counted, **busy}
        (tmp_path / contestant_.name).mkdir()
        lines = [json.dumps(record | {"step": step}) for step in range(1, 13)]
        (tmp_path / contestant_.name / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    report = figures(config, turns.ends, ours, tmp_path, True)
    assert report["batch"] == {"sdft": 16, "sft": 2}
    assert {name: found["median"] for name, found in report["samples_per_s"].items()} == {"sdft": 16.0, "sft": 2.0}
    assert report["sdft_over_sft"]["median"] == pytest.approx(1 / 8)
    seconds = {role: account["device_s"] for role, account in report["roles"].items()}
    assert seconds == pytest.approx(
        {"learner": 0.25 / 16, "generator": 0.5 / 16, "teacher": 0.25 / 16, "sft": 0.25 / 2}
    )
    tokens = {name: {k: v["median"] for k, v in found.items()} for name, found in report["tokens_per_device_s"].items()}
    assert tokens == {
        "sdft": {"trained": 16 * 4, "processed": 16 * (12 + 5)},
        "sft": {"trained": 2 * 4, "processed": 2 * (12 + 5)},
    }
    assert report["decode_batch"] == {"measured": pytest.approx(7), "planned": 16}
    ahead = load_config(recipe, [made, "rollout.max_staleness=3", "cluster.generators=2"])
    assert figures(ahead, turns.ends, ours, tmp_path, True)["decode_batch"]["planned"] == 16 * 4 / 2
    assert report["padding_share"] == pytest.approx({"sdft": 0.1, "sft": 0.1})
    assert report["push_in_a_step"]["generator_pause_s"] == pytest.approx(0.25)
    console = Console(file=io.StringIO(), width=120)
    show(report, console)
    shown = " ".join(console.file.getvalue().split())
    assert "decode batch: 7.0, planned 16" in shown
    assert "generator wire 200.0, generator load 50.0, generator pause 250.0" in shown


@pytest.mark.parametrize(
    ("sections", "sdft", "sft"),
    [
        ({"cluster": {"colocate": "all"}}, 1, 1),
        ({"cluster": {"colocate": "teachers"}}, 2, 1),
        ({"learner": {"ranks": 8}, "cluster": {"generator_tensor_parallel": 4}}, 13, 8),
        ({"eval": {"every": 10, "sets": {"held": "h.jsonl"}, "scorer": "sdft_dist.scorers:text"}}, 3, 1),
    ],
)
def test_devices_are_counted_as_they_are_shared_and_spanned(sections, sdft, sft):
    cluster = {"device": "cuda", **sections.pop("cluster", {})}
    assert devices(config_of(cluster=cluster, **sections)) == sdft
    assert devices(config_of(cluster=cluster, **sections, method="sft")) == sft


def test_contestants_that_do_not_fit_beside_each_other_are_refused(monkeypatch):
    both = [config_of(cluster={"device": "cuda", "colocate": "all"}, method=method) for method in ("sdft", "sft")]
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"GPU": 2}}])
    _refuse_too_few_gpus(both)
    monkeypatch.setattr("ray.nodes", lambda: [{"Alive": True, "Resources": {"GPU": 1}}])
    with pytest.raises(UserError, match=r"needs 2 GPUs .* the cluster has 1 .*--learner-only"):
        _refuse_too_few_gpus(both)


def test_what_an_actor_does_with_its_time_is_its_work_its_weights_and_the_rest():
    config = config_of(cluster={"generators": 2})
    busy = {
        "generator/decode": 1.2, "generator/await weights": 0.2, "generator/load weights": 0.2, "teacher/score": 0.3,
        "teacher/load weights": 0.1, "learner/train": 0.5, "learner/fetch": 0.1, "learner/gather weights": 0.1,
    }  # fmt: skip
    found = time_shares(busy, config)
    assert found["generator"] == pytest.approx({"work": 0.6, "weights": 0.1, "sync": 0.1, "data": 0.2})
    assert found["teacher"] == pytest.approx({"work": 0.3, "weights": 0.0, "sync": 0.1, "data": 0.6})
    assert found["learner"] == pytest.approx({"work": 0.5, "weights": 0.0, "sync": 0.1, "data": 0.4})
    assert push_split(found, step_s=2.0) == pytest.approx(
        {
            "learner_gather_s": 0.2, "teacher_wire_s": 0, "teacher_load_s": 0.2,
            "generator_wire_s": 0.2, "generator_load_s": 0.2, "generator_pause_s": 0.4,
        }
    )  # fmt: skip
