"""Vector functions are settled before anything is computed from a model's weights."""

import pytest
from helpers import config_of, tiny_model

from sdft_dist import vector_math


def test_settling_takes_every_function_through_both_types(monkeypatch):
    seen = []
    monkeypatch.setattr(vector_math, "FUNCTIONS", [lambda x: seen.append((x.numel(), str(x.dtype)))])
    vector_math.settle()
    # One element: a single thread makes the call.
    assert seen == [(1, "torch.float32"), (1, "torch.float64")]


def test_a_learner_settles_before_it_loads(monkeypatch, tmp_path):
    import transformers

    from learner import model

    order = []
    monkeypatch.setattr(model, "settle", lambda: order.append("settle"))

    def load(*args, **options):
        order.append("load")
        raise OSError("enough")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load)
    config = config_of(model={"path": str(tiny_model(tmp_path))})
    with pytest.raises(ValueError, match="enough"):
        model.load_causal_lm(config.model)
    assert order == ["settle", "load"]
