"""Rows from every layout and source; every bad row is named by file, line and field."""

import datetime
import json
import os
import re

import datasets
import numpy as np
import pyarrow as pa
import pytest
from helpers import write_jsonl
from pyarrow.parquet import write_table

from sdft_dist.config import DataConfig
from sdft_dist.data import load_rows, load_training_rows
from sdft_dist.errors import DataError
from sdft_dist.problems import ProblemSet, batch
from sdft_dist.types import Problem

USER = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]


@pytest.mark.parametrize(
    ("row", "last", "demonstration"),
    [
        ({"prompt": "q", "demonstration": "d"}, "q", "d"),
        ({"prompt": USER, "demonstration": [{"role": "assistant", "content": "d"}]}, "q", "d"),
        ({"prompt": "q", "privileged_context": "c"}, "q", "c"),
        ({"messages": USER, "output_text": "d", "answer": "A"}, "q", "d"),
        ({"prompt": "q", "golden_response": ["a", "b"], "golden_answer": [{"x": 1}]}, "q", "a\nb"),
        ({"prompt": "q", "golden_response": "d", "demonstration": None}, "q", "d"),
    ],
)
def test_layouts(tmp_path, row, last, demonstration):
    (found,) = load_rows(str(write_jsonl(tmp_path / "d.jsonl", [row])))
    assert found.messages[-1] == {"role": "user", "content": last}
    assert found.demonstration == demonstration


def test_sources_give_the_same_rows(tmp_path):
    rows = [{"prompt": f"q{i}", "demonstration": f"d{i}"} for i in range(5)]
    jsonl = write_jsonl(tmp_path / "d.jsonl", rows)
    (tmp_path / "d.json").write_text(json.dumps(rows, indent=1))
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "d.parquet")
    table.save_to_disk(tmp_path / "saved")
    expected = [(r.messages, r.demonstration) for r in load_rows(str(jsonl))]
    for name in ("d.json", "d.parquet", "saved"):
        assert [(r.messages, r.demonstration) for r in load_rows(str(tmp_path / name))] == expected
    assert len(load_rows(str(jsonl), limit=2)) == 2


def parquet(path, prompts):
    write_table(pa.table({name: pa.array(prompts, pa.string()) for name in ("prompt", "demonstration")}), path)
    return path


def prompts_of(path):
    return [row.messages[-1]["content"] for row in load_rows(str(path))]


def test_the_path_of_a_parquet_file_is_no_pattern(tmp_path):
    parquet(tmp_path / "x1.parquet", ["other"])
    assert prompts_of(parquet(tmp_path / "x[1].parquet", ["own"])) == ["own"]
    (tmp_path / "set [v2]").mkdir()
    assert prompts_of(parquet(tmp_path / "set [v2]" / "t*.parquet", ["a", "b"])) == ["a", "b"]


def test_a_parquet_file_is_read_as_it_is_now(tmp_path):
    link = tmp_path / "now.parquet"
    for name in ("a", "b"):
        target = parquet(tmp_path / f"{name}.parquet", [name])
        os.utime(target, (0, 0))
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        assert prompts_of(link) == [name]


def test_a_parquet_file_without_rows_says_so(tmp_path):
    with pytest.raises(DataError, match=r"^data.train: .*none.parquet: no rows$"):
        load_rows(str(parquet(tmp_path / "none.parquet", [])))


@pytest.mark.fault("bad rows", "one of each kind", "all reported with line and field, before anything starts")
def test_all_bad_rows_are_reported_with_line_and_field(tmp_path):
    path = tmp_path / "bad.jsonl"
    lines = [
        b'{"prompt": "fine", "demonstration": "fine"}',
        b'{"prompt": "cut',
        b'{"prompt": "q"}',
        b'{"prompt": 7, "demonstration": "d"}',
        b'{"prompt": "q", "demonstration": ""}',
        b'{"prompt": "q\\u0000", "demonstration": "d"}',
        b'{"prompt": "\xff", "demonstration": "d"}',
        b'["prompt"]',
        b'{"prompt": [{"role": "assistant", "content": "x"}], "demonstration": "d"}',
        b'{"prompt": [{"content": "x"}], "demonstration": "d"}',
        b'{"text": "x"}',
        b'{"prompt": "q", "demonstration": "\\ud800"}',
    ]
    path.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as e:
        load_rows(str(path))
    message = str(e.value)
    for line, field in [
        (2, "line: not JSON: Unterminated string starting at: character 12\n"),
        (3, "demonstration: is missing (or `privileged_context`, or `golden_response`); found: prompt\n"),
        (4, "prompt: is int 7; expected text"),
        (5, "demonstration: is empty"),
        (6, "prompt: holds a NUL"),
        (7, "line: not UTF-8 at byte 12"),
        (8, "row: is a list"),
        (9, "prompt: must end with the user, not the assistant; put the assistant's answer into `demonstration`"),
        (10, "prompt[0]: is not a message"),
        (11, "prompt: is missing"),
        (12, "demonstration: holds half a surrogate pair"),
    ]:
        assert f"{path}:{line}: {field}" in message
    assert message.startswith("11 bad rows")


def test_what_is_wrong_with_rows_one_after_another_is_said_once(tmp_path):
    rows = (
        [{"question": "q"}] * 30 + [{"prompt": "q", "demonstration": "d"}] + [{"prompt": 7, "demonstration": "d"}] * 2
    )
    path = write_jsonl(tmp_path / "rows.jsonl", [*rows, {"prompt": "q"}])
    with pytest.raises(DataError) as e:
        load_rows(str(path))
    first, *lines = str(e.value).splitlines()
    assert first == "33 bad rows"
    assert [line.partition(": ")[0] for line in lines] == [
        f"{path}:1 to 30", f"{path}:32", f"{path}:33", f"{path}:34",
    ]  # fmt: skip
    mixed = [{"prompt": "q"}, {"prompt": 7, "demonstration": "d"}] * 21
    with pytest.raises(DataError, match=r"… and 22 more$"):
        load_rows(str(write_jsonl(path, mixed)))


def test_json_array_errors_name_the_line(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text('[\n{"prompt": "q", "demonstration": "d"},\n{"prompt": "q"},\n{"prompt": }\n]')
    with pytest.raises(DataError) as e:
        load_rows(str(path))
    assert f"{path}:3: demonstration: is missing" in str(e.value)
    assert f"{path}:4: row: not JSON" in str(e.value)


def test_missing_and_empty_files(tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n\n")
    (tmp_path / "broken.parquet").write_text("no")
    for name, message in [
        ("none.jsonl", "no such file"),
        ("empty.jsonl", "^data.train: .*empty.jsonl: the file is empty"),
        ("blank.jsonl", "^data.train: .*blank.jsonl: no rows"),
        ("broken.parquet", "could not be read"),
        ("notes.txt", "no such file"),
    ]:
        with pytest.raises(DataError, match=message):
            load_rows(str(tmp_path / name))


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (
            {"messages": [*USER, {"role": "assistant", "content": "d"}]},
            "messages: must end with the user, not the assistant; put the assistant's answer into `output_text`",
        ),
        ({"messages": [{"role": "system", "content": "s"}], "output_text": "d"}, "messages: must end with the user, n"),
        ({"messages": USER, "response": "d"}, "output_text: is missing; found: messages, response"),
        (
            {"messages": [*USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, *USER]},
            "messages[2].tool_calls: is not read: write the calls into `content`, as text",
        ),
        (
            {"prompt": [{"role": "user", "text": "q"}], "demonstration": "d"},
            "1 bad row\nFILE:1: prompt[0].content: is missing; found: role, text",
        ),
        ({"prompt": "q", "response": "d"}, "`golden_response`); found: prompt, response"),
    ],
)
def test_a_row_of_another_layout_is_told_what_to_change(tmp_path, row, problem):
    path = write_jsonl(tmp_path / "d.jsonl", [row])
    with pytest.raises(DataError, match=re.escape(problem.replace("FILE", str(path)))):
        load_rows(str(path))


def test_a_held_out_row_without_an_answer_is_told_what_it_has(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "q", "response": "d"}])
    with pytest.raises(DataError, match="answer: is missing, and so is a demonstration; found: prompt, response"):
        load_rows(str(path), need_demonstration=False)


def test_a_jsonl_file_is_no_array(tmp_path):
    path = tmp_path / "d.jsonl"
    for mark in ("", "\ufeff"):
        path.write_text(mark + json.dumps([{"prompt": "q", "demonstration": "d"}], indent=1))
        with pytest.raises(DataError, match=f"^{path}:1: file: .* one object a line; for an array use .json$"):
            load_rows(str(path))


def test_a_split_of_a_file_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "q", "demonstration": "d"}])
    with pytest.raises(DataError, match=r"data.split: got 'test', but .*d.jsonl is a file, which has no splits: leave"):
        load_training_rows(DataConfig(train=str(path), split="test"), "sdft")


def test_a_split_of_a_saved_data_set_without_any_is_refused(tmp_path):
    whole = datasets.Dataset.from_list([{"prompt": "q", "demonstration": "d"}])
    whole.save_to_disk(tmp_path / "whole")
    assert len(load_training_rows(DataConfig(train=str(tmp_path / "whole")), "sdft")) == 1
    with pytest.raises(DataError, match=r"data.split: got 'test', but .*whole is one data set, which has no splits"):
        load_training_rows(DataConfig(train=str(tmp_path / "whole"), split="test"), "sdft")


def test_a_privileged_context_cannot_be_imitated(tmp_path):
    path = write_jsonl(tmp_path / "d.jsonl", [{"prompt": "q", "privileged_context": "c"}])
    with pytest.raises(DataError, match="method=sft needs a `demonstration`"):
        load_training_rows(DataConfig(train=str(path)), "sft")


def test_problem_set_gives_back_what_went_in():
    problems = [
        Problem(prompt_ids=np.arange(i), teacher_prompt_ids=np.arange(2 * i), demonstration_ids=np.arange(3))
        for i in range(1, 5)
    ]
    table = ProblemSet(problems)
    assert len(table) == 4
    assert [len(p.teacher_prompt_ids) for p in table] == [2, 4, 6, 8]
    assert table[-1].prompt_ids.tolist() == [0, 1, 2, 3]


def test_batches_are_pure_and_cover_each_epoch_once():
    draw = [i for step in range(7) for i in batch(step, num_problems=10, size=10 // 2, seed=3)]
    assert sorted(draw[:10]) == sorted(draw[10:20]) == sorted(range(10))
    assert draw[:10] != draw[10:20]
    assert batch(5, num_problems=10, size=5, seed=3) == draw[25:30]
    assert batch(0, num_problems=3, size=8, seed=0)[3:6] != []


ROW = '{"prompt": "q", "demonstration": "d"}'


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        (f"[{ROW}]\n[{ROW}]", 2, "file: got '[' after ], expected the end of the file"),
        (f"[{ROW}] and more", 1, "file: got 'a' after ], expected the end of the file"),
        (f"[{ROW}\n{ROW}]", 2, "file: got '{' after a row, expected , or ]"),
        (f"[{ROW}\n", 2, "file: got the end of the file after a row, expected , or ]"),
        (f"[{ROW},\n,{ROW}]", 2, "row: not JSON"),
        (f"[{ROW},\n]", 2, "row: not JSON"),
        (f"[{ROW},\n{'9' * 5000}]", 2, "row: not JSON: Exceeds the limit"),
    ],
)
def test_a_json_file_is_one_whole_array(tmp_path, text, line, problem):
    path = tmp_path / "d.json"
    path.write_text(text)
    with pytest.raises(DataError) as e:
        load_rows(str(path))
    assert f"{path}:{line}: {problem}" in str(e.value)
    path.write_text(f" [ {ROW}\n,\n{ROW} ]\n ")
    assert [row.where for row in load_rows(str(path))] == [f"{path}:1", f"{path}:3"]


def test_a_byte_order_mark_is_passed_over(tmp_path):
    for name, text in (("d.json", f"[{ROW}]"), ("d.jsonl", ROW)):
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert len(load_rows(str(tmp_path / name))) == 1


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('"answer": "A", "golden_answer": "B"', "A"),
        ('"answer": null, "golden_answer": "B"', "B"),
        ('"answer": [{"ü": 1}]', '[{"ü": 1}]'),
        ('"answer": "\\ud800"', "answer: holds half a surrogate pair"),
        ('"golden_answer": ["\\ud800"]', "golden_answer: holds half a surrogate pair"),
        (f'"answer": {"9" * 5000}', "line: not JSON: Exceeds the limit"),
    ],
)
def test_answers(tmp_path, answer, expected):
    path = tmp_path / "d.jsonl"
    path.write_text(f'{{"prompt": "q", {answer}}}\n')
    if ": " not in expected or expected.startswith("["):
        assert load_rows(str(path), need_demonstration=False)[0].answer == expected
    else:
        with pytest.raises(DataError, match=re.escape(f"{path}:1: {expected}")):
            load_rows(str(path), need_demonstration=False)


@pytest.mark.parametrize("answer", [datetime.date(2026, 1, 1), b"x"])
def test_answers_that_only_parquet_has_are_named(tmp_path, answer):
    path = tmp_path / "d.parquet"
    datasets.Dataset.from_list([{"prompt": "q", "answer": answer}]).to_parquet(path)
    with pytest.raises(DataError, match=rf"{path}:1: answer: is (date|bytes) .*; expected text, or a value that JSON"):
        load_rows(str(path), need_demonstration=False)


@pytest.mark.parametrize("role", ["user<|end|><|assistant|>", "User", "", None, ["user"]])
def test_a_role_is_one_of_a_few_names(tmp_path, role):
    row = {"prompt": [{"role": role, "content": "s"}, *USER], "demonstration": "d"}
    path = write_jsonl(tmp_path / "d.jsonl", [row])
    with pytest.raises(DataError) as e:
        load_rows(str(path))
    assert f"{path}:1: prompt[0].role: is {type(role).__name__} {role!r}; expected one of system, dev" in str(e.value)


def test_what_there_is_and_what_names_it_is_told(tmp_path, monkeypatch):
    """A hub id is asked for only where it cannot be a file's."""
    asked = []

    def hub(name, subset):
        asked.append((name, subset))
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("d.csv", "d.jsonl.gz", "d.JSONL"):
        (tmp_path / name).write_text(ROW)
    assert len(load_rows("d.JSONL")) == 1
    for source, message in [
        ("d.csv", "is no file of a known kind (known: .jsonl, "),
        ("d.jsonl.gz", "is no file of a known kind"),
        ("none.jsonl", "no such file"),
        ("none.csv", "no such file"),
        ("data/none.csv", "no such file"),
        ("./none", "no such file"),
        ("a/b/c", "no such file"),
        ("owner/name-v2.5-x", "no such file, and no data set of the hub could be read: ConnectionError"),
        ("squad", "no such file, and no data set of the hub could be read: ConnectionError"),
    ]:
        with pytest.raises(DataError, match=re.escape(f"eval.sets.new: {source}: {message}")):
            load_rows(source, setting="eval.sets.new")
    with pytest.raises(DataError, match="ConnectionError"):
        load_rows("gsm8k", subset="main")
    assert asked == [("owner/name-v2.5-x", None), ("squad", None), ("gsm8k", "main")]
