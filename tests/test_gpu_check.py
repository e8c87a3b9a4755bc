"""The measurements for a GPU are put together right; they need one to mean anything."""

import argparse
import json
import math
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from learner.lora import attach
from learner.model import load_causal_lm
from sdft_dist.adapters import half_of
from sdft_dist.bench import gpu_check, gpu_checks
from sdft_dist.bench.gpu_check import all_checks, sdft_over_sft
from sdft_dist.bench.gpu_checks import (
    ACCOUNT,
    DECODE,
    ENGINES,
    LARGE,
    LENGTHS,
    OFFLOADED,
    SIZES,
    SLOWER,
    TUNED,
    _by_load,
    _state_differences,
    engine_loads,
    largest,
    load,
    loss,
    recipe,
)
from sdft_dist.bench.synthetic import SHAPES, parse_lengths
from sdft_dist.planning.dimensions import dimensions
from sdft_dist.planning.memory import memory_gib
from sdft_dist.planning.plan import GPUS, USABLE
from sdft_dist.topology import needs

ROOT = Path(__file__).parent.parent


def test_every_role_is_measured_at_both_lengths(tmp_path):
    args = argparse.Namespace(out=tmp_path, device="cuda", shape="qwen3-4b", large="qwen3-8b")
    assert set(all_checks(args)) == {
        "lab", "agreement", "sft", "learner", "engines", "loss", "large", "sft-eager", "sft-sdpa",
    }  # fmt: skip
    for length in LENGTHS:
        assert sdft_over_sft(tmp_path, length, "device_s") is None
        found = {"sft": {f"{length} device_s": 2.0}, "learner": {f"{length} device_s": 2.5}, "engines": {}}
        found["engines"] = {f"generator {length} device_s": 1.0, f"teacher {length} device_s": 0.5}
        for name, figures in found.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(figures))
        assert sdft_over_sft(tmp_path, length, "device_s") == 2.0
        assert sdft_over_sft(tmp_path, length, "predicted_s") is None


def test_a_used_folder_is_refused_before_any_check(tmp_path, monkeypatch):
    (tmp_path / "lab.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path)])
    monkeypatch.setattr(gpu_check, "_in_a_process", lambda *_: pytest.fail("a check has begun"))
    with pytest.raises(SystemExit, match=f"^gpu_check: error: --out: {tmp_path} is already in use: give another"):
        gpu_check.main()


@pytest.mark.parametrize(
    ("then", "limit_s", "failed"),
    [
        ("", 200, None),
        ("raise ValueError('no more')", 200, "ValueError: no more"),
        ("time.sleep(200)", 20, "not done in 20 s"),
    ],
    ids=["whole", "failed", "cut off"],
)
def test_a_check_that_ends_early_keeps_the_figures_that_it_has_written(tmp_path, monkeypatch, then, limit_s, failed):
    """The process of a check runs this program, in which one stands for all. It ends by itself, not by SIGKILL, also
    where SIGINT is ignored, as it is for what a script starts in its background."""
    program = tmp_path / "program.py"
    program.write_text(
        "import atexit, sys, time\nfrom sdft_dist.bench import gpu_check\n"
        f"atexit.register(open, {str(tmp_path / 'ended')!r}, 'w')\n"
        f"def two():\n    yield {{'one': 1.0}}\n    yield {{'two': 2.0}}\n    {then}\n"
        "gpu_check.all_checks = lambda args: {'check': two}\ngpu_check.main()\n"
    )
    ignoring = partial(subprocess.Popen, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **how: ignoring([sys.executable, str(program), *command[3:]], **how)
    )
    monkeypatch.setattr(gpu_check, "all_checks", lambda args: {"check": None})
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--out", str(tmp_path / "out"), "--limit", str(limit_s)])
    gpu_check.main()
    found = json.loads((tmp_path / "out" / "check.json").read_text())
    assert found == {"one": 1.0, "two": 2.0} | ({"failed": failed} if failed else {})
    assert (tmp_path / "ended").is_file()


def make_gpu(folder, out, within="100", pytest_does="exit 1"):
    """`make gpu` with a Python that only writes down what it is asked for."""
    python = folder / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\necho "$@" >> {folder}/asked\ncase "$*" in "-m pytest"*) {pytest_does};; esac\n')
    python.chmod(0o755)
    command = ["make", "-C", str(ROOT), "gpu", f"VENV={folder}/venv", f"GPU_OUT={out}", f"WITHIN={within}"]
    environment = {"PATH": os.environ["PATH"]}  # without the settings of a `make test` around this
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=60, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # jobs in a shell's background ignore it
    )  # fmt: skip
    asked = (folder / "asked").read_text().splitlines()
    return done, [line for line in asked if line.startswith("-m")]


def test_tests_and_figures_share_a_budget_and_figures_come_whatever_the_tests_say(tmp_path):
    done, (tests, figures) = make_gpu(tmp_path, tmp_path / "out")
    assert (tests, done.returncode) == ("-m pytest tests -m gpu", 2)
    assert figures.startswith(f"-m sdft_dist.bench.gpu_check --out {tmp_path}/out --within ")
    assert 90 < int(figures.split()[-1]) <= 100
    (tmp_path / "asked").unlink()
    done, (_, figures) = make_gpu(tmp_path, tmp_path / "out", within="6", pytest_does="exec sleep 30")
    assert "stopped after half of WITHIN=6 seconds" in done.stdout
    assert int(figures.split()[-1]) <= 3


class Item:
    """A test as pytest collects it."""

    def __init__(self, path, *marks):
        self.path, self.marks = path, [*marks]

    def add_marker(self, mark):
        self.marks.append(mark)

    def iter_markers(self):
        return iter(self.marks)


def test_whole_runs_on_a_gpu_come_after_what_is_quick(request):
    (ours,) = (plugin for plugin in request.config.pluginmanager.get_plugins()
               if getattr(plugin, "__file__", None) == str(ROOT / "tests" / "conftest.py"))  # fmt: skip
    run, other, quick = (
        Item("tests/e2e/a.py", pytest.mark.gpu),
        Item("tests/e2e/b.py"),
        Item("tests/c.py", pytest.mark.gpu),
    )
    items = [run, other, quick]
    ours.pytest_collection_modifyitems(items)
    assert items == [other, quick, run]


def test_a_used_folder_is_refused_before_the_tests(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "lab.json").touch()
    done, asked = make_gpu(tmp_path, tmp_path / "out")
    assert (asked, done.returncode) == ([], 2)
    assert f"{tmp_path}/out is already in use: give another as GPU_OUT=FOLDER" in done.stdout


def test_what_a_ratio_needs_is_measured_before_the_rest():
    loads = engine_loads(DECODE)
    assert {(each.role, each.rows.start) for each in loads[:4]} == {
        (role, load(role, length, 1).rows.start) for role in ("teacher", "generator") for length in LENGTHS
    }
    generators = [each for each in loads if each.role == "generator"]
    assert [each.batch for each in generators] == [256, 192, 128, 128, 64]


def test_the_account_is_of_the_batch_that_is_the_fastest():
    loads = [load("generator", "short", batch) for batch in (64, 128, 256)] + [load("generator", "long", 128)]
    taken = [(3.0, 100.0), (1.0, 300.0), (2.0, 150.0), (4.0, 50.0)]
    reports = [
        {"tokens_per_s": {"median": rate}, "account": dict.fromkeys(ACCOUNT, 0) | {"device_s": seconds}}
        for seconds, rate in taken
    ]
    found = {}
    for part in _by_load(loads, iter(reports), lambda load: f"{load.role} "):
        found |= part
    assert [found[f"generator short tokens/s at {batch}"] for batch in (64, 128, 256)] == [100, 300, 150]
    assert (found["generator short batch"], found["generator short device_s"]) == (128, 1.0)
    assert (found["generator long batch"], found["generator long device_s"]) == (128, 4.0)


def test_a_load_is_of_the_rows_of_its_length_all_different(tmp_path):
    config = recipe(tmp_path, "cuda", "lab", [])
    rows = [json.loads(line) for line in Path(str(config.data.train)).read_text().splitlines()]
    for length, tokens in LENGTHS.items():
        prompt, demonstration, completion = parse_lengths(tokens)
        given = load("generator", length, max(map(max, DECODE.values())))
        keys = given.keys(config, 3)
        assert len({key.problem for key in keys}) == len(keys) == given.batch
        assert {len(rows[key.problem]["prompt"].split()) for key in keys} == {prompt - 3}
        assert {len(rows[key.problem]["demonstration"].split()) for key in keys} == {demonstration - 1}
        assert given.max_tokens == completion == demonstration


@pytest.mark.parametrize("fields", [TUNED, (*TUNED, *OFFLOADED), *((*TUNED, *fields) for fields in SLOWER.values())])
def test_the_learner_fits_an_h200(tmp_path, fields):
    """By the plan, at the shape that it is measured at."""
    shape = "qwen3-8b" if "learner.offload=optimizer" in fields else "qwen3-4b"
    config = recipe(tmp_path, "cuda", "lab", list(fields))
    assert memory_gib(config, dimensions(SHAPES[shape]), 1)["learner"] < USABLE * GPUS["h200"].memory_gib


@pytest.mark.parametrize(
    ("gpu", "host", "shape", "large"),
    [
        ("h200", 256, "qwen3-4b", "qwen3-8b"),
        ("h200", 128, "qwen3-4b", "qwen3-4b"),
        ("h100", 128, "qwen3-1.7b", "qwen3-4b"),
        ("h100", 8, "qwen3-1.7b", "qwen3-0.6b"),
    ],
)
def test_what_is_measured_is_what_the_machine_holds(monkeypatch, gpu, host, shape, large):
    """With 22 bytes a parameter 4B do not fit 80 GB: half of the checks would end for want of memory."""
    monkeypatch.setattr(gpu_checks, "gpu_gib", lambda: GPUS[gpu].memory_gib)
    monkeypatch.setattr(gpu_checks, "host_memory_gib", lambda: host)
    assert largest(SIZES, "cuda", TUNED) == shape
    assert largest(LARGE, "cuda", (*TUNED, *OFFLOADED)) == large


def test_the_recipe_puts_all_roles_on_one_gpu_and_its_inputs_are_made_once(tmp_path):
    config = recipe(tmp_path, "cuda", "lab", ["learner.offload=optimizer"])
    assert sum(need.number * need.gpus for need in needs(config, "cuda")) == 1
    assert (config.model.dtype, config.learner.offload) == ("bfloat16", "optimizer")
    made = (tmp_path / "inputs" / "lab" / "made.json").stat().st_mtime_ns
    assert recipe(tmp_path, "cuda", "lab", []).model.path == config.model.path
    assert (tmp_path / "inputs" / "lab" / "made.json").stat().st_mtime_ns == made


def test_engines_are_pushed_to_by_a_learner_that_trains_next_to_nothing(tmp_path):
    lm = load_causal_lm((config := recipe(tmp_path, "cpu", "lab", list(ENGINES))).model)
    attach(lm, config.model.lora)
    trained = [name for name, p in lm.named_parameters() if p.requires_grad]
    assert [half_of(name) for name in trained] == [("model.layers.0.self_attn.k_proj.weight", half) for half in "AB"]


def test_all_losses_are_timed():
    pytest.importorskip("liger_kernel")
    found = {name: value for part in loss("cpu", tokens=32, width=16, vocab=64) for name, value in part.items()}
    assert {name for name in found if name.endswith("_ms")} == {"ours_ms", "compiled_ms", "liger_ms", "plain_ms"}
    assert all(math.isfinite(value) for value in found.values())


def test_states_are_compared_with_a_local_models(tmp_path):
    """Whose own attention the engine's is compared with, so that it needs no packing."""
    config = recipe(tmp_path, "cuda", "lab", ["cluster.device=cpu"])
    model = load_causal_lm(config.model.model_copy(update={"attention": "eager"})).eval()
    problem = SimpleNamespace(teacher_prompt_ids=np.arange(5, 12), demonstration_ids=np.arange(20, 24))
    with torch.no_grad():
        states = model.model(torch.tensor([[*range(5, 12), *range(20, 24)]])).last_hidden_state[0, 6:-1]
    half = states.clone()
    half[0] /= 2
    targets = [SimpleNamespace(dtype="bfloat16", states=kept.view(torch.uint16).numpy()) for kept in (states, half)]
    found = _state_differences(config, [problem, problem], targets)
    assert found.shape == (8,)
    assert found.tolist() == pytest.approx([0, 0, 0, 0, 0.5, 0, 0, 0], abs=0.02)  # bf16, by two ways
