"""A start that fails costs nothing of what the run directory holds, and machines that fail are told by name."""

from pathlib import Path

import pytest
from processes import ended, lab_config, nothing_left, start

from sdft_dist.errors import Fault, UserError
from sdft_dist.runlog import read_metrics
from sdft_dist.train import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ray_cluster):
    """Of three steps, with a checkpoint after each."""
    config = lab_config(
        tmp_path_factory.mktemp("finished"), method="sft", steps=3, checkpoint={"every": 1, "keep_last": 9}
    )
    run(config)
    return config


def test_going_back_over_a_cluster_that_does_not_answer_keeps_what_came_later(finished, monkeypatch):
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(UserError, match=r"cluster.address: nobody answers"):
        run(finished.changed(cluster={"address": "127.0.0.1:1"}), resume="step=1")
    path = Path(finished.run_dir)
    assert sorted(p.name for p in (path / "checkpoints").iterdir()) == [f"step-00000{step}" for step in (1, 2, 3)]
    assert (path / "model").is_dir()
    assert [m["step"] for m in read_metrics(path, "train")] == [1, 2, 3]


def test_a_disk_that_is_full_for_the_metrics_is_a_fault(finished, tmp_path):
    config = finished.changed(run_dir=str(tmp_path / "full"), steps=1)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(Fault, match="full: No space left on device; earlier checkpoints are intact"):
        run(config)


@pytest.mark.fault("node's memory full", "a limit that Ray's monitor finds passed", "ends by name, exit 4")
def test_actors_that_rays_memory_monitor_ends_are_lost_by_name(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_memory_usage_threshold", "0.01")
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "200")
    process, mark = start(lab_config(tmp_path, method="sft", cluster={"device": "cpu", "max_restarts": 0}), tmp_path)
    output = ended(process, 4)
    assert "killed due to the node running low on memory" in output
    assert "Traceback" not in output
    assert nothing_left(mark)
