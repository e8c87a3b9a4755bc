"""How a model is taken in as the student: without dropout, and only where its head is understood."""

import numpy as np
import pytest
import torch
import transformers
from helpers import config_of, tiny_model
from safetensors.torch import load_file, save_file

from learner.fused import Objective
from learner.microbatch import TrainSequence, build
from learner.model import Student, check_head, check_packing, load_causal_lm, tune
from learner.worker import LearnerRank, objective
from sdft_dist.batching import one_after_another
from sdft_dist.config import LearnerConfig
from sdft_dist.errors import UserError
from sdft_dist.logits import LogitTransform, logit_transform

SIZES = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


def made(family, **settings):
    torch.manual_seed(0)
    lm = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**settings))
    for p in lm.parameters():
        torch.nn.init.normal_(p, std=0.2)
    return lm


@pytest.mark.parametrize("settings", [{"final_logit_softcapping": 3.0, "head_dim": 16}, {"head_dim": 16}])
def test_a_head_that_is_understood_passes(settings):
    lm = made("Gemma2", **SIZES, **settings)
    check_head(lm, logit_transform(lm.config.get_text_config()), "m")
    assert "forward" not in vars(lm.get_decoder()), "the decoder computes again"


def test_a_head_that_does_more_is_refused():
    lm = made("FalconH1", **SIZES, lm_head_multiplier=0.5, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16)
    with pytest.raises(UserError, match="m: the output head of FalconH1ForCausalLM does more than is known here"):
        check_head(lm, logit_transform(lm.config.get_text_config()), "m")
    capped = made("Gemma2", **SIZES, head_dim=16, final_logit_softcapping=3.0)
    with pytest.raises(UserError, match="does more"):
        check_head(capped, LogitTransform(), "m")


def test_a_cap_in_the_settings_of_the_text_model_is_seen():
    settings = transformers.Gemma3nConfig(text_config={"final_logit_softcapping": 7.0})
    assert logit_transform(settings.get_text_config()).softcap == 7.0


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("Lfm2", {"layer_types": ["conv"], "block_ff_dim": 48}),
        ("FalconH1", {"mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16}),
    ],
)
def test_a_model_that_sees_the_sequence_before_in_a_packed_row_is_refused(tmp_path, family, settings):
    """It would be trained on other log-probs than vLLM samples by."""
    made(family, **{**SIZES, **settings}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{family}ForCausalLM has layers that carry a state from token to token"):
        load_causal_lm(config_of(model={"path": str(tmp_path)}).model)


def test_weights_that_are_not_of_the_configuration_are_refused(tmp_path):
    """transformers would train random ones in their place."""
    folder = tiny_model(tmp_path)
    settings, weights = tmp_path / "config.json", tmp_path / "model.safetensors"
    given, tensors = settings.read_text(), load_file(weights)
    settings.write_text(given.replace('"intermediate_size": 96', '"intermediate_size": 80'))
    wrong = r"config.json's: model.layers.0.mlp.down_proj.weight is \[64, 96\], not \[64, 80\]; .*, and 3 more$"
    with pytest.raises(UserError, match=wrong):
        load_causal_lm(config_of(model={"path": str(folder)}).model)
    settings.write_text(given)
    tensors["another.name"] = tensors.pop("model.norm.weight")
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"its weights are not config.json's: model.norm.weight is missing$"):
        load_causal_lm(config_of(model={"path": str(folder)}).model)


def test_models_whose_packed_sequences_see_each_other_are_refused():
    for family, settings in [("Gemma2", {"head_dim": 16, "sliding_window": 4}), ("GPTNeoX", {})]:
        check_packing(made(family, **{**SIZES, **settings}), "m")
    opt = made("OPT", **SIZES, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0)
    with pytest.raises(UserError, match="m: sequences of OPTForCausalLM that are packed into one row see each other"):
        check_packing(opt, "m")


def test_dropout_is_off(tmp_path):
    settings = transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=1, n_head=2, n_positions=64, resid_pdrop=0.5)
    transformers.GPT2LMHeadModel(settings).save_pretrained(tmp_path)
    student = Student(load_causal_lm(config_of(model={"path": str(tmp_path)}).model), 96, Objective(kind="dft"))
    ids = np.arange(8, dtype=np.int32)
    batch = build(
        [TrainSequence(prompt_ids=ids, completion_ids=ids)], [1.0], 0, teacher_heads=None, layout=one_after_another,
        device=torch.device("cpu"),
    )  # fmt: skip
    assert student.lm.training
    assert torch.equal(student(batch).label_logprobs, student(batch).label_logprobs)


@torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True)
def test_layers_are_compiled_for_every_layout(monkeypatch):
    """Each with gradients, and without as for log-probs: ten graphs, where torch's own limit is eight."""
    compile_, counted = torch.nn.Module.compile, torch._dynamo.utils.counters["stats"]
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: compile_(self, backend="eager", **how))
    lm = made("Qwen3", **SIZES, head_dim=16).train()
    tune(lm, LearnerConfig(compile=True))
    student, ids = Student(lm, 96, Objective(kind="cross_entropy")), np.arange(8)
    before = counted["unique_graphs"]
    for layout in ([], [[0]], [[0, 1]], [[0], [1]], [[0, 1], [2]]):
        given = [TrainSequence(prompt_ids=ids, completion_ids=ids[i:]) for i in range(sum(map(len, layout)))]
        batch = build(
            given, [1.0] * len(given), 0, teacher_heads=None, layout=lambda _, found=layout: found,
            device=torch.device("cpu"),
        )  # fmt: skip
        student(batch).total.backward()
        with torch.no_grad():
            student(batch)
    assert counted["unique_graphs"] > before + 8


@pytest.mark.parametrize("moved", [False, True])
def test_the_head_of_a_frozen_teacher_is_where_the_student_is(tmp_path, moved):
    """The device "meta" stands for a GPU, and `moved` for a run that goes on: its teacher is read from the folder."""
    config = config_of(model={"path": str(tiny_model(tmp_path, tied=False))}, teacher={"kind": "base"})
    rank = LearnerRank(config, 0, 1, "cpu", 102, [])
    rank.device = torch.device("meta")
    rank.student = Student(load_causal_lm(config.model).to("meta"), 102, objective(config, LogitTransform()))
    rank._named = dict(rank.student.lm.named_parameters())
    rank._shapes = {name: tuple(p.shape) for name, p in rank._named.items()}
    rank._frozen, rank.ema, rank._moved = {}, None, moved
    rank.push("teachers", 0, True, 0)
    assert rank._teacher_heads[0].device == rank.device
