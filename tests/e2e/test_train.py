"""Whole runs: the same seed gives the same losses, real rows are learned, and a run's export loads."""

import json
import os
import re
from pathlib import Path

import pytest
import yaml
from helpers import config_of, tiny_model, write_jsonl
from processes import ended, lab_config, nothing_left, start

from sdft_dist.errors import UserError
from sdft_dist.evaluate import Judged
from sdft_dist.export import export
from sdft_dist.files import read_jsonl
from sdft_dist.lab import world
from sdft_dist.runlog import read_metrics
from sdft_dist.train import run

REAL = os.environ.get("SDFT_REAL_DATA")
SAMPLING = {"temperature": 0.6, "top_p": 0.9}  # without do_sample: transformers loads it, and refuses to save it
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def losses(folder):
    return [m["loss"] for m in read_metrics(folder, "train")]


def test_the_same_seed_gives_the_same_losses_and_the_export_loads(ray_cluster, tmp_path):
    """One run here and one by the command line in a process of its own, where weights travel another way."""
    row = world.rows("t35", "a", 8, -1)[0]._asdict()
    sets = {"new": str(write_jsonl(tmp_path / "eval.jsonl", [row]))}
    evaluation = {"every": 2, "sets": sets, "scorer": "sdft_dist.lab.world:score", "samples": 2}
    config = lab_config(tmp_path, eval=evaluation)
    rundir = run(config)
    other = config.changed(run_dir=str(tmp_path / "other"), cluster={"push_transport": "ipc"})
    process, mark = start(other, tmp_path)
    output = ended(process)
    assert re.search(r"Last evaluation: new \d+\.\d% \(step 4\)\nTrained model: ", output)
    first, second = (losses(tmp_path / name) for name in ("run", "other"))
    assert first == second
    assert len(set(first)) == 4
    assert nothing_left(mark)
    assert [m["step"] for m in read_metrics(rundir.path, "eval")] == [0, 2, 4]
    assert all({"new_pass@1", "new_pass@2"} <= m.keys() for m in read_metrics(rundir.path, "eval"))
    (judged,) = (rundir.path / "eval" / "step-000004.jsonl").read_text().splitlines()
    assert json.loads(judged).keys() == {"set", "row", *Judged._fields}
    written = {step: read_jsonl(path) for step, path in rundir.files_of_steps("samples")}
    assert list(written) == [1, 2, 4]
    trained = [line["demonstration"] for line in read_jsonl(Path(config.data.train))]
    assert all(sample["demonstration"] in trained for sample in written[4])
    assert all(sample["prompt"].startswith("t35") and sample["completion"] for sample in written[4])
    assert yaml.safe_load((rundir.path / "config.yaml").read_text())["steps"] == 4
    assert list((rundir.path / "events").iterdir())

    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = AutoModelForCausalLM.from_pretrained(rundir.path / "model")
    assert "self-distillation" in (rundir.path / "model" / "README.md").read_text()
    assert AutoTokenizer.from_pretrained(rundir.path / "model").chat_template
    assert lm.generation_config.eos_token_id == 98
    ema = AutoModelForCausalLM.from_pretrained(export(rundir, tmp_path / "ema", weights="ema"))
    assert (lm.model.norm.weight - ema.model.norm.weight).abs().max() > 0
    with pytest.raises(UserError, match="already in use"):
        run(config)
    with pytest.raises(UserError, match="already in use"):
        export(rundir, tmp_path / "ema")


@pytest.fixture(scope="module")
def real_model(tmp_path_factory):
    """A small random Qwen3 and a byte-level tokenizer trained on the real rows."""
    if not REAL:
        pytest.skip("SDFT_REAL_DATA names no folder with real rows")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator((line for p in Path(REAL).glob("*.jsonl") for line in p.open()), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    folder = tmp_path_factory.mktemp("real")
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": 4096}
    tiny_model(folder, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, **sizes)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": tokenizer.eos_token_id} | SAMPLING))
    return folder


@pytest.mark.parametrize(
    ("name", "stage", "staleness"),
    [
        ("tooluse", 3, 0),
        ("science", 2, 2),
        pytest.param("tooluse", 2, 0, marks=pytest.mark.slow),
        pytest.param("science", 3, 2, marks=pytest.mark.slow),
    ],
)
def test_real_rows_with_two_learner_ranks(ray_cluster, real_model, tmp_path, name, stage, staleness):
    config = config_of(
        run_dir=str(tmp_path / "run"),
        steps=20,
        model={"path": str(real_model), "max_length": 3072},
        data={"train": f"{REAL}/{name}.jsonl"},
        rollout={"prompts_per_step": 4, "max_completion_tokens": 16, "max_staleness": staleness},
        teacher={"kind": "base"},
        optim={"learning_rate": 5e-4, "schedule": "constant", "warmup_steps": 0},
        learner={"ranks": 2, "zero_stage": stage, "tokens_per_microbatch": 3072},
        cluster={"timeout_s": 200},
    )
    run(config)
    found = losses(tmp_path / "run")
    print(json.dumps({"rows": name, "zero_stage": stage, "losses": [round(x, 4) for x in found]}))
    assert len(found) == 20
    assert max(m["staleness_max"] for m in read_metrics(tmp_path / "run", "train")) <= staleness
    assert sum(found[-5:]) < 0.9 * sum(found[:5])
    kept = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert kept.items() >= SAMPLING.items(), "the base's own settings for generation are exported"
