import time
from pathlib import Path

import pytest

from sdft_dist.harness.sandbox import passes


def test_code_passes_where_it_ends_without_an_error():
    assert passes("assert sum([1, 2]) == 3")
    assert not passes("assert sum([1, 2]) == 4")
    assert not passes("def f(:")


@pytest.mark.parametrize("leaving", ["exit()", "import sys; sys.exit(0)", "import os; os._exit(0)", "raise SystemExit"])
def test_code_that_leaves_before_its_tests_fails(leaving):
    assert not passes(f"def f(x):\n    return 0\n{leaving}\nassert f(1) == 1")
    assert passes(f"def f(x):\n    return 1\nassert f(1) == 1\nif f(1) == 0:\n    {leaving}")


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)",
    ],
)
def test_code_that_does_not_end_is_ended(program):
    started = time.monotonic()
    assert not passes(program, seconds=0.5)
    assert time.monotonic() - started < 5


def test_code_that_wants_too_much_fails():
    assert not passes("x = bytearray(4 << 30)")
    assert not passes("open('file', 'wb').write(bytes(8 << 20))")


def test_what_the_code_has_started_is_ended_too(tmp_path):
    pid = tmp_path / "pid"
    program = f"import subprocess; p = subprocess.Popen(['sleep', '60']); open({str(pid)!r}, 'w').write(str(p.pid))"
    assert passes(program)
    stat, deadline = Path(f"/proc/{pid.read_text()}/stat"), time.monotonic() + 5
    while stat.exists() and stat.read_text().split()[2] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_the_code_sees_no_secrets(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    assert passes("import os; assert not any('KEY' in name for name in os.environ)")
    assert passes("import os; assert os.listdir() == []")
