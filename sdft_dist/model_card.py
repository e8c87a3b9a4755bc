"""The README of an exported model: what it was trained on, how, and what it scored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdft_dist import __version__
from sdft_dist.config import Config
from sdft_dist.evaluate import accuracy, interval
from sdft_dist.recipe import dump_config
from sdft_dist.records import may_be_hub_id
from sdft_dist.rundir import RunDir

METHODS = {
    "sdft": "self-distillation fine-tuning (SDFT, [arXiv 2601.19897](https://arxiv.org/abs/2601.19897)): at every "
    "token of its own completions, the model learned to predict what it predicts when it is shown the demonstration",
    "sft": "supervised fine-tuning on the demonstrations",
    "dft": "dynamic fine-tuning ([arXiv 2508.05629](https://arxiv.org/abs/2508.05629)) on the demonstrations",
}


def model_card(rundir: RunDir, config: Config, manifest: dict[str, Any], weights: str) -> str:
    """Markdown for the weights ("student" or "ema") of the checkpoint with that manifest."""
    step, digest = manifest["step"], manifest["fingerprint"]["data (token ids)"]
    base = config.model.path
    head = ["library_name: transformers", "tags: [sdft]"]
    if may_be_hub_id(base) and not Path(base).exists():
        head.insert(0, f"base_model: {base}")
    which = "its moving average" if weights == "ema" else "the student"
    return "\n".join(
        [
            "---",
            *head,
            "---",
            f"# {Path(base).name}, fine-tuned",
            f"By {METHODS[config.method]}. Base: `{base}`"
            + (f" at revision `{config.model.revision}`" if config.model.revision else "")
            + f". These are the weights of {which} after {step} optimizer steps, made with sdft-dist {__version__}.",
            *_variables(config),
            "",
            "## Scores",
            *_scores(rundir, config, step, weights),
            "",
            "## Data",
            f"`{config.data.train}`; SHA-256 of all token ids as they were trained on: `{digest}`.",
            "",
            "## Settings",
            "```yaml",
            dump_config(config).rstrip(),
            "```",
            "",
        ]
    )


def _variables(config: Config) -> list[str]:
    """How to prompt it as it was trained, where the chat template does not do that by itself."""
    given = json.dumps(config.prompt.chat_template_kwargs)
    if given == "{}":
        return []
    text = f"Its prompts had the chat template's variables `{given}`: give them too when it is used"
    return ["", f"{text}, as with `vllm serve --default-chat-template-kwargs '{given}'`."]


def _scores(rundir: RunDir, config: Config, step: int, weights: str) -> list[str]:
    judged = rundir.evaluation(step)
    if weights != "student" or not judged:
        return ["None were measured for these weights."]
    lines = [
        f"Greedy, at most {config.evaluation_limit[1]} tokens, judged by `{config.eval.scorer}`; 95% "
        "intervals by Wilson's score.",
        "",
        "| set | accuracy | 95% interval | rows |",
        "|---|---|---|---|",
    ]
    for name, rows in judged.items():
        low, high = interval(rows)
        spread = f"{100 * low:.1f} – {100 * high:.1f}%"
        lines.append(f"| {name} | {100 * accuracy(rows):.1f}% | {spread} | {len(rows)} |")
    return lines
