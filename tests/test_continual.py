import json
from pathlib import Path

import pytest
from helpers import write_jsonl

from sdft_dist.config import dump_config, load_config
from sdft_dist.continual import MethodPlan, continual, load_plan, stages, write_mixtures
from sdft_dist.continual_results import markdown, write_results
from sdft_dist.data import load_rows
from sdft_dist.errors import ConfigError, DataError, UserError
from sdft_dist.evaluate import Judged
from sdft_dist.lab.base import shipped_base
from sdft_dist.lab.teaching import write_sequence
from sdft_dist.rundir import RunDir


@pytest.fixture
def plan(tmp_path):
    return load_plan(write_sequence(tmp_path, shipped_base()))


def test_the_labs_plan_is_three_tasks_for_three_methods_and_three_seeds(plan):
    work = stages(plan)
    assert len(work) == 27
    assert [s.task for s in work[:3]] == ["t35", "t36", "t37"]
    assert {s.config.method for s in work} == {"sdft", "sft", "dft"}


def test_every_stage_starts_from_the_model_of_the_one_before(plan):
    first, second, third = stages(plan)[:3]
    assert first.config.model.path == load_config(plan.recipe).model.path
    assert second.config.model.path == str(first.folder / "model")
    assert third.config.model.path == str(second.folder / "model")
    assert {s.config.seed for s in (first, second, third)} == {0}


def test_every_stage_is_evaluated_on_all_tasks_and_all_prior_skills(plan):
    for stage in stages(plan):
        assert list(stage.config.eval.sets) == ["t35", "t36", "t37", "rev", "rotl", "succ", "swap"]
        assert stage.config.eval.every


def test_the_teacher_starts_from_the_stages_start_or_from_the_first(plan):
    base = load_config(plan.recipe).model.path
    assert all(s.config.teacher.reanchor for s in stages(plan))
    methods = {"first": MethodPlan(set={"teacher.reanchor": False})}
    for stage in stages(plan.model_copy(update={"methods": methods})):
        assert (stage.config.teacher.reanchor, stage.config.teacher.anchor) == (False, base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tasks: {}", "tasks"),
        ("methods: {sdft: {set: {optim.learning_rat: 1}}}", "did you mean optim.learning_rate"),
        ("methods: {sdft: {rehearse: 1}}", "methods.sdft.rehearse: got 1"),
        ("methods: {../x: {}}", "letters, digits"),
        ("prior: {t35: file}", "prior.t35: is a task's name too"),
        ("task: {}", "did you mean tasks"),
        ("tasks: {a: {train: x, evaluate: y}}", "did you mean tasks.a.eval"),
    ],
)
def test_a_wrong_plan_is_refused_with_the_field(tmp_path, change, message):
    path = write_sequence(tmp_path, shipped_base())
    path.write_text(f"{path.read_text()}\n{change}\n")
    with pytest.raises(ConfigError, match=message):
        stages(load_plan(path))


def test_a_stage_that_was_run_with_other_settings_is_refused_before_anything_starts(plan):
    stage = stages(plan)[-1]
    stage.folder.mkdir(parents=True)
    other = stage.config.model_copy(update={"steps": 7})
    (stage.folder / "config.yaml").write_text(dump_config(other))
    with pytest.raises(UserError, match="3-t37: was run with another steps"):
        continual(plan)


def test_a_mistake_in_the_last_file_is_found_before_anything_starts(plan):
    path = Path(plan.tasks["t37"].eval)
    path.write_text(path.read_text() + '{"prompt": 3, "answer": "x"}\n')
    with pytest.raises(DataError, match=r"eval-new.jsonl:151: prompt"):
        continual(plan)
    assert not Path(plan.out).exists()


def test_a_stage_that_rehearses_trains_on_a_share_of_earlier_rows_evenly(plan):
    plan = plan.model_copy(update={"methods": {"sft": MethodPlan(rehearse=0.25), "sdft": MethodPlan()}})
    write_mixtures(plan)
    sft, sdft = stages(plan)[:3], stages(plan)[3:6]
    files = [Path(stage.config.data.train) for stage in sft]
    assert files[0] == Path(plan.tasks["t35"].train), "nothing came before"
    assert [s.config.data.train for s in sdft] == [task.train for task in plan.tasks.values()]
    words = [row.messages[-1]["content"].split()[0] for row in load_rows(str(files[2]))]
    counts = {word: words.count(word) for word in set(words)}
    assert counts["t35"] == counts["t36"] == pytest.approx(0.125 * len(words), abs=2)
    assert counts["t37"] == len(load_rows(plan.tasks["t37"].train))
    text = files[2].read_text()
    write_mixtures(plan)
    assert files[2].read_text() == text


def finished(folder, stages, accuracies, config):
    """A run directory with evaluations before and after, of 10 rows a set."""
    run = RunDir(folder)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    records = []
    for step, shares in ((0, accuracies[0]), (4, accuracies[1])):
        rows = {name: [Judged("c", "a", i < round(10 * share)) for i in range(10)] for name, share in shares.items()}
        run.note_evaluation(step, rows)
        records.append({"kind": "eval", "step": step, **shares})
    write_jsonl(folder / "metrics.jsonl", records)


class Stage:
    def __init__(self, method, seed, folder):
        self.method, self.seed, self.folder = method, seed, folder


def test_results_of_two_methods_and_two_seeds(plan, tmp_path):
    points = {
        "sdft": [{"a": 0.0, "b": 0.0, "old": 1.0}, {"a": 1.0, "b": 0.0, "old": 1.0}, {"a": 0.9, "b": 1.0, "old": 0.9}],
        "sft": [{"a": 0.0, "b": 0.0, "old": 1.0}, {"a": 1.0, "b": 0.0, "old": 0.5}, {"a": 0.2, "b": 1.0, "old": 0.1}],
    }
    sequence = []
    config = stages(plan)[0].config
    for method, shares in points.items():
        for seed in (0, 1):
            for i in (0, 1):
                stage = Stage(method, seed, tmp_path / f"{method}{seed}" / str(i))
                finished(stage.folder, i, shares[i : i + 2], config)
                sequence.append(stage)
    found = write_results(tmp_path, ["a", "b"], ["old"], sequence)
    assert json.loads((tmp_path / "results.json").read_text()) == found
    assert found["methods"]["sft"]["right"] == [
        {"a": [0, 0], "b": [0, 0], "old": [10, 10]},
        {"a": [10, 10], "b": [0, 0], "old": [5, 5]},
        {"a": [2, 2], "b": [10, 10], "old": [1, 1]},
    ]
    assert found["methods"]["sft"]["measures"][1] == pytest.approx(
        {
            "average": 0.6,
            "forgetting": 0.8,
            "backward transfer": -0.8,
            "forward transfer": 0.0,
            "prior, start": 1.0,
            "prior, end": 0.1,
        }
    )
    text = markdown(found)
    assert "| sft | b | 20.0 (8.1 – 41.6; 20.0) |" in text
    assert (tmp_path / "table.md").read_text() == text
    assert {"curves.png", "normalised.png"} <= {path.name for path in Path(tmp_path).iterdir()}
