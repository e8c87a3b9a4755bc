"""All that is to be measured on a GPU, one table last: `python -m sdft_dist.bench.gpu_check --out FOLDER`.

Each check is a process of its own with a time limit, so that one that fails frees all memory and costs only the figures
that it has not written yet. Actors take long to start, so what can be measured with the same ones is one check. Roles
are measured one by one, on the learner's GPU: `SDFT/SFT` is the sum of their seconds over those of plain SFT.
`--device cpu --shape lab --large lab` tries the whole of it without a GPU.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sdft_dist.bench.gpu_checks import (
    LARGE,
    LENGTHS,
    LOSS,
    OFFLOADED,
    SIZES,
    SLOWER,
    SMALL_LOSS,
    TUNED,
    Figures,
    agreement,
    engines,
    lab,
    largest,
    learner,
    loss,
)
from sdft_dist.errors import UserError
from sdft_dist.files import refuse_used, write_whole

LIMIT_S = 240  # of one check
Check = Callable[[], Iterator[Figures]]  # what it measures, part by part


def main() -> None:
    """Run all checks, or one of them for itself."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    fits = "default: the first that this machine holds of"
    parser.add_argument("--shape", help=f"of `sdft bench --synthetic-model` ({fits} {', '.join(SIZES)})")
    parser.add_argument("--large", help=f"the shape that is tried with optimizer offload ({fits} {', '.join(LARGE)})")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--limit", type=int, default=LIMIT_S, help="seconds of one check (default: %(default)s)")
    parser.add_argument("--within", type=int, default=1 << 20, help="seconds of all; what does not fit is left out")
    parser.add_argument("--skip", nargs="*", default=[], help="names of checks to leave out")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # else unheard in the background of a script
        found: Figures = {}
        for part in all_checks(args)[args.only]():
            found |= part
            write_whole(_file(args.out, args.only), json.dumps(found, indent=1) + "\n")
        return
    try:
        refuse_used(args.out)
    except UserError as e:
        sys.exit(f"gpu_check: error: {e}")
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.within
    table = Table("check", "figure", "value", "seconds")
    for name in [name for name in all_checks(args) if name not in args.skip]:
        started = time.monotonic()
        failed = _in_a_process(name, args, min(args.limit, end - started))
        written = _read(args.out, name) | failed
        Console(stderr=True).print(f"{name}: {written}", highlight=False)
        write_whole(_file(args.out, name), json.dumps(written, indent=1) + "\n")
        seconds = f"{time.monotonic() - started:.0f}"
        for figure, value in written.items():
            table.add_row(name, figure, f"{value:.4g}" if isinstance(value, float) else str(value), seconds)
            name = seconds = ""
    for length, tokens in LENGTHS.items():
        for what, figure in (("device_s", "device-seconds per sample"), ("predicted_s", "the same, predicted")):
            ratio = sdft_over_sft(args.out, length, what)
            if ratio is not None:
                table.add_row(f"SDFT/SFT, {tokens}", figure, f"{ratio:.3f}", "")
    Console().print(table)


def _in_a_process(name: str, args: argparse.Namespace, limit_s: float) -> dict[str, str]:
    """Why it failed, {} where it did not; its figures are in its file."""
    if limit_s < 1:
        return {"failed": f"no time was left (--within {args.within})"}
    command = [sys.executable, "-m", "sdft_dist.bench.gpu_check", "--only", name, "--out", str(args.out)]
    command += ["--device", args.device]
    for option, shape in (("--shape", args.shape), ("--large", args.large)):
        command += [option, shape] if shape else []
    log = args.out / f"{name}.log"
    with log.open("w") as said, subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said) as process:
        try:
            code = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # so that Ray ends all of it before the next check needs the memory
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            process.kill()
            return {"failed": f"not done in {limit_s:.0f} s"}
    return {"failed": (log.read_text().strip().splitlines() or [f"exit code {code}"])[-1]} if code else {}


def _file(out: Path, name: str) -> Path:
    return out / f"{name}.json"


def _read(out: Path, name: str) -> dict[str, Any]:
    file = _file(out, name)
    return dict(json.loads(file.read_text())) if file.is_file() else {}


def sdft_over_sft(out: Path, length: str, what: str) -> float | None:
    """`what`, device-seconds per sample as measured or predicted, of all roles over that of plain SFT, of the figures
    in `out`; None where one is missing."""
    figures = [("learner", ""), ("engines", "generator "), ("engines", "teacher "), ("sft", "")]
    seconds: list[Any] = [_read(out, name).get(f"{role}{length} {what}") for name, role in figures]
    if None in seconds:
        return None
    *ours, sft = seconds
    return float(sum(ours) / sft)


def all_checks(args: argparse.Namespace) -> dict[str, Check]:
    """By name what each one measures, what matters most first; "agreement" stands on the run of "lab"."""
    train = partial(learner, args.out, args.device)
    shape = partial(largest, [args.shape] if args.shape else SIZES, args.device, TUNED)
    large = partial(largest, [args.large] if args.large else LARGE, args.device, (*TUNED, *OFFLOADED))
    checks: dict[str, Check] = {
        "sft": partial(train, shape, LENGTHS, method="sft"),
        "learner": partial(train, shape, LENGTHS),
        "engines": partial(engines, args.out, args.device, shape),
        "loss": partial(loss, args.device, **(LOSS if args.device == "cuda" else SMALL_LOSS)),
        "lab": partial(lab, args.out, args.device),
        "agreement": partial(agreement, args.out),
        "large": partial(train, large, ["short"], batch=16, more=OFFLOADED),
    }
    for name, fields in SLOWER.items():
        checks[f"sft-{name}"] = partial(train, shape, ["short"], method="sft", more=fields)
    return checks


if __name__ == "__main__":
    main()
