import hashlib
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict
from helpers import write_jsonl
from scipy.stats import binomtest

from sdft_dist.continual.results import _curve, _ends, markdown, questions, write_results
from sdft_dist.continual.stages import MethodPlan, continual, load_plan, stages, write_mixtures
from sdft_dist.data import load_rows, load_training_rows
from sdft_dist.errors import ConfigError, DataError, Diverged, UserError
from sdft_dist.evaluate import Judged
from sdft_dist.lab.base import shipped_base
from sdft_dist.lab.teaching import write_sequence
from sdft_dist.recipe import dump_config, load_config
from sdft_dist.report import charts
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
        ("seeds: [1, 0, 1]", "seeds: .* 1 is given 2 times"),
        ("methods: {sdft: {set: {eval.every: 0}}}", "eval.every: got 0 with methods.sdft and tasks.t35"),
        ("methods: {sdft: {set: {optim.learning_rat: 1}}}", "did you mean optim.learning_rate"),
        (
            "methods: {sdft: {set: {model.path: m}}}",
            "methods.sdft.set: model.path: is what the plan itself sets: the start",
        ),
        ("methods: {sdft: {set: {model: {path: m}}}}", "methods.sdft.set: model.path: is what the plan itself sets"),
        ("methods: {sdft: {set: {seed: 3}}}", "methods.sdft.set: seed: is what the plan itself sets: give `seeds`"),
        ("methods: {sdft: {set: {run_dir: r}}}", "methods.sdft.set: run_dir: is what the plan itself sets: .* `out`"),
        (
            "tasks: {a: {train: x, eval: y, set: {data.train: z}}}",
            "tasks.a.set: data.train: is what the plan itself sets",
        ),
        ("tasks: {a: {train: x, eval: y, set: {eval.sets.b: z}}}", "tasks.a.set: eval.sets.b: is what .* and `prior`"),
        ("methods: {sdft: {rehearse: 1}}", "methods.sdft.rehearse: got 1"),
        ("methods: {../x: {}}", "letters, digits"),
        ("prior: {prior: file}", "prior.prior: is what results call the mean of all prior sets: give it another"),
        ("tasks: {prior: {train: x, eval: y}}", "tasks.prior: is what results call the mean"),
        ("prior: {t35: file}", "prior.t35: is a task's name too"),
        ("task: {}", "did you mean tasks"),
        ("tasks: {a: {train: x, evaluate: y}}", "did you mean tasks.a.eval"),
    ],
)
def test_a_wrong_plan_is_refused_with_the_field(tmp_path, change, message):
    path = write_sequence(tmp_path, shipped_base())
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | yaml.safe_load(change), sort_keys=False))
    with pytest.raises(ConfigError, match=message):
        stages(load_plan(path))


def test_a_recipe_in_a_plans_place_is_told_as_such(tmp_path):
    with pytest.raises(ConfigError, match=r"recipe.yaml: is a recipe, expected a plan, which names it: recipe: \S+$"):
        load_plan(write_sequence(tmp_path, shipped_base()).with_name("recipe.yaml"))


@pytest.mark.parametrize(("before", "name"), [("  t36:", "tasks.t36"), ("  sft:", "methods.sft"), ("out:", "out")])
def test_a_name_that_is_given_twice_is_refused(tmp_path, before, name):
    path = write_sequence(tmp_path, shipped_base())
    line = next(line for line in path.read_text().splitlines() if line.startswith(before))
    path.write_text(path.read_text().replace(line, f"{line}\n{line}"))
    with pytest.raises(ConfigError, match=f"^{name}: is there more than once"):
        load_plan(path)


def test_a_stage_that_was_run_with_other_settings_is_refused_before_anything_starts(plan):
    stage = stages(plan)[-1]
    stage.folder.mkdir(parents=True)
    (stage.folder / "config.yaml").write_text(dump_config(stage.config.changed(steps=7)))
    with pytest.raises(UserError, match="3-t37: was run with another steps"):
        continual(plan)


def test_a_stage_may_go_on_with_another_cluster(plan):
    plan = plan.model_copy(update={"prior": {"old": "absent.jsonl"}})
    stage = stages(plan)[0]
    stage.folder.mkdir(parents=True)
    file = stage.folder / "config.yaml"
    file.write_text(dump_config(stage.config))
    file.write_text(dump_config(load_config(file, ["cluster.generators=2", "checkpoint.every=7", "trace=true"])))
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):  # of what is checked after the settings
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


def test_a_limit_is_of_the_tasks_own_rows_and_rehearsal_is_a_share_of_those(plan):
    methods = {"sft": MethodPlan(rehearse=0.5, set={"data.limit": 20}), "all": MethodPlan(rehearse=0.5)}
    plan = plan.model_copy(update={"methods": methods})
    write_mixtures(plan)
    first, _, third = (stage.config for stage in stages(plan)[:3])
    assert first.data.limit == 20
    rows = load_training_rows(third.data, "sft")
    words = [row.messages[-1]["content"].split()[0] for row in rows]
    assert {word: words.count(word) for word in words} == {"t37": 20, "t35": 10, "t36": 10}
    taught = [row.messages for row in load_training_rows(first.data, "sft")]
    assert all(row.messages in taught for row, word in zip(rows, words, strict=True) if word == "t35")
    assert len(load_training_rows(stages(plan)[5].config.data, "sft")) == 6400, "the other method has no limit"


def rehearsing(plan, folder, **numbers):
    """The plan with so many rows of each task, of which stages rehearse a half."""
    tasks = {}
    for word, number in numbers.items():
        rows = [{"prompt": f"{word} {i}", "demonstration": "d"} for i in range(number)]
        tasks[word] = plan.tasks[word].model_copy(update={"train": str(write_jsonl(folder / f"{word}.jsonl", rows))})
    return plan.model_copy(update={"tasks": tasks, "methods": {"sft": MethodPlan(rehearse=0.5)}})


def test_earlier_tasks_with_few_rows_are_rehearsed_as_often_as_the_share_needs(plan, tmp_path):
    """3 rows of the first task and 50 of the second make up half of the third stage's 90."""
    plan = rehearsing(plan, tmp_path, t35=3, t36=50, t37=45)
    write_mixtures(plan)
    path = Path(stages(plan)[2].config.data.train)
    prompts = [row.messages[-1]["content"] for row in load_rows(str(path))]
    assert len(prompts) == 45 + 2 * 23
    assert sorted(prompts.count(f"t35 {i}") for i in range(3)) == [7, 8, 8]
    assert [prompts.count(f"t36 {i}") for i in range(50)].count(1) == 23, "enough rows, none of them twice"
    text = path.read_text()
    write_mixtures(plan)
    assert path.read_text() == text


def test_rows_to_rehearse_are_drawn_as_ever_where_there_are_enough(plan, tmp_path):
    """Published figures are of these files; the hashes are of those that were written before rows could repeat."""
    plan = rehearsing(plan, tmp_path, t35=40, t36=40, t37=40)
    write_mixtures(plan)
    files = [Path(stage.config.data.train) for stage in stages(plan)[1:3]]
    found = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in files]
    assert found == ["b2d25d9f2ac9015d", "080d5f5a4b6b93a1"]


def test_a_changed_limit_is_noticed_in_every_stage(plan):
    limits = [{"sft": MethodPlan(rehearse=0.5, set={"data.limit": limit})} for limit in (20, 30)]
    one, other = (stages(plan.model_copy(update={"methods": methods}))[:3] for methods in limits)
    assert all(a.config.data != b.config.data for a, b in zip(one, other, strict=True))


def test_the_split_of_the_recipe_is_what_is_checked_and_rehearsed(plan, tmp_path):
    tasks = {}
    for word in ("t35", "t36"):
        rows = [{"prompt": f"{word} {i}", "demonstration": "d"} for i in range(5)]
        DatasetDict(test=Dataset.from_list(rows)).save_to_disk(tmp_path / f"{word}-saved")
        tasks[word] = plan.tasks[word].model_copy(update={"train": str(tmp_path / f"{word}-saved")})
    methods = {"sft": MethodPlan(rehearse=0.5, set={"data.split": "test"})}
    plan = plan.model_copy(update={"tasks": tasks, "methods": methods, "prior": {"old": "absent.jsonl"}})
    with pytest.raises(DataError, match=r"absent\.jsonl: no such file"):  # of what is checked after the tasks
        continual(plan)
    write_mixtures(plan)
    assert len(load_training_rows(stages(plan)[1].config.data, "sft")) == 10
    wrong = plan.model_copy(update={"methods": {"sft": MethodPlan(set={"data.split": "dev"})}})
    with pytest.raises(DataError, match="has no split 'dev'"):
        continual(wrong)


def finished(folder, accuracies, config):
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
    return folder


def test_results_of_two_methods_and_two_seeds(plan, tmp_path):
    points = {
        "sdft": [{"a": 0.0, "b": 0.0, "old": 1.0}, {"a": 1.0, "b": 0.0, "old": 1.0}, {"a": 0.9, "b": 1.0, "old": 0.9}],
        "sft": [{"a": 0.0, "b": 0.0, "old": 1.0}, {"a": 1.0, "b": 0.0, "old": 0.5}, {"a": 0.2, "b": 1.0, "old": 0.1}],
    }
    config = stages(plan)[0].config
    sequences = {
        method: {
            seed: [finished(tmp_path / f"{method}{seed}" / str(i), shares[i : i + 2], config) for i in (0, 1)]
            for seed in (0, 1)
        }
        for method, shares in points.items()
    }
    found = write_results(tmp_path, ["a", "b"], ["old"], sequences)
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
    assert "| sft | b | 20.0 (5.7 – 51.0; 20.0) |" in text, "two of ten, however many seeds"
    assert (tmp_path / "table.md").read_text() == text
    assert {"curves.png", "normalised.png"} <= {path.name for path in Path(tmp_path).iterdir()}


@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_sequence_that_diverges_keeps_no_other_from_its_end(plan, monkeypatch, all_of_them):
    asked = []

    def run(config, **how):
        folder = Path(config.run_dir)
        asked.append("/".join(folder.parts[-2:]))
        if all_of_them or asked[-1] == "sft-seed1/2-t36":
            raise Diverged("step 7: loss is nan")
        finished(folder, [dict.fromkeys(config.eval.sets, 0.5)] * 2, config)
        (folder / "model").mkdir()

    monkeypatch.setattr("sdft_dist.continual.stages.run", run)
    monkeypatch.setattr("sdft_dist.continual.stages.ray_session", lambda config: nullcontext())
    out, sequences = Path(plan.out), len(plan.methods) * len(plan.seeds)
    with pytest.raises(Diverged) as told:
        continual(plan)
    if all_of_them:
        assert str(told.value).startswith(f"{sequences} of {sequences} sequences diverged; there are no results:\n")
        assert len(asked) == sequences
        return
    lines = [
        f"1 of {sequences} sequences diverged; the results in {out} are of the others:",
        "sft, seed 1, t36: step 7: loss is nan",
    ]
    assert str(told.value) == "\n  ".join(lines)
    assert "sft-seed1/3-t37" not in asked
    assert len(asked) == sequences * len(plan.tasks) - 1
    found = json.loads((out / "results.json").read_text())["methods"]
    assert {name: one["seeds"] for name, one in found.items()} == {"sdft": [0, 1, 2], "sft": [0, 2], "dft": [0, 1, 2]}
    asked.clear()
    with pytest.raises(Diverged):
        continual(plan)
    assert asked == ["sft-seed1/2-t36"], "nothing else is done again"


def test_one_task_alone_has_means_over_seeds_and_nothing_to_forget(plan, tmp_path):
    config, seeds = stages(plan)[0].config, {}
    for seed, share in ((0, 1.0), (1, 0.8)):
        ends = [{"a": 0.0, "old": 1.0}, {"a": share, "old": 0.9}]
        seeds[seed] = [finished(tmp_path / f"sdft{seed}", ends, config)]
    text = markdown(write_results(tmp_path, ["a"], ["old"], {"sdft": seeds}))
    assert "| method | average | prior, start | prior, end |\n" in text
    assert "| sdft | 90.0 (80.0 – 100.0) | 100.0 (100.0 – 100.0) | 90.0 (90.0 – 90.0) |" in text


def made_up(rows, *right):
    """Results of one method with made-up counts: at the start and after the task `new`."""
    prior = [name for name in rows if name != "new"]
    seeds = [*range(len(right[0]["new"]))]
    measures = [{"average": 0.0} for _ in seeds]
    method = {"seeds": seeds, "right": right, "measures": measures}
    return {"tasks": ["new"], "prior": prior, "rows": rows, "methods": {"sdft": method}}


def test_stages_of_all_seeds_begin_together_where_some_stopped_early():
    def sequence(*lengths):
        return [[{"step": 0, "a": 0.5}, {"step": n, "a": 1.0}] for n in lengths]

    ends = _ends([sequence(10, 30), sequence(20, 5)])
    assert ends == [20, 50]
    assert _curve(sequence(10, 30), ["a"], ends).x == [0, 10, 20, 50]


def test_seeds_add_no_questions_to_an_interval():
    low, high = binomtest(75, 100).proportion_ci(method="wilson")
    for right in ([75], [75, 75, 75], [70, 75, 80]):
        assert f" 75.0 ({100 * low:.1f} – {100 * high:.1f}" in markdown(
            made_up({"new": 100}, {"new": right}, {"new": right})
        )


def test_a_mean_over_sets_of_unequal_size_counts_each_set_once():
    counts = {"new": [1], "big": [300], "small": [0]}
    text = markdown(made_up({"new": 1, "big": 300, "small": 100}, counts, counts))
    assert text.count("| 50.0 (44.4 – 55.6) |") == 2, "300 and 100 tell as much as 300 would: 4 / (1/300 + 1/100)"
    assert "prior: mean of its 2 sets" in text
    assert (questions([150] * 4), questions([300, 100]), questions([7])) == (600, 300, 7)


def test_a_set_without_a_way_from_start_to_best_has_no_entry_in_the_legend(plan, tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(charts, "save", lambda figure, path: drawn.update({path.name: figure}))
    for end, entries in (({"a": 1.0, "old": 0.9}, ["a"]), ({"a": 0.0, "old": 1.0}, [])):
        run = finished(tmp_path / f"{end}", [{"a": 0.0, "old": 1.0}, end], stages(plan)[0].config)
        write_results(tmp_path, ["a"], ["old"], {"sdft": {0: [run]}})
        told = [[text.get_text() for text in legend.texts] for legend in drawn["normalised.png"].legends]
        assert told == ([entries] if entries else [])
