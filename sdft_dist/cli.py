"""The `sdft` command. Heavy imports happen after parsing, so that --help is instant."""

from __future__ import annotations

import argparse
import faulthandler
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sdft_dist import __version__
from sdft_dist.lab.base import BaseSettings
from sdft_dist.lab.world import DOMAINS, TAUGHT
from sdft_dist.synthetic import SHAPES

if TYPE_CHECKING:
    from sdft_dist.config import Config

    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

EXIT_CODES = (
    "Exit codes: 0 done; 1 a bench worse than its --baseline, a damaged checkpoint, or a fault of this program; "
    "2 configuration or data error; 3 asked to stop and saved; 4 machines or disks failed; 5 diverged; 130 interrupted."
)
LENGTHS = "300/400/400"
A_LENGTH = "prompt/demonstration/completion, tokens (default: %(default)s)"


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, run one command, and turn the errors that a user can mend into one message."""
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
    except UserError as e:
        return _fail(getattr(e, "cause", e), 2)
    except Preempted as e:
        return _fail(e, 3)
    except Fault as e:
        return _fail(e, 4)
    except Diverged as e:
        return _fail(e, 5)
    except KeyboardInterrupt:
        print("sdft: interrupted", file=sys.stderr)
        return 130
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Overrides may also come after options, where argparse does not look for them."""
    parser = _parser()
    args, more = parser.parse_known_args(argv)
    takes_fields = hasattr(args, "overrides")
    strange = [w for w in getattr(args, "overrides", []) if not _is_override(w)]
    strange += [w for w in more if w.startswith("-") or not (_is_override(w) and takes_fields)]
    if strange:
        parser.error(f"unrecognized arguments: {' '.join(strange)}{_as_field(strange) if takes_fields else ''}")
    if more:
        args.overrides = [*args.overrides, *more]
    return args


def _is_override(word: str) -> bool:
    return "=" in word or word.endswith((".yaml", ".yml"))


def _as_field(words: Sequence[str]) -> str:
    """How `--steps 5`, `--steps=5` or `steps 5` should read, as a hint."""
    name, _, value = words[0].lstrip("-").partition("=")
    value = value or " ".join(words[1:2])
    return f"; a field is given as {name}={value}" if value else "; expected section.field=value or FILE.yaml"


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
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    _add_training(commands)
    _add_measuring(commands)
    _add_lab(commands)
    _add_checkpoints(commands)
    return parser


def _command(commands: Commands, name: str, what: str) -> argparse.ArgumentParser:
    return commands.add_parser(name, help=what, description=what)


def _with_recipe(sub: argparse.ArgumentParser) -> argparse.ArgumentParser:
    sub.add_argument("recipe", help="YAML file; see deploy/recipes/")
    what = "fields to override, or further YAML files whose fields replace the recipe's"
    sub.add_argument("overrides", nargs="*", default=[], metavar="section.field=value | FILE.yaml", help=what)
    return sub


def _add_training(commands: Commands) -> None:
    dry_run = (
        "print the resolved settings and what they ask of Ray; settings only: rows, model and scorer are read when a "
        "run or preflight starts"
    )
    for name, what in (("train", "train as a recipe says"), ("sft", "train on the same rows with plain SFT")):
        sub = _with_recipe(_command(commands, name, what))
        sub.add_argument(
            "--resume",
            metavar="FROM",
            help="go on from the newest checkpoint of run_dir (auto), from its step=N, or, in a new run_dir, from "
            "another run's folder or checkpoint",
        )
        sub.add_argument("--allow-changes", action="store_true", help="resume although settings or data have changed")
        sub.add_argument("--dry-run", action="store_true", help=dry_run)
        sub.set_defaults(command=_train, method="sft" if name == "sft" else None)


def _add_measuring(commands: Commands) -> None:
    check = _with_recipe(_command(commands, "preflight", "check data and model before any training"))
    check.add_argument("--rows", type=_positive, default=64, help="rows to measure on (default: %(default)s)")
    check.add_argument("--json", action="store_true", help="print JSON instead of a table")
    check.set_defaults(command=_preflight)

    bench = _with_recipe(_command(commands, "bench", "measure throughput: SDFT beside SFT, taking turns"))
    bench.add_argument("--out", type=_folder, required=True, help="new folder for bench.json, traces and timeline.png")
    bench.add_argument("--pairs", type=_positive, default=5, help="counted segments of each (default: %(default)s)")
    bench.add_argument("--segment", type=_positive, default=20, help="steps in a segment (default: %(default)s)")
    what = f"random weights in the place of model.path, and rows of random words: {', '.join(SHAPES)}"
    bench.add_argument("--synthetic-model", metavar="SHAPE", choices=SHAPES, help=what)
    bench.add_argument("--lengths", default=LENGTHS, help=f"with --synthetic-model: {A_LENGTH}")
    only = bench.add_mutually_exclusive_group()
    only.add_argument("--peer", choices=["trl", "sync"], help="also TRL's SDFTTrainer, or SDFT at max_staleness 0")
    for role in ("generator", "teacher", "learner"):
        only.add_argument(
            f"--{role}-only", dest="only", action="store_const", const=role, help=f"the {role} by itself, PAIRS batches"
        )
    bench.add_argument("--baseline", type=Path, help="an earlier bench.json; exit 1 where this run is 10%% worse")
    bench.add_argument("--json", action="store_true", help="print JSON instead of a table")
    bench.set_defaults(command=_bench)

    page = _command(commands, "report", "one page about a run, or that compares several")
    page.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directories")
    page.add_argument("--out", type=_folder, required=True, help="new folder for index.html and its pictures")
    page.add_argument("--new", metavar="SET", help="the held-out set of what is taught (default: the first)")
    page.set_defaults(command=_report)

    other = _with_recipe(_command(commands, "harness", "lm-evaluation-harness on the model of a recipe"))
    other.add_argument("--tasks", default="paper", help="comma-separated; paper is the paper's six (default)")
    other.add_argument("--include", type=Path, metavar="DIR", help="folder with task files of your own")
    other.add_argument("--limit", type=_positive, help="only the first rows of each task")
    other.add_argument("--chat", action="store_true", help="wrap prompts in the chat template")
    other.add_argument("--run-code", action="store_true", help="allow tasks that run code which the model has written")
    other.add_argument("--out", type=_folder, required=True, help="folder for results.json and every row")
    other.set_defaults(command=_harness)

    sequence = _command(commands, "continual", "teach tasks one after another, with several methods")
    sequence.add_argument("plan", type=Path, help="YAML file; `sdft lab sequence` writes one")
    sequence.set_defaults(command=_continual)

    sweep = _command(commands, "sweep", "whole runs over a space of settings, on Ray Tune")
    sweep.usage = "%(prog)s [-h] [--dry-run] [status | report] SWEEP.yaml"
    sweep.add_argument(
        "words", nargs="+", metavar="[status | report] SWEEP.yaml", help="run what is missing of it, or look at it"
    )
    sweep.add_argument("--dry-run", action="store_true", help="list the trials")
    sweep.set_defaults(command=_sweep)

    what = "predict cost, memory and the split of GPUs, without starting anything"
    plan = _with_recipe(_command(commands, "plan", what))
    plan.add_argument("--gpu", default="h200", help="h200, h100 or a100 (default: %(default)s)")
    plan.add_argument(
        "--gpus", nargs="+", default=[], metavar="N", help="the best split of N GPUs (default: the recipe's own)"
    )
    what = f"instead of model.path: {', '.join(SHAPES)}"
    plan.add_argument("--shape", metavar="SHAPE", choices=SHAPES, help=what)
    plan.add_argument("--lengths", default=LENGTHS, help=A_LENGTH)
    plan.add_argument("--simulate", action="store_true", help="also run a discrete-event simulation of each split")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.set_defaults(command=_plan)


def _add_lab(commands: Commands) -> None:
    demo = _command(commands, "demo", "teach a small model a new word with SDFT and with SFT")
    demo.add_argument("--out", type=_folder, default=None, help="new folder (default: runs/demo, or runs/demo-2, …)")
    demo.add_argument("--seeds", type=_positive, default=1, help="repeat with this many seeds (default: 1)")
    demo.add_argument("--steps", type=_positive, default=None, help="of each run (default: the recipe's)")
    demo.add_argument("--rebuild-base", action="store_true", help="train the base anew instead of the shipped one")
    demo.add_argument(
        "overrides", nargs="*", default=[], metavar="section.field=value", help="fields of the lab's recipe"
    )
    demo.set_defaults(command=_demo)

    lab = _command(commands, "lab", "the small world for trying things without pretrained weights")
    lab_commands = lab.add_subparsers(required=True, metavar="COMMAND")
    build = _command(lab_commands, "build", "train the lab's base model (about 3 minutes on two cores)")
    build.add_argument("--out", type=_folder, default=None, help="folder (default: a cache keyed by the settings)")
    build.add_argument("--seed", type=int, default=BaseSettings.seed, help="of weights and rows (default: %(default)s)")
    build.add_argument(
        "--steps", type=_positive, default=BaseSettings.steps, help="optimizer steps (default: %(default)s)"
    )
    build.set_defaults(command=_lab_build)
    teach = _command(lab_commands, "data", "write the files that teach one new word")
    teach.add_argument("--out", type=_folder, required=True, help="new folder")
    teach.add_argument("--word", choices=TAUGHT, default="t35", help="what is taught (default: %(default)s)")
    teach.add_argument("--domain", choices=DOMAINS, default="a", help="whose symbols (default: %(default)s)")
    teach.add_argument("--seed", type=int, default=0, help="of the rows to train on (default: %(default)s)")
    teach.set_defaults(command=_lab_data)
    sequence = _command(lab_commands, "sequence", "write a plan for `sdft continual`: three words in sequence")
    sequence.add_argument("--out", type=_folder, required=True, help="new folder, or one with the same plan")
    sequence.add_argument("--sweep", action="store_true", help="the sweep that its settings were chosen by")
    sequence.set_defaults(command=_lab_sequence)
    settings = _command(lab_commands, "sweep", "write a sweep for `sdft sweep`: one word, twelve settings")
    settings.add_argument("--out", type=_folder, required=True, help="new folder")
    settings.set_defaults(command=_lab_sweep)


def _add_checkpoints(commands: Commands) -> None:
    state = _command(commands, "status", "how far a run is")
    state.add_argument("run", type=Path, help="run directory")
    state.add_argument("--json", action="store_true", help="print JSON instead of text")
    state.set_defaults(command=_status)

    ckpt = _command(commands, "ckpt", "checkpoints of a run")
    ckpt_commands = ckpt.add_subparsers(required=True, metavar="COMMAND")
    listing = _command(ckpt_commands, "ls", "list a run's checkpoints")
    listing.add_argument("run", type=Path, help="run directory")
    listing.set_defaults(command=_list_checkpoints)
    verify = _command(ckpt_commands, "verify", "read and hash every file of a run's checkpoints")
    verify.add_argument("run", type=Path, help="run directory")
    verify.set_defaults(command=_verify_checkpoints)
    export = _command(ckpt_commands, "export", "write a checkpoint as a Hugging Face folder")
    export.add_argument("run", type=Path, help="run directory")
    export.add_argument("--out", type=_folder, required=True, help="new folder")
    what = "what was trained, or its average (default: %(default)s)"
    export.add_argument("--weights", choices=("student", "ema"), default="student", help=what)
    export.add_argument("--adapter", action="store_true", help="the adapters alone, for peft (default: merged)")
    export.add_argument("--step", type=int, default=None, help="default: the newest")
    export.set_defaults(command=_export)


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


def _train(args: argparse.Namespace) -> None:
    from sdft_dist.recipe import load_config

    overrides = [*args.overrides, *([f"method={args.method}"] if args.method else [])]
    config = load_config(args.recipe, overrides)
    if args.dry_run:
        _dry_run(config)
        return
    from sdft_dist.train import run

    rundir = run(config, resume=args.resume, allow_changes=args.allow_changes)
    print(f"Trained model: {rundir.path / 'model'}\nMetrics: {rundir.path / 'metrics.jsonl'}")


def _dry_run(config: Config) -> None:
    """On CUDA unless the recipe says otherwise: whoever asks is seldom on the machine that trains."""
    from sdft_dist.recipe import dump_config
    from sdft_dist.topology import needs, num_gpus

    print(dump_config(config), end="")
    device = "cpu" if config.cluster.device == "cpu" else "cuda"
    wanted = needs(config, device)
    print(f"# {', '.join(map(str, wanted))}: {num_gpus(wanted)} GPUs on {device}")


def _preflight(args: argparse.Namespace) -> None:
    from sdft_dist.recipe import load_config

    config = load_config(args.recipe, args.overrides)
    import json
    from dataclasses import asdict

    from rich.console import Console

    from sdft_dist.preflight import preflight, show

    found = preflight(config, args.rows)
    if args.json:
        print(json.dumps(asdict(found), indent=2))
    else:
        show(found, Console())


def _bench(args: argparse.Namespace) -> None:
    import json

    from sdft_dist.errors import UserError
    from sdft_dist.recipe import is_layer, load_config

    overrides = list(args.overrides)
    if args.baseline and not args.baseline.is_file():
        raise UserError(f"--baseline: {args.baseline} is no file")
    if args.synthetic_model:
        from sdft_dist.synthetic import synthetic

        layers, fields = (list(filter(which, overrides)) for which in (is_layer, lambda text: not is_layer(text)))
        there = load_config(args.recipe, [*layers, "model.path=.", "data.train=.", *fields])
        made = synthetic(args.out, args.synthetic_model, [args.lengths], 1024, there.model.dtype)
        overrides = [*layers, made, *fields]
    config = load_config(args.recipe, overrides)
    from rich.console import Console

    from sdft_dist import bench, bench_roles

    fixed, pairs = bool(args.synthetic_model), args.pairs
    if args.only:
        report = bench_roles.bench_role(config, args.out, args.only, repeats=pairs, fixed=fixed)
        show = bench_roles.show
    else:
        report = bench.bench(config, args.out, pairs=pairs, segment=args.segment, fixed=fixed, peer=args.peer)
        show = bench.show
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        show(report, Console())
    worse = bench.regression(report, json.loads(args.baseline.read_text())) if args.baseline else None
    if worse:
        print(f"sdft: regression: {worse}", file=sys.stderr)
        sys.exit(1)


def _report(args: argparse.Namespace) -> None:
    from sdft_dist.report import report

    print(f"Report: {report(args.runs, args.out, args.new)}")


def _harness(args: argparse.Namespace) -> None:
    from sdft_dist.errors import UserError
    from sdft_dist.recipe import load_config

    config = load_config(args.recipe, args.overrides)
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        raise UserError("sdft harness: needs lm-evaluation-harness; in the repository: pip install -e '.[eval]'")
    from rich.console import Console

    from sdft_dist.harness import harness, save, show

    found = harness(
        config,
        args.tasks.split(","),
        include=args.include,
        limit=args.limit,
        chat=args.chat,
        run_code=args.run_code,
    )
    save(found, args.out)
    show(found, Console())
    print(f"Results: {args.out / 'results.json'}")


def _continual(args: argparse.Namespace) -> None:
    from sdft_dist.continual import continual, load_plan

    plan = load_plan(args.plan)
    from rich.console import Console
    from rich.markdown import Markdown

    from sdft_dist.continual_results import markdown

    Console().print(Markdown(markdown(continual(plan, Console()))))
    print(f"Results: {plan.out}/results.json, table.md, curves.png, normalised.png")


def _sweep(args: argparse.Namespace) -> None:
    from sdft_dist.errors import ConfigError

    *action, path = args.words
    if action not in ([], ["status"], ["report"]):
        raise ConfigError(
            f"sdft sweep: {' '.join(args.words)}: expected SWEEP.yaml, status SWEEP.yaml or report SWEEP.yaml"
        )
    from sdft_dist.sweep import sweep_all, trials
    from sdft_dist.sweep_space import load_sweep

    plan = load_sweep(Path(path))
    if args.dry_run:
        for trial in trials(plan):
            print(f"{trial.name}: {trial.values}")
        return
    from rich.console import Console

    from sdft_dist.sweep_results import markdown, rows, write_report

    if not action:
        sweep_all(plan, Console())
    if action != ["status"]:
        print(f"Results: {write_report(plan)}/results.json, table.md, pareto.png")
    print(markdown(rows(plan)), end="")


def _plan(args: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from rich.console import Console

    from sdft_dist.dimensions import dimensions, read_dimensions
    from sdft_dist.errors import UserError
    from sdft_dist.plan import GPUS, Lengths, as_json, own_plan, plan, show
    from sdft_dist.recipe import load_config
    from sdft_dist.synthetic import parse_lengths

    # Overrides may follow the last of several numbers.
    config = load_config(args.recipe, [*args.overrides, *(word for word in args.gpus if _is_override(word))])
    numbers = [word for word in args.gpus if not _is_override(word)]
    if not all(word.isdecimal() and int(word) for word in numbers):
        raise UserError(f"--gpus: got {' '.join(numbers)}, expected positive numbers")
    if args.gpu not in GPUS:
        raise UserError(f"--gpu: got {args.gpu!r}, expected one of {', '.join(GPUS)}")
    model = dimensions(SHAPES[args.shape]) if args.shape else read_dimensions(config)
    prompt, demonstration, completion = parse_lengths(args.lengths)
    lengths = Lengths(prompt=prompt, demonstration=demonstration, completion=completion)
    gpu = GPUS[args.gpu]
    if prompt + demonstration + completion > config.model.max_length:
        raise UserError(f"--lengths: {args.lengths} is longer than model.max_length={config.model.max_length}")
    own = [] if numbers else [own_plan(config, model, lengths, gpu)]
    plans = own + [plan(config, model, lengths, gpu, int(n)) for n in numbers]
    found = as_json(plans)
    if not args.json:
        show(plans, Console())
    if args.simulate:
        from sdft_dist.simulate import show as show_outcomes
        from sdft_dist.simulate import simulate

        split = [p for p in plans if all(len(group) == 1 for group in p.groups)]
        if not split:
            raise UserError("--simulate: is about roles that have GPUs of their own: give --gpus 3 or more")
        outcomes = [simulate(config, model, lengths, gpu, p) for p in split]
        if not args.json:
            show_outcomes(split, outcomes, Console())
        found += [{"gpus": p.gpus, "simulated": asdict(o)} for p, o in zip(split, outcomes, strict=True)]
    if args.json:
        print(json.dumps(found, indent=2))


def _demo(args: argparse.Namespace) -> None:
    from sdft_dist.demo import demo

    demo(args.out, num_seeds=args.seeds, steps=args.steps, rebuild_base=args.rebuild_base, overrides=args.overrides)


def _lab_build(args: argparse.Namespace) -> None:
    from sdft_dist.lab.base import build_with_progress

    print(build_with_progress(BaseSettings(seed=args.seed, steps=args.steps), args.out))


def _lab_data(args: argparse.Namespace) -> None:
    from sdft_dist.lab.teaching import write_teaching_set
    from sdft_dist.rundir import refuse_used

    refuse_used(args.out)
    write_teaching_set(args.out, args.word, args.domain, args.seed)
    print(args.out)


def _lab_sequence(args: argparse.Namespace) -> None:
    from sdft_dist.lab.base import SEQUENCE_BASE, build_with_progress
    from sdft_dist.lab.teaching import write_sequence, written_sequence

    plan = "sweep" if args.sweep else "final"
    there, base = written_sequence(args.out, plan), build_with_progress(SEQUENCE_BASE)
    print(there or write_sequence(args.out, base, plan))


def _lab_sweep(args: argparse.Namespace) -> None:
    from sdft_dist.lab.base import shipped_base
    from sdft_dist.lab.teaching import write_sweep
    from sdft_dist.rundir import refuse_used

    refuse_used(args.out)
    print(write_sweep(args.out, shipped_base()))


def _status(args: argparse.Namespace) -> None:
    import json

    from sdft_dist.status import show, status

    found = status(args.run)
    print(json.dumps(found, indent=2) if args.json else show(found))


def _list_checkpoints(args: argparse.Namespace) -> None:
    from sdft_dist.rundir import RunDir

    commits = RunDir.open(args.run).commits
    if not commits.steps():
        print(f"{args.run}: no checkpoint yet")
    for step in commits.steps():
        size = sum(p.stat().st_size for p in commits.path(step).iterdir())
        print(f"step {step:6}  {size / 2**20:10.1f} MiB  {commits.path(step)}")


def _verify_checkpoints(args: argparse.Namespace) -> None:
    from sdft_dist.commits import check
    from sdft_dist.rundir import RunDir

    commits, broken = RunDir.open(args.run).commits, 0
    if not commits.steps():
        print(f"{args.run}: no checkpoint yet")
    for step in commits.steps():
        problem = check(commits.path(step))
        broken += problem is not None
        print(f"step {step:6}  {problem or 'sound'}")
    if broken:
        sys.exit(1)


def _export(args: argparse.Namespace) -> None:
    from sdft_dist.export import export, export_adapter
    from sdft_dist.rundir import RunDir

    write = export_adapter if args.adapter else export
    print(write(RunDir.open(args.run), args.out, weights=args.weights, step=args.step))


if __name__ == "__main__":
    sys.exit(main())
