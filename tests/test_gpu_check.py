"""The measurements for a GPU are put together right; they need one to mean anything."""

import argparse
import math

from sdft_dist.gpu_check import all_checks, loss, recipe
from sdft_dist.topology import needs


def test_every_role_is_measured_at_both_lengths(tmp_path):
    args = argparse.Namespace(out=tmp_path, device="cuda", shape="qwen3-4b", large="qwen3-8b")
    names = set(all_checks(args))
    roles = {f"{role}-{length}" for role in ("sft", "learner", "teacher", "generator") for length in ("short", "long")}
    assert names == roles | {
        "lab",
        "agreement",
        "targets",
        "push",
        "loss",
        "large",
        "sft-short-compile=true",
        "sft-short-attention=sdpa",
    }


def test_the_recipe_puts_all_roles_on_one_gpu_and_its_inputs_are_made_once(tmp_path):
    config = recipe(tmp_path, "cuda", "lab", "short", ["learner.offload=optimizer"])
    assert sum(need.number * need.gpus for need in needs(config, "cuda")) == 1
    assert (config.model.dtype, config.learner.offload) == ("bfloat16", "optimizer")
    made = (tmp_path / "inputs" / "lab-short" / "made.json").stat().st_mtime_ns
    assert recipe(tmp_path, "cuda", "lab", "short", []).model.path == config.model.path
    assert (tmp_path / "inputs" / "lab-short" / "made.json").stat().st_mtime_ns == made


def test_all_three_losses_are_timed():
    found = loss("cpu", tokens=32, width=16, vocab=64)
    assert {name for name in found if name.endswith("_ms")} == {"ours_ms", "liger_ms", "plain_ms"}
    assert all(math.isfinite(value) for value in found.values())
