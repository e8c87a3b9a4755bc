"""A checkpoint as a Hugging Face folder: all that the base has, and no weights that were never kept."""

import hashlib

import pytest
import torch
from helpers import config_of, tiny_model
from safetensors.torch import load_file, save_file

from sdft_dist.cli import main
from sdft_dist.commits import Commits
from sdft_dist.errors import ConfigError, UserError
from sdft_dist.export import export, export_adapter
from sdft_dist.fingerprint import fingerprint, refuse_another_base
from sdft_dist.recipe import dump_config, load_config
from sdft_dist.rundir import RunDir
from sdft_dist.train import _export
from sdft_dist.types import ShardFile


class Saver:
    """One rank that saves `tensors` as fragments of whole parameters."""

    def __init__(self, tensors):
        self.tensors = {f"{kind}|{name}|0": t.float().flatten() for (kind, name), t in tensors.items()}

    def state_bytes(self):
        return 0

    def start_saving(self, folder):
        self.path = folder / "rank-000.safetensors"
        save_file(self.tensors, self.path)

    def finish_saving(self, *, wait):
        content = self.path.read_bytes()
        return [ShardFile(name=self.path.name, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())]


def finished_run(folder, tensors, **sections):
    """The directory of a run that has saved `tensors` after one step."""
    run = RunDir(folder / "run")
    run.path.mkdir()
    config = config_of(run_dir=str(run.path), **sections)
    (run.path / "config.yaml").write_text(dump_config(config))
    facts = {"fingerprint": fingerprint(config, [])}
    store, saver = Commits(run.path / "checkpoints", facts=facts), Saver(tensors)
    store.start(saver, 1)
    store.finish(saver, wait=True)
    return run


@pytest.mark.parametrize("kind", ["base", "live"])
@pytest.mark.parametrize(("rank", "more"), [(0, []), (4, []), (4, ["--adapter"])])
def test_an_average_that_was_not_kept_is_not_exported(tmp_path, capsys, kind, rank, more):
    name = "model.layers.0.self_attn.q_proj" + (".lora_A.weight" if rank else ".weight")
    tensors, model = {("master", name): torch.zeros(4, 64)}, {"path": "m", "lora": {"rank": rank}}
    run = finished_run(tmp_path, tensors, model=model, teacher={"kind": kind})
    out = tmp_path / "out"
    assert main(["ckpt", "export", str(run.path), "--weights", "ema", "--out", str(out), *more]) == 2
    assert f"--weights ema: the run kept no average (teacher.kind={kind})" in capsys.readouterr().err
    assert not out.exists()


def test_what_a_model_keeps_besides_its_parameters_is_exported_too(tmp_path):
    """GLM-4 MoE corrects its router's scores by a buffer, which no optimizer moves and every engine reads."""
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    base = tiny_model(tmp_path / "base")  # for the tokenizer
    settings = Glm4MoeConfig(
        vocab_size=102, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, n_routed_experts=4, num_experts_per_tok=2,
        n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, eos_token_id=98, pad_token_id=97,
    )  # fmt: skip
    lm = Glm4MoeForCausalLM(settings)
    (correction,) = (b for name, b in lm.named_buffers() if name.endswith("e_score_correction_bias"))
    correction.copy_(torch.arange(4.0) + 1)
    lm.save_pretrained(base)
    with torch.no_grad():
        trained = {("master", name): p + 1 for name, p in lm.named_parameters()}
    out = export(finished_run(tmp_path, trained, model={"path": str(base)}), tmp_path / "out")
    (found,) = (t for name, t in load_file(out / "model.safetensors").items() if name.endswith("correction_bias"))
    assert found.tolist() == [1, 2, 3, 4]
    again = dict(Glm4MoeForCausalLM.from_pretrained(out).named_parameters())
    assert all(torch.equal(again[name], tensor) for (_, name), tensor in trained.items())


def saved_weights(folder):
    """Of a model folder, as a run with all weights saves them."""
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(folder)
    return {("master", name): param.detach() for name, param in lm.named_parameters()}


def test_adapters_are_not_merged_into_another_base(tmp_path):
    base, name = tiny_model(tmp_path / "base"), "model.layers.0.self_attn.q_proj"
    halves = {("master", f"{name}.lora_A.default.weight"): torch.ones(4, 64)}
    halves["master", f"{name}.lora_B.default.weight"] = torch.ones(128, 4)
    run = finished_run(tmp_path, halves, model={"path": str(base), "lora": {"rank": 4}})
    export(run, tmp_path / "first")
    tiny_model(base, seed=1)
    with pytest.raises(
        ConfigError, match=r"^model\.path: .*base: is not the model .*: another weights; put that one back"
    ):
        export(run, tmp_path / "second")
    assert not (tmp_path / "second").exists()
    export_adapter(run, tmp_path / "adapter")  # holds nothing of the base
    tiny_model(base)
    export(run, tmp_path / "third")
    first, third = (load_file(tmp_path / out / "model.safetensors") for out in ("first", "third"))
    assert all(torch.equal(first[name], third[name]) for name in first)


def test_all_weights_are_exported_whatever_the_bases_are_but_not_into_another_shape(tmp_path):
    base = tiny_model(tmp_path / "base")
    saved = saved_weights(base)
    run = finished_run(tmp_path, saved, model={"path": str(base)})
    tiny_model(base, seed=1)
    export(run, tmp_path / "out")
    found = saved_weights(tmp_path / "out")
    assert all(torch.equal(found[key], tensor) for key, tensor in saved.items())
    tiny_model(base, intermediate_size=48)
    with pytest.raises(ConfigError, match=r"another config\.json; put that one back"):
        export(run, tmp_path / "smaller")


def test_a_finished_run_that_is_resumed_leaves_its_model_alone_unless_it_would_be_another(tmp_path):
    base = tiny_model(tmp_path / "base")
    run = finished_run(tmp_path, saved_weights(base), model={"path": str(base)})
    config, model = load_config(run.path / "config.yaml"), run.path / "model"

    def inode(config):
        (run.path / "config.yaml").write_text(dump_config(config))  # as a run does that begins
        _export(config, run, None)
        return model.stat().st_ino

    first = inode(config)
    assert inode(config) == first, "who reads it would lose it"
    other = config.changed(eval={"sets": {"new": "f"}})
    assert inode(other) != first
    (model / "README.md").unlink()
    inode(other)
    assert (model / "README.md").is_file()


def test_a_saved_parameter_that_is_larger_than_the_models_is_no_part_of_it(tmp_path, monkeypatch):
    """Of a checkpoint whose version noted nothing of the model."""
    base = tiny_model(tmp_path / "base")
    saved = saved_weights(base)
    monkeypatch.setattr("test_export.fingerprint", lambda config, problems: {"data (token ids)": "f00d"})
    run = finished_run(tmp_path, saved, model={"path": str(base)})
    tiny_model(base, intermediate_size=48)
    with pytest.raises(
        UserError, match=r"master of .*gate_proj.* has 6144 elements, expected 3072 by model.path: give"
    ):
        export(run, tmp_path / "out")


def test_another_commit_of_the_hub_is_told(monkeypatch):
    config = config_of(model={"path": "org/model", "lora": {"rank": 4}})
    monkeypatch.setattr("sdft_dist.fingerprint._identity", lambda path, revision: {"hub commit": "b" * 40})
    before = {"model (hub commit)": "a" * 40}
    with pytest.raises(ConfigError, match=r"another hub commit; give model\.revision: a{40} in the run's config\.yaml"):
        refuse_another_base(config, before)
    for known in ({}, {"model (hub commit)": None}, {"model (hub commit)": "b" * 40}):
        refuse_another_base(config, known)
