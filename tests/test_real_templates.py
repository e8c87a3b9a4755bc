"""Tokenizers and chat templates as their models have them, on real rows.

SDFT_REAL_TOKENIZERS names a folder that holds a folder for each, with tokenizer.json and tokenizer_config.json;
SDFT_REAL_DATA the rows.
"""

import json
import os
import shutil
from pathlib import Path

import pytest
from helpers import config_of

from sdft_dist.data import load_rows
from sdft_dist.prompts import encode_problems, load_tokenizer, teacher_messages

TOKENIZERS, DATA = os.environ.get("SDFT_REAL_TOKENIZERS"), os.environ.get("SDFT_REAL_DATA")
FOLDERS = sorted(path.parent for path in Path(TOKENIZERS or "/nonexistent").glob("*/tokenizer_config.json"))

pytestmark = pytest.mark.skipif(not (FOLDERS and DATA), reason="SDFT_REAL_TOKENIZERS or SDFT_REAL_DATA is not given")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
@pytest.mark.parametrize("rows", ["tooluse", "science"])
def test_both_views_are_what_transformers_makes_of_them(folder, rows, tmp_path):
    model = shutil.copytree(folder, tmp_path / "model")
    (model / "config.json").write_text("{}")
    config = config_of(model={"path": str(model), "max_length": 16_384}, learner={"tokens_per_microbatch": 16_384})
    tokenizer = load_tokenizer(config)
    others = [id for token, id in tokenizer.get_vocab().items() if token == "<end_of_turn>"]  # Gemma's settings have it
    (model / "generation_config.json").write_text(json.dumps({"eos_token_id": [tokenizer.eos_token_id, *others]}))
    encoded = encode_problems(config, tokenizer, load_rows(f"{DATA}/{rows}.jsonl"))
    assert len(encoded.kept) >= 70

    def ids(messages):
        return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True)["input_ids"])

    for row, problem in zip(encoded.kept, encoded.problems, strict=True):
        assert problem.prompt_ids.tolist() == ids(row.messages)
        assert problem.teacher_prompt_ids.tolist() == ids(teacher_messages(row, config.prompt.template))
        *text, end = problem.demonstration_ids.tolist()
        assert tokenizer.decode(text) == row.demonstration
        answered = tokenizer.apply_chat_template([*row.messages, {"role": "assistant", "content": "?"}])["input_ids"]
        assert end in answered[-3:], "the template ends the turn with another"
