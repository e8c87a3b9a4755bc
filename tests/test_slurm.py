"""The batch scripts, against stand-ins for Slurm, Ray and sdft that write down how they were called."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdft_dist.cli import _parse

SLURM = Path(__file__).parent.parent / "deploy" / "slurm"
STANDINS = {
    "sdft": (
        'trap "sleep 0.3; exit 3" TERM; echo "sdft $*" >> "$CALLS"; touch "$STARTED"; '
        'sleep "$SECONDS_TO_RUN" & wait $!; exit "$CODE"'
    ),
    "scontrol": 'if [ "$1" = show ]; then printf "n1\\nn2\\nn3\\n"; else echo "scontrol $*" >> "$CALLS"; fi',
    "srun": 'echo "srun $* token ${#RAY_AUTH_TOKEN} ${RAY_AUTH_MODE:-}" >> "$CALLS"',
    "ray": 'echo "ray $*" >> "$CALLS"',
}  # fmt: skip


@pytest.fixture
def batch(tmp_path):
    """Starts a script with the given exit code of the training."""
    (tmp_path / "bin").mkdir()
    for name, body in STANDINS.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)

    def start(script, code=0, seconds="0", faults=0):
        (tmp_path / "sdft-77.faults").write_text("4\n" * faults)
        environment = {
            "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(tmp_path / "calls"), "STARTED": str(tmp_path / "started"),
            "CODE": str(code), "SECONDS_TO_RUN": seconds,
            "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_SUBMIT_DIR": str(SLURM),
            "USER": "somebody", "SLURM_RESTART_COUNT": "9",
        }  # fmt: skip
        command = ["bash", str(SLURM / script), "recipe.yaml", "run_dir=runs/one"]
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, start_new_session=True)
        return process, lambda: (tmp_path / "calls").read_text().splitlines()

    return start


@pytest.mark.parametrize(
    ("code", "faults", "requeued"),
    [
        *[(0, 0, False), (2, 0, False), (3, 9, True), (5, 0, False)],
        *[(code, faults, faults < 5) for code in (4, 15, 134, 143) for faults in (4, 5)],
    ],
)
def test_a_job_is_requeued_by_the_exit_code_of_its_training(batch, tmp_path, code, faults, requeued):
    """Preemptions, of which there may be any number, use up no more than the faults since the last one."""
    process, calls = batch("one-node.sbatch", code, faults=faults)
    assert process.wait(20) == code
    assert ("scontrol requeue 77" in calls()) is requeued
    counted = tmp_path / "sdft-77.faults"
    assert (len(counted.read_text().splitlines()) if counted.exists() else 0) == (
        faults + 1 if code > 5 or code == 4 else 0
    )


def test_slurms_signal_reaches_the_training_which_ends_in_its_own_time(batch, tmp_path):
    process, calls = batch("one-node.sbatch", seconds="60")
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 3
    assert "scontrol requeue 77" in calls()


def test_several_nodes_make_one_ray_cluster_with_a_token(batch):
    process, calls = batch("several-nodes.sbatch")
    assert process.wait(30) == 0
    started = [line for line in calls() if line.startswith("srun")]
    deadline = time.monotonic() + 5  # they are started in the background
    while len(started) < 3 and time.monotonic() < deadline:
        started = [line for line in calls() if line.startswith("srun")]
    (head,) = [line for line in started if "--head" in line]
    assert "--nodelist=n1 ray start --head --port=20077" in head
    others = [re.search(r"--nodelist=(\w+) ray start --address=n1:20077", line)[1] for line in started if line != head]
    assert sorted(others) == ["n2", "n3"]
    assert all(line.endswith("token 64 token") for line in started)


@pytest.mark.parametrize("script", ["one-node.sbatch", "several-nodes.sbatch"])
def test_the_training_is_a_command_that_the_cli_knows(batch, script):
    process, calls = batch(script)
    process.wait(30)
    (command,) = [line for line in calls() if line.startswith("sdft ")]
    args = _parse(command.split()[1:])
    assert (args.recipe, args.resume) == ("recipe.yaml", "auto")
    assert {"run_dir=runs/one", "cluster.device=cuda"} <= set(args.overrides)


@pytest.mark.parametrize("path", sorted(SLURM.glob("*.s*")), ids=lambda p: p.name)
def test_shellcheck(path):
    shellcheck = Path(sys.executable).parent / "shellcheck"
    subprocess.run([shellcheck, "--external-sources", f"--source-path={SLURM.parent.parent}", path], check=True)
