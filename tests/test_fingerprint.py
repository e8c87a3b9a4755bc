"""What a resumed run must share with the one that saved: settings, rows, and the model itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import config_of
from safetensors.torch import load_file, save_file

from sdft_dist.errors import ConfigError
from sdft_dist.fingerprint import fingerprint, refuse_changes
from sdft_dist.types import Problem


def of(folder, **sections):
    return fingerprint(config_of(model={"path": str(folder)}, **sections), [])


def test_rows_are_told_apart_by_every_token_and_by_where_a_text_ends(model):
    def digest(*parts):
        prompt, shown, said = (np.array(ids, dtype=np.int32) for ids in parts)
        problem = Problem(prompt_ids=prompt, teacher_prompt_ids=shown, demonstration_ids=said)
        return fingerprint(config_of(model={"path": str(model)}), [problem])["data (token ids)"]

    rows = [([1, 2], [3], [4]), ([1], [2, 3], [4]), ([1, 2], [3], [5]), ([1, 2], [3, 4], []), ([2, 1], [3], [4])]
    assert len({digest(*row) for row in rows}) == len(rows)
    assert digest(*rows[0]) == digest(*rows[0])


def differing(folder, change, **sections):
    """The entries that `change` alters, of the model in `folder`."""
    before = of(folder, **sections)
    change(folder)
    after = of(folder, **sections)
    return {key for key in before | after if before.get(key) != after.get(key)}


def zero_weights(folder):
    """In the same names, types and shapes."""
    path = folder / "model.safetensors"
    save_file({name: tensor.zero_() for name, tensor in load_file(path).items()}, path, {"format": "pt"})


def zero_one(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.1.mlp.up_proj.weight"].zero_()
    save_file(tensors, path, {"format": "pt"})


def end_elsewhere(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [98, 5]}))


def sample_hotter(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.3}))


@pytest.mark.parametrize(
    ("change", "entries"),
    [
        (zero_weights, {"model (weights)"}),
        (zero_one, {"model (weights)"}),
        (end_elsewhere, {"model (end tokens)"}),
        (lambda folder: (folder / "generation_config.json").unlink(), {"model (end tokens)"}),
        (sample_hotter, set()),
        (lambda folder: (folder / "README.md").write_text("words"), set()),
    ],
)
def test_what_makes_it_another_model(model, tmp_path, change, entries):
    folder = shutil.copytree(model, tmp_path / "model")
    assert differing(folder, change) == entries


def test_a_frozen_teacher_is_told_from_another_one(model, tmp_path):
    anchor = shutil.copytree(model, tmp_path / "anchor")
    teacher = {"reanchor": False, "anchor": str(anchor)}
    frozen, moving = ({"kind": kind, **teacher} for kind in ("base", "ema"))
    before = of(model, teacher=frozen), of(model, teacher=moving)
    zero_weights(anchor)
    after = of(model, teacher=frozen), of(model, teacher=moving)
    assert {key for key in after[0] if after[0][key] != before[0][key]} == {"teacher.anchor (weights)"}
    assert after[1] == before[1], "an average starts there and needs it no more"


def test_a_large_file_is_sampled_over_its_whole_length(tmp_path):
    """64 MiB of which 1 MiB is changed; read is a thirtieth."""
    path, place = tmp_path / "model.safetensors", 40 << 20
    path.write_bytes(bytes(64 << 20))
    before = of(tmp_path)
    with path.open("r+b") as file:
        file.seek(place)
        file.write(b"\1" * (1 << 20))
    assert of(tmp_path)["model (weights)"] != before["model (weights)"]


def test_a_hub_id_is_told_by_its_commit(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert of("org/model")["model (hub commit)"] is None
    repo = tmp_path / "models--org--model"
    for commit in ("a" * 40, "b" * 40):
        (repo / "snapshots" / commit).mkdir(parents=True)
        (repo / "snapshots" / commit / "tokenizer_config.json").write_text("{}")
        (repo / "refs").mkdir(exist_ok=True)
        (repo / "refs" / "main").write_text(commit)
        assert of("org/model")["model (hub commit)"] == commit


def test_a_checkpoint_from_before_there_was_such_an_entry_is_refused_with_it(model):
    now = of(model)
    before = {key: value for key, value in now.items() if key != "model (weights)"}
    with pytest.raises(ConfigError, match=r"--allow-changes:\nmodel \(weights\): was not noted, is '[0-9a-f]{64}'$"):
        refuse_changes(before, now, Path("checkpoint"))
