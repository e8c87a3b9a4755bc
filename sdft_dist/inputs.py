"""What actors and loop need of a recipe's model folder and rows: tokenizer, problems, end tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sdft_dist.config import Config
from sdft_dist.data import Row, load_training_rows
from sdft_dist.problems import ProblemSet
from sdft_dist.prompts import encode_problems, load_tokenizer, stop_ids, vocab_size


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """`problems` are the rows that fit; `dropped` and `truncated` have a line for each that did not."""

    tokenizer: Any
    rows: list[Row]
    problems: ProblemSet
    kept: list[Row]  # those of `problems`, in their order
    dropped: list[str]
    truncated: list[str]
    stop_ids: list[int]  # tokens that end a completion

    @property
    def vocab_size(self) -> int:
        """Token ids that may be sampled; a model's head may have more, which are padding."""
        return vocab_size(self.tokenizer)


def read_inputs(config: Config) -> Inputs:
    """Raises UserError where the model's folder or the rows are wrong."""
    rows = load_training_rows(config.data, config.method)  # first: a hub that cannot be reached takes a minute
    tokenizer = load_tokenizer(config)
    encoded = encode_problems(config, tokenizer, rows)
    ends = stop_ids(tokenizer, config.model)
    return Inputs(tokenizer=tokenizer, rows=rows, stop_ids=ends, **encoded._asdict())
