"""What models do to their logits, against Hugging Face's own forward pass."""

import pytest
import torch
import transformers

from actors import choose
from learner import fused
from sdft_dist.logits import log_softmax_, log_tail, logit_transform, product

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2, "initializer_range": 0.5,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "settings", "changes"),
    [
        ("Gemma2", {"final_logit_softcapping": 3.0}, True),
        ("Granite", {"logits_scaling": 4.0}, True),
        ("Cohere", {"logit_scale": 0.25}, True),
        ("Qwen3", {}, False),
        ("Llama", {}, False),
    ],
)
def test_transformed_head_outputs_are_the_models_logits(family, settings, changes):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES, **settings)
    lm = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        ids = torch.randint(3, 64, (1, 9))
        states = lm.get_decoder()(ids).last_hidden_state
        raw = states @ lm.get_output_embeddings().weight.T
        expected = lm(ids).logits
        got = logit_transform(lm.config)(raw.clone())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert ((raw - expected).abs().max() > 1e-2) == changes


def test_teacher_and_learner_form_logits_alike():
    """Else chosen ids would have a divergence between equal weights: in bf16 on GPUs that of the teacher's rounding."""
    assert choose.product is fused.product


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_logits_are_not_rounded_on_a_gpu():
    torch.manual_seed(0)
    states, head = (torch.randn(n, 256, device="cuda").bfloat16() for n in (40, 500))
    expected = states.double() @ head.double().T
    assert expected.abs().max() > 32
    assert (product(states, head) - expected).abs().max() < 1e-3
    assert ((states @ head.T) - expected).abs().max() > 1e-2


def test_the_slope_is_the_derivative():
    from sdft_dist.logits import LogitTransform

    for transform in (LogitTransform(scale=0.5), LogitTransform(scale=2.0, softcap=3.0)):
        z = torch.randn(20, dtype=torch.float64)
        moved = (transform(z + 1e-6) - transform(z - 1e-6)) / 2e-6
        slope = transform.slope(transform(z.clone()))
        torch.testing.assert_close(torch.as_tensor(slope, dtype=torch.float64).expand(20), moved, rtol=1e-6, atol=1e-8)


def test_tail_is_exact_where_subtraction_is_not():
    """One id holds all but e^-30 of the mass: 1 - p rounds to 0 in fp32."""
    logits = torch.zeros(1, 4)
    logits[0, 0] = 30.0
    tail = log_tail(log_softmax_(logits, 1.0), torch.tensor([[0]]))
    assert tail.item() == pytest.approx(-30 + 1.0986123, abs=1e-5)
