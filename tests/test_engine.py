"""What vLLM is asked for; what it then does is in the end-to-end tests."""

import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
from helpers import config_of

from actors import engine, llm
from actors.engine import Engine, _renewed
from actors.llm import _graph_sizes, make_llm, options_for
from sdft_dist.errors import UserError


@pytest.mark.parametrize(
    ("most", "sizes"),
    [(1, [1]), (3, [1, 2, 3]), (32, [1, 2, 4, 8, 16, 32]), (70, [1, 2, 4, 8, 16, 32, 64, 70]), (1024, None)],
)
def test_graphs_are_made_up_to_the_largest_decode_batch(most, sizes):
    found = _graph_sizes(most)
    assert sizes is None or found == sizes
    assert found == sorted(set(found))
    assert found[-1] == min(most, 512)
    assert all(size <= max(2 * last, last + 32) for last, size in pairwise(found))


def options(runner, device="cuda", **fields):
    return options_for(config_of(**fields), runner, device)


def test_only_generators_that_draft_nothing_say_which_graphs_they_want():
    assert options("generate")["compilation_config"]["cudagraph_capture_sizes"][-1] == 256
    assert "compilation_config" not in options("generate", rollout={"speculative": "ngram"})
    assert options("pooling")["enforce_eager"]
    assert all("compilation_config" not in options(runner, "cpu") for runner in ("generate", "pooling"))


def test_teachers_may_take_less_memory_than_generators():
    def shares(**cluster):
        return [options(runner, cluster=cluster)["gpu_memory_utilization"] for runner in ("generate", "pooling")]

    assert shares() == [0.85, 0.85]
    assert shares(colocate="teachers", teacher_memory=0.2) == [0.4, 0.2]
    assert shares(gpu_memory_utilization=0.5) == [0.5, 0.5]


@pytest.mark.parametrize(
    ("fields", "generator", "teacher"),
    [
        ({}, True, True),
        ({"model": {"path": "x", "lora": {"rank": 2}}}, False, False),
        ({"teacher": {"kind": "base"}}, True, False),
        ({"teacher": {"sync_every": 2}}, True, False),
    ],
)
def test_only_weights_that_the_next_push_brings_may_be_forgotten_in_sleep(fields, generator, teacher):
    assert (_renewed(config_of(**fields), "generate"), _renewed(config_of(**fields), "pooling")) == (generator, teacher)


def test_peak_memory_is_that_of_the_processes_that_an_engine_spans(monkeypatch):
    """On GPUs the actor's own process holds nothing then."""
    needed = iter([0.0, 5.0, 7.0])
    monkeypatch.setattr(engine, "own_peak_gib", lambda device: next(needed))
    spanning = object.__new__(Engine)
    spanning.device = "cuda"
    spanning._llm = SimpleNamespace(collective_rpc=lambda method, args: [method(rank, *args) for rank in range(2)])
    assert spanning.peak_gib() == 7.0


def test_generators_sample_from_float32_logits_as_learners_do():
    bf16 = {"path": "x", "dtype": "bfloat16"}
    assert options("generate", model=bf16)["hf_overrides"] == {"head_dtype": "float32"}
    assert options("pooling", model=bf16)["hf_overrides"] == {"head_dtype": "model"}
    assert "hf_overrides" not in options("generate")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("There is no module or parameter named 'x' in Qwen3ForCausalLM"),
        AssertionError("num_heads (9) is not divisible by num_kv_heads (2)"),
        NotImplementedError("no such layer"),
    ],
)
def test_a_model_that_vllm_refuses_is_told_with_its_reason_and_want_of_memory_and_faults_are_not_that(
    monkeypatch, error
):
    def raising(error):
        def make(**options):
            raise error

        monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=make))
        make_llm(config_of(model={"path": "m"}), "generate", "cpu", None)

    monkeypatch.setattr(llm, "_prepare_environment", lambda *_: None)
    monkeypatch.setattr(llm.plugin, "prepare", lambda: None)
    monkeypatch.setattr(llm, "options_for", lambda *_: {})
    with pytest.raises(UserError, match=r"^model.path: m: vLLM refuses it with this configuration: ") as told:
        raising(error)
    assert str(error) in str(told.value)
    for other in (
        ValueError("Free memory on the device is too little"),
        RuntimeError("a fault"),
        KeyError(1),
    ):
        with pytest.raises(type(other), match=str(other).strip("'")[:5]):
            raising(other)
