"""The harness's view of the generators, with engines that are scripted."""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers import config_of

from sdft_dist.errors import UserError
from sdft_dist.harness import harness
from sdft_dist.harness.harness import OWN_TASKS, HarnessModel
from sdft_dist.lab.tokenizer import build_tokenizer

TOKENIZER = build_tokenizer()
ENDS = [TOKENIZER.eos_token_id]


class Engines:
    """Goes on with the words of `text`, whatever the prompt; remembers what it was asked."""

    def __init__(self, text="", prompt=0):
        self.ids, self.prompt, self.asked = TOKENIZER(text)["input_ids"] if text else [], prompt, []

    def complete(self, prompts, max_tokens):
        self.asked.append(max_tokens)
        done = [len(p) - self.prompt for p in prompts]
        return [np.asarray(self.ids[n : n + max_tokens], dtype=np.int32) for n in done]

    def loglikelihoods(self, sequences, starts):
        self.sequences, self.starts = sequences, starts
        return [(-float(len(s) - n), True) for s, n in zip(sequences, starts, strict=True)]


def request(*args):
    return SimpleNamespace(args=args)


def test_a_completion_ends_before_the_first_stop_string():
    model = HarnessModel(Engines("rev answer a1 a2 done so a3", prompt=2), TOKENIZER, 512, ENDS)
    assert model.generate_until([request("rev a1", {"until": ["done", "so"], "max_gen_toks": 20})]) == [
        "rev answer a1 a2 "
    ]


def test_a_long_completion_is_asked_for_in_parts_until_it_ends():
    engines = Engines(" ".join(["a1"] * 100), prompt=2)
    model = HarnessModel(engines, TOKENIZER, 512, ENDS)
    (text,) = model.generate_until([request("rev a1", {"until": [], "max_gen_toks": 200})])
    assert len(text.split()) == 100
    assert engines.asked == [32, 64, 128]


@pytest.mark.parametrize("at", [31, 32, 33])
def test_a_completion_ends_at_any_of_the_models_end_tokens(at):
    """One of its generation settings besides the tokenizer's own, before, at and behind the border of two parts."""
    engines = Engines(" ".join(["a1"] * 100), prompt=2)
    engines.ids[at - 1] = end = TOKENIZER.convert_tokens_to_ids("done")
    complete = engines.complete

    def stopping(prompts, max_tokens):
        """As vLLM: what ends a completion is its last token."""
        return [ids[: [*ids, end].index(end) + 1] for ids in complete(prompts, max_tokens)]

    engines.complete = stopping
    model = HarnessModel(engines, TOKENIZER, 512, [*ENDS, end])
    (text,) = model.generate_until([request("rev a1", {"until": [], "max_gen_toks": 200})])
    assert text.split() == ["a1"] * (at - 1) + ["done"]


def test_a_completion_has_no_more_tokens_than_the_task_allows():
    model = HarnessModel(Engines(" ".join(["a1"] * 100), prompt=2), TOKENIZER, 512, ENDS)
    (text,) = model.generate_until([request("rev a1", {"until": [], "max_gen_toks": 40})])
    assert len(text.split()) == 40


def test_a_task_that_samples_is_refused():
    model = HarnessModel(Engines(), TOKENIZER, 512, ENDS)
    with pytest.raises(UserError, match="sampling"):
        model.generate_until([request("rev", {"do_sample": True, "temperature": 0.8})])


def test_a_context_without_room_for_the_answer_is_refused():
    model = HarnessModel(Engines(), TOKENIZER, 16, ENDS)
    with pytest.raises(UserError, match=r"model.max_length: 16"):
        model.generate_until([request("rev", {"max_gen_toks": 16})])


def test_only_the_continuation_is_scored():
    engines = Engines()
    model = HarnessModel(engines, TOKENIZER, 512, ENDS)
    assert model.loglikelihood([request("rev a1 a2", " a2 a1")]) == [(-2.0, True)]
    assert engines.starts == [3]


def test_what_does_not_fit_loses_its_beginning():
    engines = Engines()
    model = HarnessModel(engines, TOKENIZER, 8, ENDS)
    assert model.loglikelihood([request(" ".join(["a1"] * 20), " a2 a3")]) == [(-2.0, True)]
    assert len(engines.sequences[0]) == 7


def test_a_rolling_text_is_scored_once_in_all_its_tokens():
    model = HarnessModel(Engines(), TOKENIZER, 10, ENDS)
    assert model.loglikelihood_rolling([request(" ".join(["a1"] * 21))]) == [-21.0]


def test_another_version_of_a_task_is_refused_before_an_engine_starts(monkeypatch):
    ifeval = SimpleNamespace(cfg={"task": "ifeval", "metadata": {"version": 5.0}})
    monkeypatch.setattr(harness, "_manager", lambda names, include: SimpleNamespace(task_index={"ifeval": ifeval}))
    monkeypatch.setattr(harness, "load_tokenizer", lambda config: pytest.fail("went on"))
    with pytest.raises(UserError, match=r"--tasks: ifeval: the installed harness has version 5.0, .* are of 4.0: "):
        harness.harness(config_of(), ["ifeval"])


def test_humaneval_scores_a_right_and_a_wrong_program():
    import importlib.util

    spec = importlib.util.spec_from_file_location("running", OWN_TASKS / "running.py")
    running = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(running)
    doc = {"prompt": "def add(a, b):\n", "test": "def check(f):\n    assert f(1, 2) == 3", "entry_point": "add"}
    assert running.process_results(doc, ["    return a + b"]) == {"pass@1": 1.0}
    assert running.process_results(doc, ["    return a - b"]) == {"pass@1": 0.0}
