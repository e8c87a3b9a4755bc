"""The command line: instant help, and one readable message for each mistake."""

import json
import re
import resource
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from helpers import write_jsonl
from test_commits import save

from sdft_dist.cli import main
from sdft_dist.commits import Commits
from sdft_dist.errors import UserError
from sdft_dist.prepare import is_installed

GOOD = {"prompt": "rev a0 a1", "demonstration": "thus a1 a0 end"}


def test_help_is_fast():
    """Of the processor's time: what else the machine does counts for nothing. Importing torch alone takes longer."""

    def seconds():
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    before = seconds()
    subprocess.run([sys.executable, "-m", "sdft_dist.cli", "--help"], check=True, capture_output=True)
    assert seconds() - before < 1


def test_a_crash_of_native_code_says_where():
    code = "from sdft_dist.cli import main; main(['train', 'none.yaml']); import os; os.kill(os.getpid(), 11)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Fatal Python error: Segmentation fault" in found.stderr


def test_overrides_may_come_before_and_after_options():
    from sdft_dist.cli import _parse

    args = _parse(["train", "r.yaml", "a.b=1", "--resume", "auto", "c.d=2", "--allow-changes", "e.f=3"])
    assert (args.overrides, args.resume, args.allow_changes) == (["a.b=1", "c.d=2", "e.f=3"], "auto", True)
    for wrong in (
        ["train", "r.yaml", "--reusme=auto"],
        ["ckpt", "ls", "run", "a=b"],
        ["train", "r.yaml", "--resume", "auto", "b"],
    ):
        with pytest.raises(SystemExit, match="2"):
            _parse(wrong)


@pytest.fixture
def recipe(model, tmp_path):
    write_jsonl(tmp_path / "good.jsonl", [GOOD])
    tree = {
        "run_dir": str(tmp_path / "run"),
        "model": {"path": str(model), "max_length": 64},
        "data": {"train": str(tmp_path / "good.jsonl")},
        "rollout": {"max_completion_tokens": 16},
        "prompt": {"template": "{prompt} example {demonstration} now you"},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train={tmp}/none.jsonl", "none.jsonl: no such file"),
        ("data.train={tmp}/column.jsonl", "column.jsonl:2: demonstration: is missing"),
        ("data.train={tmp}/long.jsonl", "long.jsonl:1: teacher prompt of"),
        ("model.path={tmp}/nowhere", "nowhere: no such folder"),
        ("learner.zero_stag=1", "learner.zero_stag: no such field; did you mean learner.zero_stage?"),
        ("run_dir={tmp}/used", "used holds files that are not a run's (precious.txt): give another run_dir=…"),
        ("eval.scorer=nothing:here", "eval.scorer: 'nothing:here' is not a function"),
    ],
)
def test_mistakes_end_with_code_2_and_nothing_written(recipe, tmp_path, capsys, override, message):
    """One of each kind; others of a kind are where it is tested by itself."""
    write_jsonl(tmp_path / "column.jsonl", [GOOD, {"prompt": "q"}])
    write_jsonl(tmp_path / "long.jsonl", [GOOD | {"prompt": "a0 " * 80}])
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious.txt").write_text("kept")
    code = main(["train", str(recipe), override.format(tmp=tmp_path), "cluster.device=cpu"])
    error = capsys.readouterr().err
    assert code == 2, error
    assert error.startswith("sdft: error: ")
    assert message in error
    assert not (tmp_path / "run").exists()
    assert (tmp_path / "used" / "precious.txt").read_text() == "kept"


def test_a_plan_says_what_is_wrong_with_what_it_is_asked(recipe, capsys):
    plan = ["plan", str(recipe), "--shape", "lab"]
    for words, says in (
        (["--gpus", "8", "0"], "--gpus: got 8 0, expected positive numbers"),
        (["--gpus", "8", "eight"], "--gpus: got 8 eight, expected positive numbers"),
        (["--lengths", "0/1/1"], "--lengths: got '0/1/1', expected tokens as 300/400/400"),
        (["--lengths=-5/1/1"], "--lengths: got '-5/1/1', expected tokens as 300/400/400"),
        (["--lengths", "9/9/99999"], "--lengths: 9/9/99999 is longer than model.max_length"),
        (["--gpus", "8", "method=sft"], "is about method=sdft"),
        (["--gpus", "1", "--simulate"], "--simulate: is about roles that have GPUs of their own"),
    ):
        assert main([*plan, "model.max_length=4096", *words]) == 2
        assert says in capsys.readouterr().err
    assert main([*plan, "--json", "--gpus", "8", "16", "rollout.max_staleness=2", "model.max_length=4096"]) == 0
    assert [found["gpus"] for found in json.loads(capsys.readouterr().out)] == [8, 16]


def test_a_plan_of_which_nothing_fits_ends_with_exit_code_1(recipe, capsys):
    plan = ["plan", str(recipe), "--gpu", "a100", "--shape", "qwen3-8b"]
    plan += ["model.dtype=bfloat16", "model.max_length=4096"]
    for words in ([], ["--json"]):
        with pytest.raises(SystemExit, match="1"):
            main([*plan, *words, "--gpus", "1"])
        assert "fits" in capsys.readouterr().out
        assert main([*plan, *words, "--gpus", "1", "16", "learner.gradient_checkpointing=full"]) == 0


def test_a_bench_says_at_once_that_its_baseline_is_not_there(recipe, tmp_path, capsys):
    out = tmp_path / "bench"
    assert main(["bench", str(recipe), "--out", str(out), "--baseline", "nowhere.json"]) == 2
    assert "--baseline: nowhere.json is no file" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("more", [[], ["--synthetic-model", "lab"], ["--learner-only"]])
def test_a_bench_writes_nothing_into_a_folder_that_is_used(recipe, tmp_path, capsys, more):
    """Such as a run's, whose model would be lost."""
    out = tmp_path / "run"
    (out / "model").mkdir(parents=True)
    (out / "model" / "config.json").write_text("kept")
    assert main(["bench", str(recipe), "--out", str(out), *more]) == 2
    assert f"--out: {out} is already in use: give another, or remove it" in capsys.readouterr().err
    assert [path.name for path in out.rglob("*")] == ["model", "config.json"]
    assert (out / "model" / "config.json").read_text() == "kept"


def test_a_synthetic_model_takes_the_place_of_the_recipes_in_its_type(tmp_path, monkeypatch):
    """Also of a layer's; a field that is given by itself stays."""
    from sdft_dist.bench import contest, figures

    recipe, layer = tmp_path / "recipe.yaml", tmp_path / "layer.yaml"
    recipe.write_text("model: {dtype: bfloat16}\ncluster: {device: cuda}\ndata: {split: test}\n")
    layer.write_text("model: {path: Qwen/Qwen3-4B, max_length: 4096}\nlearner: {tokens_per_microbatch: 4096}\n")
    seen = []
    monkeypatch.setattr(contest, "bench", lambda config, *args, **kwargs: seen.append(config) or {})
    monkeypatch.setattr(figures, "show", lambda report, console: None)
    words = ["bench", str(recipe), str(layer), "--out", str(tmp_path / "out"), "--synthetic-model", "lab"]
    assert main([*words, "--lengths", "12/7/5", "rollout.max_completion_tokens=4"]) == 0
    (config,) = seen
    assert config.model.path == str(tmp_path / "out" / "model")
    assert config.data.split == "train", "of the rows that are made"
    assert (config.model.dtype, config.model.max_length, config.rollout.max_completion_tokens) == ("bfloat16", 40, 4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "the following arguments are required: recipe\n"),
        (["bench", "r.yaml", "--out", "new", "--pairs", "x"], "--pairs: got 'x', expected a whole number above 0"),
        (["bench", "r.yaml", "--out", "new", "--pairs", "0"], "--pairs: got '0', expected a whole number above 0"),
        *(
            (["train", "r.yaml", *words], f"unrecognized arguments: {' '.join(words)}; {says}\n")
            for words, says in (
                (["--steps", "5"], "a field is given as steps=5"),
                (["--steps=5"], "a field is given as steps=5"),
                (["optim.learning_rate", "1e-5"], "a field is given as optim.learning_rate=1e-5"),
                (["--learning-rate", "1e-5"], "a field is given as optim.learning_rate=1e-5"),
                (["--no-such", "1"], "a field is given as no_such=1"),
                (["rows.jsonl"], "rows are given as data.train=rows.jsonl"),
                (["sizes/8x80gb"], "expected section.field=value or FILE.yaml"),
            )
        ),
        (["ckpt", "ls", "run", "a=b"], "unrecognized arguments: a=b\n"),
        (["plan", "r.yaml", "--shape", "qwen3"], "argument --shape: invalid choice: 'qwen3' (choose from"),
        (["lab", "data", "--out", "new", "--word", "t1"], "argument --word: invalid choice: 't1' (choose from"),
        *(
            ([*words, "--out", out], "argument --out: file is a file, expected a folder")
            for words in (
                ["bench", "r.yaml"],
                ["demo"],
                *(["lab", name] for name in ("build", "data", "sweep", "sequence")),
            )
            for out in ("file", "file/below")
        ),
    ],
)
def test_a_wrong_word_is_refused_with_what_is_expected(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("kept")
    with pytest.raises(SystemExit, match="2"):
        main(words)
    told = capsys.readouterr().err
    assert message in told
    assert told.startswith(f"usage: sdft {words[0]}")
    assert Path("file").read_text() == "kept"


def test_a_folder_of_an_extras_name_is_not_the_extra(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "left_by_it").mkdir()
    assert find_spec("left_by_it")
    assert not is_installed("left_by_it")
    assert is_installed("yaml")


@pytest.mark.parametrize("words", [["eval"], ["harness", "--tasks", "x"], ["bench"]], ids=lambda words: words[0])
def test_a_folder_that_cannot_be_written_to_is_told_before_the_work(recipe, tmp_path, monkeypatch, capsys, words):
    monkeypatch.setattr("os.access", lambda place, mode: place != tmp_path)  # as of a file system that is read-only
    assert main([words[0], str(recipe), *words[1:], "--out", str(tmp_path / "a" / "b")]) == 2
    assert f"--out: {tmp_path}/a/b: nothing can be written to {tmp_path}: give another" in capsys.readouterr().err


def test_extras_that_are_missing_are_told_with_the_command_that_adds_them(recipe, tmp_path, monkeypatch, capsys):
    from sdft_dist.sweep.tune import Asking

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["harness", str(recipe), "--out", str(tmp_path / "out")]) == 2
    assert "in the repository: pip install -e '.[eval]'" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"in the repository: pip install -e '.\[sweep\]'"):
        Asking(None, [], [], 1)


@pytest.mark.parametrize("fields", [["eval.every=0"], ["eval.sets={own: own.jsonl}"]])
def test_a_demo_without_its_accuracies_is_refused_before_it_runs(tmp_path, monkeypatch, capsys, fields):
    from sdft_dist.lab import demo

    monkeypatch.setattr(demo, "run", lambda *_, **__: pytest.fail("ran"))
    assert main(["demo", "--out", str(tmp_path / "out"), *fields]) == 2
    assert "eval: the demo compares accuracies on its own sets, got eval.every=" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_base_is_not_built_into_a_used_folder(tmp_path, capsys):
    (tmp_path / "precious.txt").write_text("kept")
    assert main(["lab", "build", "--out", str(tmp_path)]) == 2
    assert f"--out: {tmp_path} is not empty" in capsys.readouterr().err


@pytest.fixture
def quick_base(monkeypatch):
    """The shipped base in the place of the one that `sdft lab sequence` trains for minutes."""
    from sdft_dist.lab import base

    monkeypatch.setattr(base, "build_with_progress", lambda *_: base.shipped_base())


@pytest.mark.parametrize("name", ["data", "sweep", "sequence"])
def test_the_labs_files_do_not_overwrite_others(tmp_path, capsys, quick_base, name):
    (tmp_path / "recipe.yaml").write_text("mine")
    assert main(["lab", name, "--out", str(tmp_path)]) == 2
    assert f"--out: {tmp_path} is already in use: give another, or remove it" in capsys.readouterr().err
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("recipe.yaml", "mine")]


def test_the_same_plan_may_be_written_again_and_a_changed_one_stays(tmp_path, capsys, quick_base):
    """As `make words` does when it goes on."""
    out = tmp_path / "words"
    for _ in range(2):
        assert main(["lab", "sequence", "--out", str(out)]) == 0
        assert capsys.readouterr().out == f"{out / 'plan.yaml'}\n"
        (out / "runs").mkdir(exist_ok=True)
    plan = out / "plan.yaml"
    plan.write_text(plan.read_text().replace("[0, 1, 2]", "[3]"))
    assert main(["lab", "sequence", "--out", str(out)]) == 2
    assert "seeds: [3]" in plan.read_text()


def parsers(parser, name="sdft"):
    """Every command by its name, without those that only hold others."""
    (commands,) = [a for a in parser._actions if hasattr(a, "choices") and hasattr(a, "add_parser")] or [None]
    yield name, parser
    for word, sub in commands.choices.items() if commands else ():
        yield from parsers(sub, f"{name} {word}")


def test_every_command_and_option_says_what_it_is():
    from sdft_dist.cli import _parser

    found = dict(parsers(_parser()))
    assert len(found) > 20
    for name, parser in found.items():
        assert parser.description, name
        for action in parser._actions:
            assert action.help or hasattr(action, "add_parser"), (name, action.dest)
            default = action.default not in (None, False, "==SUPPRESS==", []) and action.option_strings
            assert not default or "default" in action.help, (name, action.dest)


def test_help_tells_exit_codes_shapes_and_how_a_sweep_is_looked_at(capsys):
    from sdft_dist.bench.synthetic import SHAPES

    def shown(*words):
        with pytest.raises(SystemExit, match="0"):
            main([*words, "--help"])
        return " ".join(capsys.readouterr().out.split())

    assert "Exit codes: 0 done;" in shown()
    assert "usage: sdft sweep [-h] [--dry-run] [status | report] SWEEP.yaml run" in shown("sweep")
    for command in ("bench", "plan"):
        text = shown(command).replace("- ", "-")  # broken at a hyphen
        assert ", ".join(SHAPES) in text


def test_a_scorer_may_be_a_module_in_the_current_folder(recipe, tmp_path, monkeypatch, capsys):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "precious.txt").touch()
    (tmp_path / "own_scorer.py").write_text("def right(completion, answer):\n    return True\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    fields = ["eval.scorer=own_scorer:right", "cluster.device=cpu", f"run_dir={tmp_path / 'used'}"]
    assert main(["train", str(recipe), *fields]) == 2
    assert "used holds files that are not a run's" in capsys.readouterr().err, "what is looked at after the scorer"


def test_a_reader_that_has_seen_enough_is_no_error(recipe):
    command = [sys.executable, "-m", "sdft_dist.cli", "train", str(recipe), "--dry-run"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        run.stdout.close()
        assert run.stderr.read() == ""
    assert run.returncode == 1


def test_export_of_no_run(tmp_path, capsys):
    assert main(["ckpt", "export", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_a_run_without_checkpoints_says_so(tmp_path, capsys):
    (tmp_path / "config.yaml").touch()
    for action in ("ls", "verify"):
        assert main(["ckpt", action, str(tmp_path)]) == 0
        assert capsys.readouterr().out == f"{tmp_path}: no checkpoint yet\n"


@pytest.mark.parametrize("action", ["ls", "verify"])
def test_a_checkpoint_that_its_run_removes_meanwhile_is_no_damaged_one(tmp_path, monkeypatch, capsys, action):
    (tmp_path / "config.yaml").touch()
    save(Commits(tmp_path / "checkpoints"), 2)
    before = iter([[1, 2], [1, 2]])
    monkeypatch.setattr(Commits, "steps", lambda self: next(before, [2]))
    assert main(["ckpt", action, str(tmp_path)]) == 0
    assert re.findall(r"step +(\d)", capsys.readouterr().out) == ["2"]


def test_a_clean_clone_passes_the_unit_tests_through_make(tmp_path):
    """`make test` in a fresh clone, with this environment in the place of a new one and some of the tests."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        pytest.skip("not a git checkout")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(root), str(clone)], check=True)
    environment = Path(sys.prefix)
    marker = environment / ".installed"
    if not marker.exists():
        pytest.skip("this environment was not made by `make setup`")
    done = subprocess.run(
        ["make", "test", "-o", str(marker), f"VENV={environment}", "TESTS=tests/test_batching.py tests/test_wire.py"],
        cwd=clone, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
    assert "Installing" not in done.stdout


def test_a_dry_run_prints_settings_and_needs_and_starts_nothing(recipe, tmp_path, capsys):
    assert main(["train", str(recipe), "learner.ranks=2", "cluster.device=auto", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert yaml.safe_load(shown)["learner"]["ranks"] == 2
    assert "# learner ranks 2 × 1, generators 1 × 1, teachers 1 × 1: 4 GPUs on cuda" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("method", ["dft", "sdft"])
def test_sft_by_another_method_is_refused(recipe, capsys, method):
    assert main(["sft", str(recipe), f"method={method}", "--dry-run"]) == 2
    says = f"method={method}: sdft sft is method=sft; for another method: sdft train RECIPE … method={method}"
    assert says in capsys.readouterr().err
    assert main(["sft", str(recipe), "method=sft", "--dry-run"]) == 0
    assert "\nmethod: sft\n" in f"\n{capsys.readouterr().out}"
