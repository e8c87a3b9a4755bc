"""More targets than Ray's object store holds: they spill to disk, or the run ends by name."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import PATIENCE_S

SPILLS = ("object store full", "200 MB into 80 MB", "spills to disk, comes back whole")
FULL = ("spill disk full", "a disk that counts as full", "ends by name, exit 4")


@pytest.mark.parametrize(
    ("disk", "expected"),
    [
        pytest.param("spills", "20 targets came back whole", marks=pytest.mark.fault(*SPILLS)),
        pytest.param("full", "Fault(\"Ray's object store is full and has no disk", marks=pytest.mark.fault(*FULL)),
    ],
)
def test_a_store_that_is_too_small(disk, expected):
    script = Path(__file__).parent / "small_store.py"
    done = subprocess.run([sys.executable, str(script), disk], capture_output=True, text=True, timeout=PATIENCE_S)
    assert expected in done.stdout, done.stdout + done.stderr
