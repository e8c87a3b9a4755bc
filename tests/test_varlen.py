"""Packing for varlen attention: with its kernel, or a slow one in its place, it is what sdpa computes row by row."""

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from helpers import tiny_model

from learner import varlen
from learner.fused import Objective
from learner.microbatch import TrainSequence, build
from learner.model import Student, load_causal_lm, tune
from sdft_dist.batching import one_after_another, rows
from sdft_dist.config import LearnerConfig, ModelConfig
from sdft_dist.errors import UserError


def slowly(q, k, v, bounds, _, longest, __, *, scale, window_size, enable_gqa=False):
    """What varlen_attn computes, sequence by sequence; [T, H, D]."""
    assert longest == int(bounds.diff().max())
    out = []
    for start, end in pairwise(bounds):
        own = [t[start:end].transpose(0, 1) for t in (q, k, v)]
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & ((distance <= window_size[0]) | (window_size[0] < 0))
        found = torch.nn.functional.scaled_dot_product_attention(*own, seen, scale=scale, enable_gqa=enable_gqa)
        out.append(found.transpose(0, 1))
    return torch.cat(out)


def sequences():
    rng = np.random.default_rng(0)
    draw = partial(rng.integers, 1, 90)
    sizes = ((3, 7), (20, 12), (1, 1), (9, 30))
    return [TrainSequence(prompt_ids=draw(size=p), completion_ids=draw(size=c)) for p, c in sizes]


def loss_and_gradients(folder, attention, layout, *, dtype="float32", device="cpu", learner=None):
    lm = load_causal_lm(ModelConfig(path=str(folder), dtype=dtype, attention=attention)).to(device)
    tune(lm, LearnerConfig(**(learner or {})))
    student = Student(lm, 102, Objective(kind="cross_entropy"))
    given = sequences()
    batch = build(given, [0.1] * len(given), 0, teacher_heads=None, layout=layout, device=torch.device(device))
    total = student(batch).total
    total.backward()
    return total.item(), torch.cat([p.grad.flatten() for p in lm.parameters() if p.grad is not None]).float().cpu()


@pytest.mark.parametrize("grouped", [True, False])
def test_it_is_what_sdpa_computes_over_rows(monkeypatch, tmp_path, grouped):
    monkeypatch.setattr(varlen.varlen, "varlen_attn", slowly)
    monkeypatch.setattr(varlen, "GROUPED", grouped)
    folder = tiny_model(tmp_path)
    expected, gradients = loss_and_gradients(folder, "sdpa", partial(rows, width=32))
    for layout in (one_after_another, partial(rows, width=32)):
        found, own = loss_and_gradients(folder, "varlen", layout)
        assert found == pytest.approx(expected, rel=1e-6)
        assert (own - gradients).norm() < 1e-5 * gradients.norm()


def test_an_empty_share_has_one_slot():
    batch = build([], [], 0, teacher_heads=None, layout=one_after_another, device=torch.device("cpu"))
    assert batch.bounds.tolist() == [0, 1]


def test_a_window_counts_the_token_itself(monkeypatch):
    monkeypatch.setattr(varlen.varlen, "varlen_attn", slowly)
    q, k, v = torch.randn(3, 1, 2, 9, 4)
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    out, _ = varlen.attend(None, q, k, v, None, cu_seq_lens_q=bounds, max_length_q=9, sliding_window=3, scaling=0.5)
    logits = 0.5 * q[0] @ k[0].transpose(1, 2)
    distance = torch.arange(9)[:, None] - torch.arange(9)
    expected = logits.masked_fill((distance < 0) | (distance >= 3), -torch.inf).softmax(-1) @ v[0]
    assert torch.allclose(out[0], expected.transpose(0, 1), atol=1e-6)


def test_what_the_kernel_does_not_know_is_refused(tmp_path):
    with pytest.raises(ValueError, match="use eager"):
        varlen.attend(None, *torch.randn(3, 1, 2, 9, 4), None, cu_seq_lens_q=None, max_length_q=9, softcap=50.0)
    folder = tiny_model(tmp_path, attn_logit_softcapping=50.0)
    with pytest.raises(UserError, match="which varlen cannot: use eager"):
        load_causal_lm(ModelConfig(path=str(folder), attention="varlen"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("learner", [{}, {"gradient_checkpointing": "selective"}, {"compile": True}], ids=str)
def test_the_kernel_is_what_sdpa_computes_over_rows(tmp_path, learner):
    """In bf16: as near to fp32 as sdpa in bf16 is, by a factor of 2."""
    folder = tiny_model(tmp_path)
    layout = partial(rows, width=32)
    _, exact = loss_and_gradients(folder, "sdpa", layout, device="cuda")
    _, sdpa = loss_and_gradients(folder, "sdpa", layout, dtype="bfloat16", device="cuda")
    _, own = loss_and_gradients(folder, "varlen", one_after_another, dtype="bfloat16", device="cuda", learner=learner)
    assert (own - exact).norm() < 2 * (sdpa - exact).norm()
