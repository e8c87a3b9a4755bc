"""A run that pushes to its teachers every few steps stops only where it has pushed to them."""

from pathlib import Path

import pytest
from chaos import wait_for_step
from processes import ended, lab_config, nothing_left, start


@pytest.mark.fault("preemption between two pushes to the teachers", "SIGTERM", "goes on to the next push, then exit 3")
def test_told_to_stop_between_two_pushes_it_goes_on_to_the_next(tmp_path):
    """Where it stopped at once, a resumed run would have a teacher that the undisturbed one has only later."""
    config = lab_config(tmp_path, steps=40, teacher={"sync_every": 4}, checkpoint={"every": 40})
    process, mark = start(config, tmp_path)
    wait_for_step(Path(config.run_dir), 1, process)
    process.terminate()
    ended(process, 3)
    (saved,) = (int(path.name.removeprefix("step-")) for path in (Path(config.run_dir) / "checkpoints").glob("step-*"))
    assert saved % 4 == 0 < saved < 40
    assert nothing_left(mark)
