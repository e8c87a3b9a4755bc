"""Whole runs beside TRL's SDFTTrainer, which others wrote from the same paper: given the completions that a run has
sampled, as its `samples/` tell them, it makes the same steps from the same rows."""

import pytest
import torch
from helpers import write_jsonl
from processes import lab_config

from sdft_dist.export import export
from sdft_dist.files import read_jsonl
from sdft_dist.lab import world
from sdft_dist.runlog import read_metrics
from sdft_dist.train import run

STEPS = 4
# Objectives in our words, and in TRL's.
CASES = {
    "paper": (
        {"loss": {"divergence": "forward_kl", "skip_first_tokens": 3}, "teacher": {"kind": "ema", "ema_rate": 0.05}},
        {
            "distillation_mode": "full_logits",
            "distillation_alpha": 0.0,
            "num_loss_tokens_to_skip": 3,
            "teacher_model_kind": "ema",
            "teacher_update_rate": 0.05,
        },
    ),
    "trl": (
        {
            "loss": {"support": "topk", "top_k": 10, "topk_from": "student", "tail": False, "divergence": "jsd"},
            "teacher": {"kind": "base"},
        },
        {"distillation_mode": "topk_logits", "distillation_topk": 10, "teacher_model_kind": "base"},
    ),
}


def trl(config, rows, completions, folder, **objective):
    """TRL's student and teacher after the steps, and their losses. In step i a prompt's completion is
    `completions[i][prompt]`, as text."""
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    tokenizer, optim, losses = AutoTokenizer.from_pretrained(config.model.path), config.optim, []

    class Trainer(SDFTTrainer):
        def _generate(self, prompt_ids):
            given = completions[self.state.global_step]
            texts = [given[tokenizer.decode(ids, skip_special_tokens=True)] for ids in prompt_ids]
            return prompt_ids, tokenizer(texts)["input_ids"]

        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    args = SDFTConfig(
        output_dir=str(folder),
        per_device_train_batch_size=len(rows),
        num_generations=1,
        max_steps=len(completions),
        learning_rate=optim.learning_rate,
        lr_scheduler_type="constant",
        adam_beta1=optim.betas[0],
        adam_beta2=optim.betas[1],
        max_grad_norm=optim.grad_clip,
        teacher_prompt_template=config.prompt.template.replace("{demonstration}", "{privileged_context}"),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **objective,
    )
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    shown = [row["demonstration"] for row in rows]
    trainer = Trainer(
        model=config.model.path,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": asked, "privileged_context": shown}),
        processing_class=tokenizer,
    )
    trainer.train()
    return trainer.model, trainer.teacher_model, losses


def assert_same_way(ours, theirs, base):
    """From the weights of `base` both have gone the same way, to a thousandth of its length."""
    before = base.state_dict()
    x, y = (
        torch.cat([(p - before[name]).detach().flatten() for name, p in lm.named_parameters()]) for lm in (ours, theirs)
    )
    print(f"way {y.norm():.4f}, apart {(x - y).norm():.1e}, of the way {(x - y).norm() / y.norm():.1e}")
    assert (x - y).norm() < 1e-3 * y.norm()


@pytest.mark.parametrize("case", CASES)
def test_trl_makes_the_same_steps(ray_cluster, tmp_path, case):
    pytest.importorskip("trl.experimental.sdft")
    from transformers import AutoModelForCausalLM

    load = AutoModelForCausalLM.from_pretrained
    ours, theirs = CASES[case]
    rows = [row._asdict() for row in world.rows("t35", "a", 8, seed=0)]  # every step trains on all of them
    path = str(write_jsonl(tmp_path / "eight.jsonl", rows))
    config = lab_config(tmp_path, steps=STEPS, data={"train": path}, checkpoint={"every": 1}, **ours)
    rundir = run(config)
    samples = [read_jsonl(path) for _, path in rundir.files_of_steps("samples")]
    completions = [{sample["prompt"]: sample["completion"] for sample in step} for step in samples]
    assert [len(step) for step in completions] == [len(rows)] * STEPS
    student, teacher, losses = trl(config, rows, completions, tmp_path / "trl", **theirs)
    assert [m["loss"] for m in read_metrics(rundir.path, "train")] == pytest.approx(losses, rel=1e-5)
    base = load(config.model.path)
    assert_same_way(load(rundir.path / "model"), student, base)
    if config.teacher.kind == "ema":
        assert_same_way(load(export(rundir, tmp_path / "ema", weights="ema")), teacher, base)
