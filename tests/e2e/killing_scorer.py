"""A scorer that kills its run's generators, once, when it judges the first completion."""

import os
import signal
from pathlib import Path

_killed: list[int] = []


def score(completion: str, answer: str) -> bool:
    if not _killed:
        mark = f"SDFT_TEST_MARK={os.environ['SDFT_TEST_MARK']}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                ours = mark in (folder / "environ").read_bytes()
                if ours and (folder / "cmdline").read_bytes().startswith(b"ray::Generator"):
                    _killed.append(int(folder.name))
            except OSError:
                continue
        for pid in _killed:
            os.kill(pid, signal.SIGKILL)
    return completion.strip() == answer.strip()
