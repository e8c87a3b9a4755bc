"""How often a process's first cosine is imprecise: `python tests/e2e/first_use.py [PROCESSES]`.

Forks processes that compute the same cosines in two threads as their first use of MKL's vector
functions, half of them after `settle()`; prints how many were off. About one in a thousand is on an idle
machine, more on a busy one; see sdft_dist/vector_math.py.
"""

import math
import os
import sys

import torch

from sdft_dist.vector_math import settle


def off_by(angles, exact, settled):
    """Largest error of the cosines that a new process computes first."""
    read, write = os.pipe()
    if os.fork() == 0:
        if settled:
            settle()
        (torch.ones(200_000) * 2).sum()  # wakes all threads
        os.write(write, str(float((angles.cos().double() - exact).abs().max())).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        error = float(answer.read())
    os.wait()
    return error


def main():
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else 3000
    angles = torch.linspace(-30, 30, 4608)
    # Without torch: the parent must not have used the functions either.
    exact = torch.tensor([math.cos(a) for a in angles.tolist()], dtype=torch.float64)
    for settled in (False, True):
        wrong = sum(off_by(angles, exact, settled) > 1e-5 for _ in range(processes))
        print(f"{'settled' if settled else 'as it is':10} {wrong} of {processes} processes off by more than 1e-5")


if __name__ == "__main__":
    main()
