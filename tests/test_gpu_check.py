"""The measurements for a GPU are put together right; they need one to mean anything."""

import argparse
import math

import pytest

from sdft_dist.dimensions import dimensions
from sdft_dist.gpu_check import OFFLOADED, SLOWER, TUNED, all_checks, loss, recipe
from sdft_dist.plan import GPUS, USABLE
from sdft_dist.plan_memory import memory_gib
from sdft_dist.synthetic import SHAPES
from sdft_dist.topology import needs


def test_every_role_is_measured_at_both_lengths(tmp_path):
    args = argparse.Namespace(out=tmp_path, device="cuda", shape="qwen3-4b", large="qwen3-8b")
    names = set(all_checks(args))
    roles = {f"{role}-{length}" for role in ("sft", "learner", "teacher", "generator") for length in ("short", "long")}
    others = {"lab", "agreement", "targets", "push", "loss", "large", "sft-short-eager", "sft-short-sdpa"}
    assert names == roles | others


@pytest.mark.parametrize("fields", [TUNED, (*TUNED, *OFFLOADED), *((*TUNED, *fields) for fields in SLOWER.values())])
def test_the_learner_fits_an_h200(tmp_path, fields):
    """By the plan, at the shape that it is measured at."""
    shape = "qwen3-8b" if "learner.offload=optimizer" in fields else "qwen3-4b"
    config = recipe(tmp_path, "cuda", "lab", "short", list(fields))
    assert memory_gib(config, dimensions(SHAPES[shape]), 1)["learner"] < USABLE * GPUS["h200"].memory_gib


def test_the_recipe_puts_all_roles_on_one_gpu_and_its_inputs_are_made_once(tmp_path):
    config = recipe(tmp_path, "cuda", "lab", "short", ["learner.offload=optimizer"])
    assert sum(need.number * need.gpus for need in needs(config, "cuda")) == 1
    assert (config.model.dtype, config.learner.offload) == ("bfloat16", "optimizer")
    made = (tmp_path / "inputs" / "lab-short" / "made.json").stat().st_mtime_ns
    assert recipe(tmp_path, "cuda", "lab", "short", []).model.path == config.model.path
    assert (tmp_path / "inputs" / "lab-short" / "made.json").stat().st_mtime_ns == made


def test_all_three_losses_are_timed():
    pytest.importorskip("liger_kernel")
    found = loss("cpu", tokens=32, width=16, vocab=64)
    assert {name for name in found if name.endswith("_ms")} == {"ours_ms", "liger_ms", "plain_ms"}
    assert all(math.isfinite(value) for value in found.values())
