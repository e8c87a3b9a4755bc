"""The `sdft` command: its words, and how it ends. What each subcommand does is in commands.py."""

from __future__ import annotations

import argparse
import faulthandler
import os
import select
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sdft_dist import __version__, commands
from sdft_dist.bench.synthetic import SHAPES
from sdft_dist.lab.base import BaseSettings
from sdft_dist.lab.world import DOMAINS, TAUGHT

if TYPE_CHECKING:
    Subparsers = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_CODES = (
    "Exit codes: 0 done; 1 a bench worse than its --baseline, a damaged checkpoint, a plan in which nothing fits, or a "
    "bug; 2 configuration or data error; 3 asked to stop, and saved; 4 machines, disks or a judge's endpoint failed; "
    "5 diverged; 130 interrupted."
)
LENGTHS = "300/400/400"
A_LENGTH = "prompt/demonstration/completion, tokens (default: %(default)s)"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run one command, and turn the errors that a user can fix into one message."""
    args = _parse(argv)
    with suppress(AttributeError, OSError, ValueError):  # where standard error is no file
        faulthandler.enable()  # a crash of native code says where
    # accelerate imports DeepSpeed to save a model, which looks for a GPU and prints that there is none. Learners set
    # their own.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if os.getcwd() not in sys.path:  # for a scorer of the user's own; last, so that it hides nothing
        sys.path.append(os.getcwd())
    from sdft_dist.errors import Diverged, Fault, Preempted, UserError

    try:
        args.command(args)
        sys.stdout.flush()
    except UserError as e:
        return _fail(getattr(e, "cause", e), 2)
    except Preempted as e:
        return _fail(e, 3)
    except Fault as e:
        return _fail(e, 4)
    except Diverged as e:
        return _fail(e, 5)
    except KeyboardInterrupt as e:
        print("\n".join(["sdft: interrupted", *getattr(e, "__notes__", ())]), file=sys.stderr)
        return 130
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout.fileno()):
            raise  # it was another pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # of a reader that has seen enough, as `head`
        return 1
    return 0


def _nobody_reads(pipe: int) -> bool:
    """Whether the other end of a pipe that is written to has been closed."""
    poll = select.poll()
    poll.register(pipe, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may also come after options, where argparse does not look for them."""
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    takes_fields = hasattr(args, "overrides")
    strange = [w for w in getattr(args, "overrides", []) if not commands.is_override(w)]
    strange += [w for w in more if w.startswith("-") or not (commands.is_override(w) and takes_fields)]
    if strange:
        hint = _as_field(strange) if takes_fields else ""
        getattr(args, "parser", parser).error(f"unrecognized arguments: {' '.join(strange)}{hint}")
    if more:
        args.overrides = [*args.overrides, *more]
    return args


def _as_field(words: Sequence[str]) -> str:
    """How `--steps 5`, `--steps=5` or `steps 5` should read, as a hint."""
    from sdft_dist.recipe import spelled

    if words[0].endswith((".jsonl", ".json", ".parquet")):
        return f"; rows are given as data.train={words[0]}"
    name, _, value = words[0].lstrip("-").partition("=")
    value = value or " ".join(words[1:2])
    if not value:
        return "; expected section.field=value or FILE.yaml"
    return f"; a field is given as {spelled(name.replace('-', '_'))}={value}"


def _fail(error: BaseException, code: int) -> int:
    print(f"sdft: error: {error}", file=sys.stderr)
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sdft",
        description="Self-Distillation Fine-Tuning (arXiv 2601.19897) on a Ray cluster.",
        epilog=EXIT_CODES,
    )
    parser.add_argument("--version", action="version", version=f"sdft {__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_training(subparsers)
    _add_measuring(subparsers)
    _add_results(subparsers)
    _add_many_runs(subparsers)
    _add_plan(subparsers)
    _add_lab(subparsers)
    _add_checkpoints(subparsers)
    return parser


def _command(subparsers: Subparsers, name: str, what: str) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(name, help=what, description=what)
    parser.set_defaults(parser=parser)
    return parser


def _with_recipe(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    sub.add_argument("recipe", help="YAML file, such as those in deploy/recipes/")
    what = "fields to override, or further YAML files that override the recipe (see `sdft fields`)"
    sub.add_argument("overrides", nargs="*", default=[], metavar="section.field=value | FILE.yaml", help=what)
    return sub


def _add_training(subparsers: Subparsers) -> None:
    dry_run = (
        "print the resolved settings and the GPUs they ask for; rows, model and scorer are read only when a run or "
        "preflight starts"
    )
    for name, what in (("train", "train a model as a recipe says"), ("sft", "plain SFT on the same rows, to compare")):
        sub = _with_recipe(_command(subparsers, name, what))
        sub.add_argument(
            "--resume",
            metavar="FROM",
            help="continue from the newest checkpoint of run_dir (auto), from its step=N, or, in a new run_dir, from "
            "another run's folder or checkpoint",
        )
        sub.add_argument("--allow-changes", action="store_true", help="resume although settings or data have changed")
        sub.add_argument("--dry-run", action="store_true", help=dry_run)
        sub.set_defaults(command=commands.train, method="sft" if name == "sft" else None)

    fields = _command(subparsers, "fields", "list every field of a recipe with its default and meaning")
    fields.add_argument("word", nargs="?", default="", metavar="WORD", help="only fields with this in their names")
    fields.set_defaults(command=commands.fields)


def _add_measuring(subparsers: Subparsers) -> None:
    check = _with_recipe(_command(subparsers, "preflight", "check data and model before any training"))
    check.add_argument("--rows", type=_positive, default=64, help="number of rows to measure on (default: %(default)s)")
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")
    check.set_defaults(command=commands.preflight)

    bench = _with_recipe(_command(subparsers, "bench", "measure throughput: SDFT and SFT in turns"))
    bench.add_argument("--out", type=_folder, required=True, help="new folder for bench.json, traces and timeline.png")
    bench.add_argument(
        "--pairs", type=_positive, default=5, help="measured segments of each contestant (default: %(default)s)"
    )
    bench.add_argument("--segment", type=_positive, default=20, help="steps in a segment (default: %(default)s)")
    what = f"random weights instead of model.path, and rows of random words: {', '.join(SHAPES)}"
    bench.add_argument("--synthetic-model", metavar="SHAPE", choices=SHAPES, help=what)
    bench.add_argument("--lengths", default=LENGTHS, help=f"with --synthetic-model: {A_LENGTH}")
    only = bench.add_mutually_exclusive_group()
    only.add_argument(
        "--peer", choices=["trl", "sync"], help="also measure TRL's SDFTTrainer, or SDFT at max_staleness 0"
    )
    for role in ("generator", "teacher", "learner"):
        only.add_argument(
            f"--{role}-only", dest="only", action="store_const", const=role, help=f"only the {role}, on PAIRS batches"
        )
    bench.add_argument("--baseline", type=Path, help="an earlier bench.json; exit 1 where this run is 10%% worse")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.set_defaults(command=commands.bench)


def _add_results(subparsers: Subparsers) -> None:
    page = _command(subparsers, "report", "write one page about a run, or comparing several")
    page.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    page.add_argument("--out", type=_folder, required=True, help="new folder for index.html and its pictures")
    page.add_argument("--new", metavar="SET", help="held-out set of the task that is taught (default: the first)")
    page.set_defaults(command=commands.report)

    own = _with_recipe(_command(subparsers, "eval", "measure model.path on the recipe's held-out sets"))
    own.add_argument("--out", type=_folder, help="new folder for results.json and rows.jsonl")
    own.add_argument("--json", action="store_true", help="print JSON instead of a table")
    own.set_defaults(command=commands.evaluate)

    other = _with_recipe(_command(subparsers, "harness", "run lm-evaluation-harness on model.path"))
    other.add_argument("--tasks", default="paper", help="comma-separated; paper is the paper's six (default)")
    other.add_argument("--include", type=Path, metavar="DIR", help="folder with your own task files")
    other.add_argument("--limit", type=_positive, help="only the first rows of each task")
    other.add_argument("--chat", action="store_true", help="wrap prompts in the chat template")
    other.add_argument("--run-code", action="store_true", help="allow tasks that execute code written by the model")
    other.add_argument("--out", type=_folder, required=True, help="new folder for results.json and every row")
    other.set_defaults(command=commands.harness)


def _add_many_runs(subparsers: Subparsers) -> None:
    sequence = _command(subparsers, "continual", "teach tasks one after another, with several methods")
    sequence.add_argument("plan", type=Path, help="YAML file; `sdft lab sequence` writes one")
    sequence.set_defaults(command=commands.continual)

    sweep = _command(subparsers, "sweep", "run a search over settings, on Ray Tune")
    sweep.usage = "%(prog)s [-h] [--dry-run] [status | report] SWEEP.yaml"
    sweep.add_argument(
        "words",
        nargs="+",
        metavar="[status | report] SWEEP.yaml",
        help="run the trials that are missing, or look at those that are there",
    )
    sweep.add_argument("--dry-run", action="store_true", help="list the trials")
    sweep.set_defaults(command=commands.sweep)


def _add_plan(subparsers: Subparsers) -> None:
    what = "predict cost, memory and the split of GPUs, without starting anything"
    plan = _with_recipe(_command(subparsers, "plan", what))
    plan.add_argument("--gpu", default="h200", help="h200, h100 or a100 (default: %(default)s)")
    plan.add_argument(
        "--gpus", nargs="+", default=[], metavar="N", help="the best split of N GPUs (default: the recipe's own)"
    )
    what = f"shape of a known model instead of model.path: {', '.join(SHAPES)}"
    plan.add_argument("--shape", metavar="SHAPE", choices=SHAPES, help=what)
    plan.add_argument("--lengths", default=LENGTHS, help=A_LENGTH)
    plan.add_argument("--simulate", action="store_true", help="also run a discrete-event simulation of each split")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.set_defaults(command=commands.plan)


def _add_lab(subparsers: Subparsers) -> None:
    demo = _command(subparsers, "demo", "teach a small model a new word with SDFT and with SFT")
    demo.add_argument("--out", type=_folder, default=None, help="new folder (default: runs/demo, or runs/demo-2, …)")
    demo.add_argument("--seeds", type=_positive, default=1, help="repeat with this many seeds (default: 1)")
    demo.add_argument("--steps", type=_positive, default=None, help="steps of each run (default: the recipe's)")
    demo.add_argument(
        "--rebuild-base", action="store_true", help="train the base model again instead of using the included one"
    )
    demo.add_argument(
        "overrides", nargs="*", default=[], metavar="section.field=value", help="fields of the lab's recipe"
    )
    demo.set_defaults(command=commands.demo)

    lab = _command(subparsers, "lab", "a small world to try things without pretrained weights")
    lab_commands = lab.add_subparsers(required=True, metavar="COMMAND")
    build = _command(lab_commands, "build", "train the lab's base model (about 3 minutes on two cores)")
    build.add_argument("--out", type=_folder, default=None, help="folder (default: a cache keyed by the settings)")
    build.add_argument(
        "--seed", type=int, default=BaseSettings.seed, help="seed of weights and rows (default: %(default)s)"
    )
    build.add_argument(
        "--steps", type=_positive, default=BaseSettings.steps, help="optimizer steps (default: %(default)s)"
    )
    build.set_defaults(command=commands.lab_build)
    teach = _command(lab_commands, "data", "write the files that teach one new word")
    teach.add_argument("--out", type=_folder, required=True, help="new folder")
    teach.add_argument("--word", choices=TAUGHT, default="t35", help="word to teach (default: %(default)s)")
    teach.add_argument("--domain", choices=DOMAINS, default="a", help="domain of the symbols (default: %(default)s)")
    teach.add_argument("--seed", type=int, default=0, help="seed of the training rows (default: %(default)s)")
    teach.set_defaults(command=commands.lab_data)
    sequence = _command(lab_commands, "sequence", "write a plan for `sdft continual`: three words in sequence")
    sequence.add_argument("--out", type=_folder, required=True, help="new folder, or one with the same plan")
    sequence.add_argument("--sweep", action="store_true", help="the sweep that chose its settings")
    sequence.set_defaults(command=commands.lab_sequence)
    settings = _command(lab_commands, "sweep", "write a sweep for `sdft sweep`: one word, twelve settings")
    settings.add_argument("--out", type=_folder, required=True, help="new folder")
    settings.set_defaults(command=commands.lab_sweep)


def _add_checkpoints(subparsers: Subparsers) -> None:
    state = _command(subparsers, "status", "show the progress of a run")
    state.add_argument("run", type=Path, help="run directory")
    state.add_argument("--json", action="store_true", help="print JSON instead of text")
    state.set_defaults(command=commands.status)

    ckpt = _command(subparsers, "ckpt", "list, verify or export checkpoints")
    ckpt_commands = ckpt.add_subparsers(required=True, metavar="COMMAND")
    listing = _command(ckpt_commands, "ls", "list a run's checkpoints")
    listing.add_argument("run", type=Path, help="run directory")
    listing.set_defaults(command=commands.list_checkpoints)
    verify = _command(ckpt_commands, "verify", "read and hash every file of a run's checkpoints")
    verify.add_argument("run", type=Path, help="run directory")
    verify.set_defaults(command=commands.verify_checkpoints)
    export = _command(ckpt_commands, "export", "write a checkpoint as a Hugging Face folder")
    export.add_argument("run", type=Path, help="run directory")
    export.add_argument("--out", type=_folder, required=True, help="new folder")
    what = "the trained weights, or their average (default: %(default)s)"
    export.add_argument("--weights", choices=("student", "ema"), default="student", help=what)
    export.add_argument("--adapter", action="store_true", help="only the adapter, for peft (default: merged)")
    export.add_argument("--step", type=int, default=None, help="default: the newest")
    export.set_defaults(command=commands.export)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number above 0")
    return int(text)


def _folder(text: str) -> Path:
    """A folder that is there or can be made: nothing on the way to it is a file."""
    for place in (Path(text), *Path(text).parents):
        if place.is_file():
            raise argparse.ArgumentTypeError(f"{place} is a file, expected a folder")
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
