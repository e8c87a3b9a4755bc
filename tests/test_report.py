"""The page about runs; the runs are made up."""

import json
import re

import pytest
from test_rundir import config_in

from sdft_dist.errors import UserError
from sdft_dist.evaluate import Judged
from sdft_dist.recipe import dump_config
from sdft_dist.report.charts import Point, pareto
from sdft_dist.report.report import report
from sdft_dist.rundir import RunDir


def a_run(folder, method="sdft", rate=1e-5, kept=0.5, evaluated=True, start="m", first=None, last=None):
    """`first` and `last` are what its evaluations tell, of sets that may be others than new and old."""
    first = {"new": 0.0, "old": 1.0, "new_interval": [0.0, 0.2]} if first is None else first
    last = {"new": 1.0, "old": kept} if last is None else last
    sets = {name: name for name in last} if evaluated else {}
    config = config_in(folder, method=method, optim={"learning_rate": rate}, eval={"sets": sets}, model={"path": start})
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(config))
    lines = [
        {"kind": "train", "step": step, "loss": 1 / step, "grad_norm": 1.0, "completion_tokens_mean": 9.0, "samples": 8,
         "samples_per_s": 4.0, "time/step": 2.0, "attempt": 1, "seconds": 5.0 * step, "busy/learner/train": 1.0,
         "divergence_by_position": [0.5, None, 0.1]}
        for step in (1, 2, 3)
    ]  # fmt: skip
    run = RunDir(folder)
    if evaluated:
        run.note_evaluation(0, {"new": [Judged("hm", "yes", False, "<b>q</b>")], "old": [Judged("a", "a", True)]})
        run.note_evaluation(3, {"new": [Judged("<script>x</script>", "yes", True)], "old": [Judged("b", "a", False)]})
        lines.insert(0, {"kind": "eval", "step": 0, **first})
        lines.append({"kind": "eval", "step": 3, **last})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_two_runs_are_compared_on_one_page(tmp_path):
    one, other = a_run(tmp_path / "one"), a_run(tmp_path / "other", "sft", rate=2e-5, kept=0.25)
    page = report([one, other], tmp_path / "out").read_text()
    assert not re.search(r"(src|href)=(?!\"data:)", page), "self-contained"
    assert "<script" not in page
    assert "&lt;script&gt;x&lt;/script&gt;" in page
    for shown in ("0.0% (0 – 20)", "100.0%", "50.0%", "25.0%", "optim.learning_rate", "1e-05", "2e-05"):
        assert shown in page
    assert "<td>run_dir</td>" in page, "settings that differ"
    assert "<td>seed</td>" not in page
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert {"pareto.png", "new.png", "others--mean.png", "loss.png", "time.png"} <= pictures
    assert page.count("data:image/png;base64,") == len(pictures)


def test_runs_that_go_on_from_each_other_give_a_matrix_of_what_each_stage_kept(tmp_path):
    one = a_run(tmp_path / "one")
    two = a_run(tmp_path / "two", start=str(one / "model"))
    page = report([two, one], tmp_path / "out").read_text()
    assert "What each stage kept" in page
    assert "one → two: accuracy" in page
    assert (tmp_path / "out" / "retention-two.png").exists()


def test_what_was_sampled_stands_beside_what_the_teacher_was_shown(tmp_path):
    run = RunDir(a_run(tmp_path / "one"))
    run.samples(1).parent.mkdir()
    for step, completion in ((1, "first"), (2, "between"), (3, "<last>")):
        line = {"prompt": "asked", "demonstration": "shown", "completion": completion}
        run.samples(step).write_text(json.dumps(line) + "\n")
    page = report([run.path], tmp_path / "out").read_text()
    text = "<td class='text '><div>{}</div></td>"
    rows = re.findall(r"<tr><td>(\d)</td>" + "".join(map(text.format, ("asked", "shown", "(.*?)"))), page)
    assert rows == [("1", "first"), ("3", "&lt;last&gt;")]


def changed(run, **fields):
    """The records of the run's steps, with other values by step."""
    path = run / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    for record in records:
        if record["kind"] == "train":
            record.update({name: by_step[record["step"]] for name, by_step in fields.items()})
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_where_a_run_was_interrupted_and_what_it_began_with_are_told(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr("sdft_dist.report.report.curves", lambda title, runs, *a, **k: drawn.update({title: runs}))
    monkeypatch.setattr("sdft_dist.report.report.picture", lambda *_: "")
    one, other = a_run(tmp_path / "one", start="Org/Base-1B"), a_run(tmp_path / "other", start="/models/stage/model")
    changed(one, attempt={1: 1, 2: 3, 3: 4})
    page = report([one, other], tmp_path / "out").read_text()
    assert "<td>Org/Base-1B</td><td class=n>3</td><td class=n>1, 2</td>" in page
    assert "<td>stage/model</td><td class=n>3</td><td class=n></td>" in page
    assert page.count("Dotted: where a run was interrupted and went on.") == 1
    assert [curve.marks for curve in drawn["loss"].values()] == [[1, 2], []]
    assert "Dotted" not in report([other], tmp_path / "alone").read_text()


def test_a_first_step_that_was_skipped_is_left_out_of_the_divergence_by_position(tmp_path):
    run = a_run(tmp_path / "one")
    changed(run, loss={1: None, 2: 0.5, 3: 0.3}, divergence_by_position={1: [None] * 3, 2: [0.5, None], 3: [0.1, 0.2]})
    assert "Divergence by position" in report([run], tmp_path / "out").read_text()
    changed(run, divergence_by_position={1: [None], 2: [None], 3: [None]})
    assert "Divergence by position" not in report([run], tmp_path / "none").read_text()


def test_a_run_that_was_never_evaluated(tmp_path):
    page = report([a_run(tmp_path / "one", evaluated=False)], tmp_path / "out").read_text()
    assert "None was measured" in page
    assert not (tmp_path / "out" / "pareto.png").exists()


def test_runs_of_one_name_are_told_apart(tmp_path):
    """Also those below folders of one name."""
    names = ("one/sft-1/run", "two/sft-1/run", "two/sdft-1/run")
    page = report([a_run(tmp_path / name) for name in names], tmp_path / "out").read_text()
    shown = ("one/sft-1/run", "two/sft-1/run", "sdft-1/run")
    assert f"<h1>{' · '.join(shown)}</h1>" in page


def test_a_run_that_is_given_twice_is_shown_once(tmp_path):
    run = a_run(tmp_path / "run")
    page = report([run, run / ".." / "run"], tmp_path / "out").read_text()
    assert "<h1>run</h1>" in page


def test_a_run_that_did_not_measure_what_is_taught_is_left_out_of_that_picture(tmp_path, monkeypatch):
    drawn = {}
    monkeypatch.setattr(
        "sdft_dist.report.report.pareto", lambda points, new: drawn.update(points) or pareto(points, new)
    )
    plain = {"old": 0.5}
    runs = [a_run(tmp_path / "one"), a_run(tmp_path / "two", first=plain, last=plain)]
    page = report(runs, tmp_path / "out").read_text()
    assert drawn == {"one": Point((100, 0), (50, 100))}
    assert "what was kept, as new was not measured at their start and end: two." in page


def test_means_are_of_the_sets_that_all_runs_have(tmp_path):
    more = {"new": 0.0, "old": 0.5, "older": 0.1, "oldest": 0.2}
    page = report([a_run(tmp_path / "one"), a_run(tmp_path / "two", first=more, last=more)], tmp_path / "out")
    text = page.read_text()
    assert "Others, mean: of old. Left out of the mean, as not in every evaluation of all runs: older, oldest." in text
    assert [float(cell) for cell in re.findall(r"([\d.]+)%</td></tr>", text)] == [100, 50, 50, 50]


def test_without_a_set_that_all_runs_have_there_is_no_mean(tmp_path):
    one, other = {"new": 0.5, "old": 0.5}, {"new": 0.5, "older": 0.1}
    runs = [a_run(tmp_path / name, first=found, last=found) for name, found in (("one", one), ("two", other))]
    page = report(runs, tmp_path / "out").read_text()
    assert "others, mean" not in page
    assert not (tmp_path / "out" / "pareto.png").exists()


@pytest.mark.parametrize(
    ("before", "words"), [({"new": 0.0}, "after every run: old."), ({}, "after every run: new, old.")]
)
def test_a_chain_whose_first_run_got_a_held_out_set_later(tmp_path, before, words):
    one = a_run(tmp_path / "one", first=before)
    two = a_run(tmp_path / "two", start=str(one / "model"))
    page = report([one, two], tmp_path / "out").read_text()
    assert f"one → two: accuracy, %. Left out of the picture, as not measured at the start and {words}" in page
    assert (tmp_path / "out" / "retention-two.png").exists() == bool(before)


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval/step-000003.jsonl"])
def test_a_damaged_line_is_named_and_an_unfinished_last_one_left_out(tmp_path, name):
    run = a_run(tmp_path / "one")
    whole = (run / name).read_bytes()
    (run / name).write_bytes(whole + b'{"kind": "tr')
    report([run], tmp_path / "cut")
    number = whole.count(b"\n") + 1
    for bad in (b'{"kind": "tr', b"\xff\x00", b"3", b""):
        (run / name).write_bytes(whole + bad + b"\n" + whole)
        with pytest.raises(UserError, match=rf"{name}:{number}: is damaged: .*; remove this line"):
            report([run], tmp_path / "out")


def test_a_completion_may_hold_any_end_of_a_line(tmp_path):
    run = a_run(tmp_path / "one")
    RunDir(run).note_evaluation(3, {"new": [Judged("one\u2028two\x85three", "yes", True)]})
    assert "one\u2028two\x85three" in report([run], tmp_path / "out").read_text()


def test_completions_of_white_space_are_told_of_and_one_evaluation_stands_there_once(tmp_path):
    run = a_run(tmp_path / "one")
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:-1]))  # without the last evaluation
    RunDir(run).note_evaluation(0, {"new": [Judged("\n\n", "yes", False)]})
    page = report([run], tmp_path / "out").read_text()
    assert page.count("(white space only: &#x27;\\n\\n&#x27;)") == 2
    assert page.count("0.0% (0 – 20)") == 1


def test_what_cannot_be_shown_is_said(tmp_path):
    run = a_run(tmp_path / "one")
    with pytest.raises(UserError, match="expected one of the held-out sets: new, old"):
        report([run], tmp_path / "out", new="neu")
    with pytest.raises(UserError, match="is not a run directory"):
        report([tmp_path], tmp_path / "out")
    report([run], tmp_path / "out")
    with pytest.raises(UserError, match="already in use"):
        report([run], tmp_path / "out")
    (run / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match="nothing was trained yet"):
        report([run], tmp_path / "again")
