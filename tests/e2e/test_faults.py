"""Runs whose parts are killed, or that are told to stop, end as if nothing had happened: bit by bit."""

import os
import re
import signal
from pathlib import Path

import psutil
import pytest
from chaos import ROLES, STEPS, finished_alike, lab, pids_of, recovery, wait_for, wait_for_step, wait_until
from processes import PATIENCE_S, ended, lab_config, nothing_left, start

from sdft_dist.runlog import read_metrics

pytestmark = pytest.mark.chaos


@pytest.mark.fault(
    "generator killed", "SIGKILL", "replaced, serves after a whole push; its samples done again, the end bit-equal"
)
@pytest.mark.fault(
    "teacher crashes", "SIGABRT", "replaced; same tokens scored by the same version; last words in run.log"
)
@pytest.mark.fault("learner rank killed", "SIGKILL", "all start anew from the last checkpoint, the end bit-equal")
def test_killed_engines_and_a_killed_learner_are_put_right(undisturbed, tmp_path, record_property):
    config = lab(tmp_path / "fire", STEPS, 1)
    run = Path(config.run_dir)
    process, mark = start(config, tmp_path / "fire")
    faults = ("generator killed", "teacher crashes", "learner rank killed")
    signals = (signal.SIGKILL, signal.SIGABRT, signal.SIGKILL)
    for fault, role, step, how in zip(faults, ROLES, (2, 4, 7), signals, strict=True):
        wait_for_step(run, step, process)
        record_property(fault, recovery(run, process, pids_of(role, mark)[0], how))
    ended(process)
    finished_alike(config, undisturbed)
    log = (run / "run.log").read_text()
    for expected in (
        "lost generators 0",
        "generators serve version",
        "lost teachers 0",
        "its last words",
        "Fatal Python error: Aborted",
        "teachers serve version",
        "starting anew from step 5",
        "committed step-000012",
        "training is done",
    ):
        assert expected in log
    assert log.count("starting anew") == 1, "for the learner; what engines had made outlived them"
    assert nothing_left(mark)


@pytest.mark.fault("Ray's head lost", "SIGKILL of its GCS", "exit code 4, told how to go on; no actor stays")
def test_a_run_whose_cluster_is_gone_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "20")
    process, mark = start(lab_config(tmp_path, steps=5_000), tmp_path)
    wait_for_step(tmp_path / "run", 2, process)
    (head,) = [child for child in psutil.Process(process.pid).children() if child.name() == "gcs_server"]
    head.kill()
    output = ended(process, 4)
    assert re.search(r"sdft: error: Ray's head at \S+ has not answered for 14 s: start the cluster again", output)
    wait_until(lambda: not any(pids_of(role, mark) for role in ROLES), "the end of all actors")


@pytest.mark.fault("generator hangs", "SIGSTOP", "ended after cluster.timeout_s and replaced")
@pytest.mark.fault(
    "learner rank hangs", "SIGSTOP, one of two", "the process group gives up, the rank is named, all start anew"
)
def test_hanging_engines_and_a_hanging_rank_are_ended(tmp_path, record_property):
    """Stopped processes answer nothing and do not end; whoever waits for them runs out of patience."""
    (tmp_path / "fire").mkdir()
    config = lab_config(
        tmp_path / "fire", steps=8, checkpoint={"every": 2}, learner={"ranks": 2}, cluster={"timeout_s": 45}
    )
    run = Path(config.run_dir)
    process, mark = start(config, tmp_path / "fire")
    wait_for_step(run, 2, process)
    record_property("generator hangs", recovery(run, process, pids_of("generator", mark)[0], signal.SIGSTOP))
    wait_for_step(run, 5, process)
    record_property("learner rank hangs", recovery(run, process, pids_of("learner rank", mark)[0], signal.SIGSTOP))
    ended(process)
    assert [m["step"] for m in read_metrics(run, "train")] == list(range(1, 9))
    log = (run / "run.log").read_text()
    assert "generators 0: nothing came for 45 s" in log
    assert re.search(r"from [01] of 0 … 1", log), "one rank is named, whatever the other was doing"
    assert nothing_left(mark)


@pytest.mark.fault("preemption", "SIGTERM", "checkpoint, exit 3, resumed bit-equal")
@pytest.mark.fault("driver killed", "SIGKILL", "no actor stays; resumed bit-equal")
def test_told_to_stop_and_killed_outright_a_run_goes_on_exactly(undisturbed, tmp_path):
    config = lab(tmp_path / "run", STEPS, 1)
    run = Path(config.run_dir)
    process, mark = start(config, tmp_path / "run")
    wait_for_step(run, 3, process)
    process.terminate()
    output = ended(process, 3)
    assert "is saved; go on with --resume auto" in output
    assert nothing_left(mark)

    process, mark = start(config, tmp_path / "run")
    output = ended(process, 2)
    assert "go on from step" in output

    process, mark = start(config, tmp_path / "run", "--resume", "auto")
    wait_for_step(run, 8, process)
    process.kill()
    process.communicate(timeout=PATIENCE_S)
    # Ray's own agents notice the end of their node after a minute or two.
    wait_until(lambda: not any(pids_of(role, mark) for role in ROLES), "the end of all actors")

    process, mark = start(config, tmp_path / "run", "--resume", "auto")
    ended(process)
    finished_alike(config, undisturbed)
    assert nothing_left(mark)


@pytest.mark.fault(
    "preemption before training and before the export", "SIGTERM", "exit 3, resumed: trained once, exported, bit-equal"
)
def test_told_to_stop_before_its_training_and_before_its_export_a_run_does_them_when_resumed(undisturbed, tmp_path):
    config = lab(tmp_path / "run", STEPS, 1)
    run = Path(config.run_dir)
    process, mark = start(config, tmp_path / "run")
    wait_for((run / "run.log").exists, process, "its beginning")  # then Ray starts, which takes the signal for itself
    process.terminate()
    output = ended(process, 3)
    assert "; go on with --resume auto" in output
    assert nothing_left(mark)

    process, mark = start(config, tmp_path / "run", "--resume", "auto")
    wait_for_step(run, STEPS, process)
    process.terminate()
    output = ended(process, 3)
    assert f"asked to stop: step {STEPS} is saved; go on with --resume auto" in output
    assert [m["step"] for m in read_metrics(run, "eval")] == [0], "it was asked to stop in its last evaluation"
    assert nothing_left(mark)

    process, mark = start(config, tmp_path / "run", "--resume", "auto")
    wait_for(lambda: len(read_metrics(run, "eval")) == 2, process, "the last evaluation")
    process.terminate()
    output = ended(process, 3)
    assert "all steps are saved, the model is not exported; go on with --resume auto" in output
    assert not (run / "model").exists()
    assert nothing_left(mark)

    process, mark = start(config, tmp_path / "run", "--resume", "auto")
    ended(process)
    assert (run / "model" / "config.json").is_file()
    assert sorted(path.name for path in (run / "attempts").iterdir()) == ["001", "002"]
    finished_alike(config, undisturbed)
    assert nothing_left(mark)


@pytest.mark.slow
@pytest.mark.fault(
    "one of two generators killed, rollouts ahead",
    "SIGKILL, twice",
    "the other goes on; every step once, no sample too stale",
)
def test_one_of_two_generators_is_lost_while_rollouts_run_ahead(tmp_path, record_property):
    """The other goes on; every step is done once, with all its samples, none too stale."""
    (tmp_path / "fire").mkdir()
    ahead = {"prompts_per_step": 8, "max_completion_tokens": 12, "max_staleness": 2}
    config = lab_config(tmp_path / "fire", steps=STEPS, rollout=ahead, cluster={"generators": 2, "timeout_s": 120})
    run = Path(config.run_dir)
    process, mark = start(config, tmp_path / "fire")
    for step, which in ((2, 0), (6, -1)):
        wait_for_step(run, step, process)
        seconds = recovery(run, process, sorted(pids_of("generator", mark))[which])
        record_property("one of two generators killed, rollouts ahead", seconds)
    ended(process)
    records = read_metrics(run, "train")
    assert [m["step"] for m in records] == list(range(1, STEPS + 1))
    assert {(m["samples"], m["dropped"]) for m in records} == {(8, 0)}
    assert max(m["staleness_max"] for m in records) <= 2
    log = (run / "run.log").read_text()
    assert log.count("generators serve version") >= 2
    assert "starting anew" not in log, "what they had made outlived them"
    assert nothing_left(mark)


@pytest.mark.fault("preemption while a rank hangs", "SIGTERM after SIGSTOP", "exit 3 after checkpoint.grace_s")
def test_a_rank_that_hangs_does_not_hold_up_a_preempted_run(tmp_path):
    (tmp_path / "run").mkdir()
    config = lab_config(
        tmp_path / "run", steps=STEPS, checkpoint={"every": 2, "grace_s": 5}, cluster={"timeout_s": 2 * PATIENCE_S}
    )
    process, mark = start(config, tmp_path / "run")
    wait_for_step(Path(config.run_dir), 3, process)
    os.kill(pids_of("learner rank", mark)[0], signal.SIGSTOP)
    process.terminate()
    output = ended(process, 3)  # cluster.timeout_s is longer
    assert "asked to stop, and lost" in output
    assert "step 2 is saved; go on with --resume auto" in output
    assert nothing_left(mark)
