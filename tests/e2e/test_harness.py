"""lm-evaluation-harness on this project's generators, beside the harness's own Hugging Face backend."""

import json

import pytest
from helpers import config_of, write_jsonl

from sdft_dist.errors import UserError
from sdft_dist.harness.harness import harness, save
from sdft_dist.lab import world
from sdft_dist.lab.base import shipped_base

CHOICE = """
task: lab_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}]
metadata: {version: 1.0}
"""
ANSWER = """
task: lab_answer
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: [" done"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with task files over lab questions, chat template already applied."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for i, row in enumerate(row for skill in world.OLD_SKILLS for row in world.rows(skill, "b", 6, seed=3)):
        words = row.answer.split()
        choices = [" ".join(words), " ".join(reversed(words)), " ".join(sorted(words)), "b0 b0 b0 b0 b0"]
        skill = row.prompt.split()[0]
        choices = [f" {skill} answer {choice} done" for choice in choices]
        question = f"<|user|> {row.prompt} <|end|> <|assistant|>"
        answer = f"{skill} answer {row.answer}"
        rows.append({"question": question, "choices": choices, "label": 0, "answer": answer, "row": i})
    file = write_jsonl(folder / "rows.jsonl", rows)
    for name, text in (("choice", CHOICE), ("answer", ANSWER)):
        (folder / f"{name}.yaml").write_text(text.replace("FILE", str(file)))
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return config_of(
        run_dir=str(tmp_path_factory.mktemp("harness") / "run"),
        model={"path": str(shipped_base()), "max_length": 64},
        rollout={"max_completion_tokens": 16},
    )


@pytest.fixture(scope="module")
def found(config, tasks, ray_cluster):
    return harness(config, ["lab_choice", "lab_answer"], include=tasks)


def test_loglikelihoods_are_those_of_the_harness_own_backend(found, tasks):
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = evaluator.simple_evaluate(
        model=HFLM(pretrained=str(shipped_base()), device="cpu", dtype="float32", batch_size=8, max_length=64),
        tasks=["lab_choice", "lab_answer"],
        task_manager=TaskManager(include_path=[str(tasks)], include_defaults=False),
        num_fewshot=0,
    )
    mine, other = (
        [response for row in results["samples"]["lab_choice"] for (response,) in row["resps"]]
        for results in (found, theirs)
    )
    assert len(mine) == 24 * 4
    gaps = [abs(float(ours) - float(reference)) for (ours, _), (reference, _) in zip(mine, other, strict=True)]
    print(f"log-likelihoods of {len(mine)} continuations: largest difference {max(gaps):.1e} nats")
    assert max(gaps) < 1e-3
    assert [str(greedy) for _, greedy in mine] == [str(greedy) for _, greedy in other]
    assert found["results"]["lab_choice"]["acc"] == theirs["results"]["lab_choice"]["acc,none"]
    answers, others = ([row["resps"] for row in r["samples"]["lab_answer"]] for r in (found, theirs))
    assert answers == others
    assert found["results"]["lab_answer"]["exact_match"] == theirs["results"]["lab_answer"]["exact_match,none"]


def test_the_labs_model_knows_its_skills_and_settings_stand_beside_the_scores(found, tmp_path):
    assert found["results"]["lab_choice"]["acc"] > 0.9
    save(found, tmp_path)
    saved = json.loads((tmp_path / "results.json").read_text())
    assert saved["versions"] == {"lab_choice": 1.0, "lab_answer": 1.0}
    assert saved["settings"] == {"num_fewshot": 0, "limit": None, "chat_template": False, "greedy": True}
    assert len((tmp_path / "lab_choice.jsonl").read_text().splitlines()) == 24


def test_code_is_run_only_where_it_is_allowed(config):
    with pytest.raises(UserError, match="--run-code"):
        harness(config, ["humaneval_sandboxed"])


def test_an_unknown_task_is_named(config):
    with pytest.raises(UserError, match="the harness has no helaswag"):
        harness(config, ["helaswag"])
