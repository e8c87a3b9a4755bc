"""Runs code that a model has written, in a process of its own with limits on time, memory and files.

It keeps mistakes from doing harm: endless loops, huge lists, full disks, processes left behind. It is no
defence against code that means harm, which may read what its user may read and use the network: that
needs a container without either.
"""

from __future__ import annotations

import os
import resource
import secrets
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress

SECONDS = 10.0  # of wall clock
MEMORY, FILE = 1 << 30, 1 << 20  # bytes


def passes(program: str, *, seconds: float = SECONDS) -> bool:
    """Whether the Python `program` comes to its last line within `seconds` without an error. It sees an empty folder,
    no input and no environment."""
    reached = 100 + secrets.randbelow(100)  # an exit code: a program may also leave by itself, before its tests
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            # -I: neither the user's packages nor the folder's are imported
            [sys.executable, "-I", "-c", f"{program}\n\nimport os\nos._exit({reached})"],
            cwd=folder,
            env={},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=_limit,
        )
        try:
            return process.wait(seconds) == reached
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what the program has started too
            process.wait()


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE, FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (int(SECONDS) + 1, int(SECONDS) + 1))
