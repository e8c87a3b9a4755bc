"""Memory and time of the full-vocabulary loss, forward and backward: `python -m sdft_dist.bench.loss`.

Each size runs in a process of its own, so that peak resident memory is its own. Printed are the peak
above inputs and outputs, and the time beside that of the matrix products which no implementation can
leave out (both heads forward, and the gradients by states and by head), in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch

from learner.fused import Objective, Targets, chunk_size, weighted_loss
from sdft_dist.memory import own_peak_gib


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(_measure(args.one, args.vocab, args.width, args.repeats)))
        return
    print(f"V = {args.vocab}, D = {args.width}, fp32, {torch.get_num_threads()} threads, median of {args.repeats}")
    print(f"{'tokens':>8} {'extra GB':>9} {'loss s':>8} {'products s':>11} {'ratio':>6}")
    for tokens in args.tokens:
        command = [sys.executable, "-m", "sdft_dist.bench.loss", "--one", str(tokens), "--vocab", str(args.vocab)]
        command += ["--width", str(args.width), "--repeats", str(args.repeats)]
        m = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        ratio = m["loss_s"] / m["products_s"]
        print(f"{tokens:8} {m['extra_gb']:9.2f} {m['loss_s']:8.1f} {m['products_s']:11.1f} {ratio:6.2f}", flush=True)


def _measure(tokens: int, vocab: int, width: int, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    states = torch.randn(tokens, width).requires_grad_()
    head = (torch.randn(vocab, width) / width**0.5).requires_grad_()
    teacher_states, teacher_head = torch.randn(tokens, width), torch.randn(vocab, width) / width**0.5
    weights, labels = torch.full((tokens,), 1 / tokens), torch.randint(0, vocab, (tokens,))
    targets = Targets(labels_T=labels, states_TD=teacher_states, heads=((tokens, teacher_head),))
    held = psutil.Process().memory_info().rss
    held += 4 * (states.numel() + head.numel())  # the two gradients, the outputs

    def loss() -> None:
        states.grad = head.grad = None
        weighted_loss(states, head, weights, targets, Objective(kind="full"), vocab_size=vocab).total.backward()

    def products() -> None:
        with torch.no_grad():
            grad_head = torch.zeros_like(head)
            for rows in torch.arange(tokens).split(chunk_size(vocab, "cpu")):
                logits = states[rows] @ head.T
                logits = teacher_states[rows] @ teacher_head.T
                _ = logits @ head
                grad_head.addmm_(logits.T, states[rows])

    times: dict[str, list[float]] = {"loss_s": [], "products_s": []}
    loss()
    peak = own_peak_gib("cpu") * 2**30
    for _ in range(repeats):
        times["loss_s"].append(_seconds(loss))
        times["products_s"].append(_seconds(products))
    return {"extra_gb": (peak - held) / 1e9, **{name: statistics.median(t) for name, t in times.items()}}


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
