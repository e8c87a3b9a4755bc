"""An engine's end of a push of adapters: what is loaded is W + alpha / r · B A, in whatever order it comes."""

import pytest
import torch

from sdft_dist.adapters import Merger, add, half_of, plain_name

CPU = torch.device("cpu")
A, B = "layers.0.q_proj.lora_A.default.weight", "layers.0.q_proj.lora_B.default.weight"
Q, NORM = "layers.0.q_proj.weight", "norm.weight"


@pytest.fixture
def weights():
    torch.manual_seed(0)
    return {Q: torch.randn(6, 4), NORM: torch.randn(4), A: torch.randn(2, 4), B: torch.randn(6, 2)}


def loaded(merger, tensors, scale=0.5, device=CPU):
    merger.begin(tensors, scale)
    return dict(merger.merged(tensors.items(), device))


def test_names_are_those_of_peft_and_hugging_face():
    assert half_of(A) == (Q, "A")
    assert half_of(B) == (Q, "B")
    assert half_of(Q) is None
    assert plain_name("layers.0.q_proj.base_layer.weight") == Q
    assert plain_name(NORM) == NORM


def test_a_whole_push_then_adapters_alone(weights):
    merger = Merger()
    expected = weights[Q] + 0.5 * weights[B] @ weights[A]
    found = loaded(merger, weights)
    assert found.keys() == {Q, NORM}
    assert torch.equal(found[NORM], weights[NORM])
    torch.testing.assert_close(found[Q], expected)
    again = {A: 2 * weights[A], B: weights[B]}
    torch.testing.assert_close(loaded(merger, again)[Q], weights[Q] + 0.5 * weights[B] @ (2 * weights[A]))
    torch.testing.assert_close(loaded(merger, {A: weights[A], B: weights[B]})[Q], expected), "nothing adds up"
    assert not merger.unmerged()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_weights_wait_in_memory_that_a_gpu_reads_by_itself(weights):
    """Else each push of adapters would copy gigabytes through a buffer of the driver's, while the engine pauses."""
    merger, device = Merger(), torch.device("cuda")
    there = {name: tensor.to(device) for name, tensor in weights.items()}
    expected = weights[Q] + 0.5 * weights[B] @ weights[A]
    for tensors in (there, {A: there[A], B: there[B]}):
        torch.testing.assert_close(loaded(merger, tensors, device=device)[Q].cpu(), expected)
    assert merger._weights[Q].is_pinned()


def test_halves_may_come_in_different_messages(weights):
    merger = Merger()
    merger.begin(weights, 0.5)
    assert list(merger.merged([(B, weights[B])], CPU)) == []
    assert merger.unmerged() == {Q}
    assert list(merger.merged([(Q, weights[Q])], CPU)) == []
    ((name, _),) = merger.merged([(A, weights[A])], CPU)
    assert name == Q
    assert not merger.unmerged()


def test_a_half_that_is_missing_is_told(weights):
    merger = Merger()
    loaded(merger, weights)
    loaded(merger, {A: weights[A]})
    assert merger.unmerged() == {Q}


def test_adapters_of_a_weight_that_never_came_are_refused(weights):
    with pytest.raises(RuntimeError, match=r"adapter of layers\.0\.q_proj\.weight came, and never the weight"):
        loaded(Merger(), {A: weights[A], B: weights[B]})


def test_bfloat16_is_rounded_once():
    torch.manual_seed(1)
    weight, a, b = torch.randn(64, 64).bfloat16(), torch.randn(8, 64), torch.randn(64, 8)
    exact = (weight.double() + 0.25 * (b.double() @ a.double())).bfloat16()
    assert (add(weight, a, b, 0.25) == exact).float().mean() > 0.999
