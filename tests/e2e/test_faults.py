"""Runs whose parts are killed, or that are told to stop, end as if nothing had happened: bit by bit."""

from pathlib import Path

import pytest
from chaos import ROLES, differing, lab, last_checkpoint, pids_of, recovery, steps_done, wait_for, wait_until
from processes import lab_config, nothing_left, start

from sdft_dist.runlog import read_metrics

STEPS = 12


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The last checkpoint of a run that nobody touched."""
    folder = tmp_path_factory.mktemp("quiet")
    config = lab(folder / "quiet", STEPS, 1)
    process, _ = start(config, folder / "quiet")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return last_checkpoint(config)


def finished_alike(config, undisturbed):
    records = read_metrics(Path(config.run_dir), "train")
    assert [m["step"] for m in records] == list(range(1, STEPS + 1)), "every step once"
    assert {m["samples"] for m in records} == {8}, "with all its samples"
    assert differing(last_checkpoint(config), undisturbed) == []


def test_killed_engines_and_a_killed_learner_are_put_right(undisturbed, tmp_path):
    config = lab(tmp_path / "fire", STEPS, 1)
    run = Path(config.run_dir)
    process, mark = start(config, tmp_path / "fire")
    for role, step in zip(ROLES, (2, 4, 7), strict=True):
        wait_for(lambda step=step: steps_done(run) >= step, process, 150, f"step {step}")
        seconds = recovery(run, process, pids_of(role, mark)[0])
        print(f"{role}: next step after {seconds:.1f} s")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    finished_alike(config, undisturbed)
    log = (run / "run.log").read_text()
    for expected in ("lost generators 0", "generators serve version", "lost teachers 0", "teachers serve version",
                     "starting anew from step 5", "committed step-000012", "training is done"):  # fmt: skip
        assert expected in log
    assert nothing_left(mark)


def test_told_to_stop_and_killed_outright_a_run_goes_on_exactly(undisturbed, tmp_path):
    config = lab(tmp_path / "run", STEPS, 1)
    run = Path(config.run_dir)
    process, mark = start(config, tmp_path / "run")
    wait_for(lambda: steps_done(run) >= 3, process, 150, "step 3")
    process.terminate()
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert "is saved; go on with --resume auto" in output
    assert nothing_left(mark)

    process, mark = start(config, tmp_path / "run")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "go on from step" in output

    process, mark = start(config, tmp_path / "run", "--resume", "auto")
    wait_for(lambda: steps_done(run) >= 8, process, 150, "step 8")
    process.kill()
    process.communicate(timeout=60)
    # Ray's own agents notice the end of their node after a minute or two.
    wait_until(lambda: not any(pids_of(role, mark) for role in ROLES), 20, "the end of all actors")

    process, mark = start(config, tmp_path / "run", "--resume", "auto")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    finished_alike(config, undisturbed)
    assert nothing_left(mark)


def test_one_of_two_generators_is_lost_while_rollouts_run_ahead(tmp_path):
    """The other goes on; every step is done once, with all its samples, none too stale."""
    (tmp_path / "fire").mkdir()
    ahead = {"prompts_per_step": 8, "max_completion_tokens": 12, "max_staleness": 2}
    config = lab_config(tmp_path / "fire", steps=STEPS, rollout=ahead, cluster={"generators": 2, "timeout_s": 120})
    run = Path(config.run_dir)
    process, mark = start(config, tmp_path / "fire")
    for step, which in ((2, 0), (6, -1)):
        wait_for(lambda step=step: steps_done(run) >= step, process, 150, f"step {step}")
        print(f"next step after {recovery(run, process, sorted(pids_of('generator', mark))[which]):.1f} s")
    output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    records = read_metrics(run, "train")
    assert [m["step"] for m in records] == list(range(1, STEPS + 1))
    assert {(m["samples"], m["dropped"]) for m in records} == {(8, 0)}
    assert max(m["staleness_max"] for m in records) <= 2
    assert (run / "run.log").read_text().count("generators serve version") >= 2
    assert nothing_left(mark)
