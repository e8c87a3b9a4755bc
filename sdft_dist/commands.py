"""What each subcommand of `sdft` does, with its parsed words. All else is imported when it is called, so that --help is
instant."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from sdft_dist.config import Config


def is_override(word: str) -> bool:
    """Whether a word is a field with its value or a YAML file."""
    return "=" in word or word.endswith((".yaml", ".yml"))


def _tell(found: Any, show: Callable[[Console], None], *, as_json: bool) -> None:
    """Print `found` as JSON, or what `show` makes of it."""
    from rich.console import Console

    if as_json:
        print(json.dumps(found, indent=2))
    else:
        show(Console())


def train(args: argparse.Namespace) -> None:
    """`sdft train`, `sdft sft`. Raises ConfigError where the second is asked for another method."""
    from sdft_dist.errors import ConfigError
    from sdft_dist.recipe import load_config

    own = f"method={args.method}"
    for word in args.overrides if args.method else []:
        if word.startswith("method=") and word not in (own, f"method='{args.method}'", f'method="{args.method}"'):
            raise ConfigError(f"{word}: sdft {args.method} is {own}; for another method: sdft train RECIPE … {word}")
    overrides = [*args.overrides, *([own] if args.method else [])]
    config = load_config(args.recipe, overrides)
    if args.dry_run:
        _dry_run(config)
        return
    from sdft_dist.train import run

    rundir = run(config, resume=args.resume, allow_changes=args.allow_changes)
    from sdft_dist.status import accuracies, status

    if evaluation := status(rundir.path).get("evaluation"):
        print(f"Last evaluation: {accuracies(evaluation)}")
    print(f"Trained model: {rundir.path / 'model'}\nMetrics: {rundir.path / 'metrics.jsonl'}")


def _dry_run(config: Config) -> None:
    """On CUDA unless the recipe says otherwise: whoever asks is seldom on the machine that trains."""
    from sdft_dist.recipe import dump_config
    from sdft_dist.topology import needs, num_gpus

    print(dump_config(config), end="")
    device = "cpu" if config.cluster.device == "cpu" else "cuda"
    wanted = needs(config, device)
    print(f"# {', '.join(map(str, wanted))}: {num_gpus(wanted)} GPUs on {device}")
    if not config.checkpoint.every:
        print("# checkpoint.every=0: after a loss of the learner a run begins anew; what is saved is its end")


def fields(args: argparse.Namespace) -> None:
    """`sdft fields`."""
    import shutil

    from sdft_dist.fields import describe

    print(describe(args.word, width=min(120, shutil.get_terminal_size().columns)))


def preflight(args: argparse.Namespace) -> None:
    """`sdft preflight`."""
    from sdft_dist.recipe import load_config

    config = load_config(args.recipe, args.overrides)
    from dataclasses import asdict

    from sdft_dist.preflight import preflight, show

    found = preflight(config, args.rows)
    _tell(asdict(found), partial(show, found), as_json=args.json)


def bench(args: argparse.Namespace) -> None:
    """`sdft bench`."""
    from sdft_dist.errors import UserError
    from sdft_dist.files import refuse_used
    from sdft_dist.recipe import is_layer, load_config

    overrides = list(args.overrides)
    refuse_used(args.out)
    if args.baseline and not args.baseline.is_file():
        raise UserError(f"--baseline: {args.baseline} is no file")
    if args.synthetic_model:
        from sdft_dist.bench.synthetic import synthetic

        layers, fields = (list(filter(which, overrides)) for which in (is_layer, lambda text: not is_layer(text)))
        there = load_config(args.recipe, [*layers, "model.path=.", "data.train=.", *fields])
        made = synthetic(args.out, args.synthetic_model, [args.lengths], 1024, there.model.dtype)
        overrides = [*layers, made, *fields]
    config = load_config(args.recipe, overrides)
    from sdft_dist.bench import contest, figures, roles

    fixed, pairs = bool(args.synthetic_model), args.pairs
    if args.only:
        report = roles.bench_role(config, args.out, args.only, repeats=pairs, fixed=fixed)
        _tell(report, partial(roles.show, report), as_json=args.json)
    else:
        report = contest.bench(config, args.out, pairs=pairs, segment=args.segment, fixed=fixed, peer=args.peer)
        _tell(report, partial(figures.show, report), as_json=args.json)
    worse = figures.regression(report, json.loads(args.baseline.read_text())) if args.baseline else None
    if worse:
        print(f"sdft: regression: {worse}", file=sys.stderr)
        sys.exit(1)


def report(args: argparse.Namespace) -> None:
    """`sdft report`."""
    from sdft_dist.report.report import report

    print(f"Report: {report(args.runs, args.out, args.new)}")


def evaluate(args: argparse.Namespace) -> None:
    """`sdft eval`."""
    from sdft_dist.evaluate_model import evaluate_model, show
    from sdft_dist.recipe import load_config

    found, judged = evaluate_model(load_config(args.recipe, args.overrides), args.out)
    _tell(found, partial(show, found, judged), as_json=args.json)
    if args.out:
        print(f"Every row: {args.out / 'rows.jsonl'}", file=sys.stderr)


def harness(args: argparse.Namespace) -> None:
    """`sdft harness`."""
    from sdft_dist.errors import UserError
    from sdft_dist.files import refuse_used
    from sdft_dist.recipe import load_config

    config = load_config(args.recipe, args.overrides)
    refuse_used(args.out)
    from sdft_dist.prepare import is_installed

    if not is_installed("lm_eval"):
        raise UserError("sdft harness: needs lm-evaluation-harness; in the repository: pip install -e '.[eval]'")
    from rich.console import Console

    from sdft_dist.harness.harness import harness, save, show

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


def continual(args: argparse.Namespace) -> None:
    """`sdft continual`."""
    from sdft_dist.continual.stages import continual, load_plan

    plan = load_plan(args.plan)
    from rich.console import Console
    from rich.markdown import Markdown

    from sdft_dist.continual.results import markdown

    Console().print(Markdown(markdown(continual(plan, Console()))))
    print(f"Results: {plan.out}/results.json, table.md, curves.png, normalised.png")


def sweep(args: argparse.Namespace) -> None:
    """`sdft sweep`."""
    from sdft_dist.errors import ConfigError

    *action, path = args.words
    if action not in ([], ["status"], ["report"]):
        raise ConfigError(
            f"sdft sweep: {' '.join(args.words)}: expected SWEEP.yaml, status SWEEP.yaml or report SWEEP.yaml"
        )
    from sdft_dist.sweep.space import load_sweep
    from sdft_dist.sweep.trials import sweep_all, trials

    plan = load_sweep(Path(path))
    if args.dry_run:
        for trial in trials(plan):
            print(f"{trial.name}: {trial.values}")
        return
    from rich.console import Console

    from sdft_dist.sweep.results import markdown, rows, write_report

    if not action:
        sweep_all(plan, Console())
    if action != ["status"]:
        print(f"Results: {write_report(plan)}/results.json, table.md, pareto.png")
    print(markdown(rows(plan)), end="")


def plan(args: argparse.Namespace) -> None:
    """`sdft plan`."""
    from dataclasses import asdict

    from rich.console import Console

    from sdft_dist.bench.synthetic import SHAPES, parse_lengths
    from sdft_dist.errors import UserError
    from sdft_dist.planning.dimensions import dimensions, read_dimensions
    from sdft_dist.planning.plan import GPUS, Lengths, as_json, own_plan, plan, show
    from sdft_dist.recipe import load_config

    # Overrides may follow the last of several numbers.
    config = load_config(args.recipe, [*args.overrides, *(word for word in args.gpus if is_override(word))])
    numbers = [word for word in args.gpus if not is_override(word)]
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
        from sdft_dist.planning.simulate import show as show_outcomes
        from sdft_dist.planning.simulate import simulate

        split = [p for p in plans if all(len(group) == 1 for group in p.groups)]
        if not split:
            raise UserError("--simulate: is about roles that have GPUs of their own: give --gpus 3 or more")
        outcomes = [simulate(config, model, lengths, gpu, p) for p in split]
        if not args.json:
            show_outcomes(split, outcomes, Console())
        found += [{"gpus": p.gpus, "simulated": asdict(o)} for p, o in zip(split, outcomes, strict=True)]
    if args.json:
        print(json.dumps(found, indent=2))
    if not any(p.fits for p in plans):
        sys.exit(1)


def demo(args: argparse.Namespace) -> None:
    """`sdft demo`."""
    from sdft_dist.lab.demo import demo

    demo(args.out, num_seeds=args.seeds, steps=args.steps, rebuild_base=args.rebuild_base, overrides=args.overrides)


def lab_build(args: argparse.Namespace) -> None:
    """`sdft lab build`."""
    from sdft_dist.lab.base import BaseSettings, build_with_progress

    print(build_with_progress(BaseSettings(seed=args.seed, steps=args.steps), args.out))


def lab_data(args: argparse.Namespace) -> None:
    """`sdft lab data`."""
    from sdft_dist.files import refuse_used
    from sdft_dist.lab.teaching import write_teaching_set

    refuse_used(args.out)
    write_teaching_set(args.out, args.word, args.domain, args.seed)
    print(args.out)


def lab_sequence(args: argparse.Namespace) -> None:
    """`sdft lab sequence`."""
    from sdft_dist.lab.base import SEQUENCE_BASE, build_with_progress
    from sdft_dist.lab.teaching import write_sequence, written_sequence

    plan = "sweep" if args.sweep else "final"
    there, base = written_sequence(args.out, plan), build_with_progress(SEQUENCE_BASE)
    print(there or write_sequence(args.out, base, plan))


def lab_sweep(args: argparse.Namespace) -> None:
    """`sdft lab sweep`."""
    from sdft_dist.files import refuse_used
    from sdft_dist.lab.base import shipped_base
    from sdft_dist.lab.teaching import write_sweep

    refuse_used(args.out)
    print(write_sweep(args.out, shipped_base()))


def status(args: argparse.Namespace) -> None:
    """`sdft status`."""
    from sdft_dist.status import show, status

    found = status(args.run)
    print(json.dumps(found, indent=2) if args.json else show(found))


def list_checkpoints(args: argparse.Namespace) -> None:
    """`sdft ckpt ls`."""
    from sdft_dist.rundir import RunDir

    commits = RunDir.open(args.run).commits
    if not commits.steps():
        print(f"{args.run}: no checkpoint yet")
    for step in commits.steps():
        try:
            size = sum(p.stat().st_size for p in commits.path(step).iterdir())
        except FileNotFoundError:  # its run goes on, and has removed it meanwhile
            continue
        print(f"step {step:6}  {size / 2**20:10.1f} MiB  {commits.path(step)}")


def verify_checkpoints(args: argparse.Namespace) -> None:
    """`sdft ckpt verify`."""
    from sdft_dist.commits import check
    from sdft_dist.rundir import RunDir

    commits, broken = RunDir.open(args.run).commits, 0
    if not commits.steps():
        print(f"{args.run}: no checkpoint yet")
    for step in commits.steps():
        problem = check(commits.path(step))
        if problem and step not in commits.steps():  # its run goes on, and has removed it meanwhile
            continue
        broken += problem is not None
        print(f"step {step:6}  {problem or 'sound'}")
    if broken:
        sys.exit(1)


def export(args: argparse.Namespace) -> None:
    """`sdft ckpt export`."""
    from sdft_dist.export import export, export_adapter
    from sdft_dist.rundir import RunDir

    write = export_adapter if args.adapter else export
    print(write(RunDir.open(args.run), args.out, weights=args.weights, step=args.step))
