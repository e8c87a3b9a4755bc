"""TRL's SDFTTrainer as a contestant of `sdft bench`: same base, rows, batch and objective.

From its own package, which is no dependency of this project; generation is transformers', as TRL does it
without a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft_dist.config import Config
from sdft_dist.data import Row
from sdft_dist.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Trl:
    """Full-vocabulary forward KL to a frozen base, as TRL computes it."""

    config: Config
    tokenizer: Any
    rows: Sequence[Row]
    fixed: bool
    folder: Path
    name: str = "trl"

    def __call__(self, num_steps: int, after_step: Callable[[int], None]) -> None:
        try:
            from datasets import Dataset
            from transformers import TrainerCallback
            from trl.experimental.sdft import SDFTConfig, SDFTTrainer
        except ImportError as e:
            raise UserError(f"--peer trl: install TRL first (pip install trl): {e}") from e

        class Turn(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                after_step(0)

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                after_step(state.global_step)

        config, limit = self.config, self.config.rollout.max_completion_tokens
        batch = config.rollout.prompts_per_step
        rows = [{"prompt": list(row.messages), "privileged_context": row.demonstration} for row in self.rows]
        args = SDFTConfig(
            output_dir=str(self.folder),
            per_device_train_batch_size=batch,
            num_generations=1,
            max_steps=num_steps,
            learning_rate=config.optim.learning_rate,
            lr_scheduler_type="constant",
            max_completion_length=limit,
            max_prompt_length=config.model.max_length,
            generation_kwargs={"min_new_tokens": limit} if self.fixed else None,
            teacher_prompt_template=config.prompt.template.replace("{demonstration}", "{privileged_context}"),
            teacher_model_kind="base",
            distillation_mode="full_logits",
            distillation_alpha=0.0,
            save_strategy="no",
            report_to="none",
            logging_steps=10**9,
            disable_tqdm=True,
            bf16=False,
            gradient_checkpointing=False,
            seed=config.seed,
        )
        trainer = SDFTTrainer(
            model=config.model.path,
            args=args,
            train_dataset=Dataset.from_list(rows),
            processing_class=self.tokenizer,
            callbacks=[Turn()],
        )
        trainer.train()
