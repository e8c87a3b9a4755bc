"""A rank's shards, written in one file or in parts, hold the same state, and count when all are written."""

import os
import shutil
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from learner import checkpoint
from learner.checkpoint import Shards, ShardWriter
from learner.ema import Ema
from learner.zero import Fragment
from sdft_dist.commits import Commits, newest


@pytest.fixture
def fragments():
    make = torch.Generator().manual_seed(0)

    def draw(n):
        return torch.randn(n, generator=make)

    return [
        Fragment(name=f"w{i}", start=0, master=draw(n), state={"exp_avg": draw(n), "exp_avg_sq": draw(n)})
        for i, n in enumerate((10, 300, 7, 50))
    ]


@pytest.mark.parametrize(("limit", "files"), [(1 << 30, 1), (2000, 5), (1, 17)])
def test_parts_hold_what_one_file_holds(monkeypatch, tmp_path, fragments, limit, files):
    monkeypatch.setattr(checkpoint, "PART_BYTES", limit)
    ema = Ema(fragments)
    for folder, in_parts in ((tmp_path / "whole", False), (tmp_path / "parts", True)):
        folder.mkdir()
        writer = ShardWriter(in_parts=in_parts)
        writer.start(folder, 0, fragments, ema, 3, None)
        written = writer.finish(wait=True)
        assert sorted(file.name for file in written) == sorted(path.name for path in folder.iterdir())
        writer.close()
    assert len(written) == files
    one, many = Shards(tmp_path / "whole"), Shards(tmp_path / "parts")
    assert one.optimizer_step == many.optimizer_step == 3
    for f in fragments:
        for kind in ("master", "exp_avg", "exp_avg_sq", "ema"):
            assert torch.equal(many.full(kind, f.name, f.master.shape), one.full(kind, f.name, f.master.shape))
    assert torch.equal(many.rng_state(0), one.rng_state(0))


def test_a_part_is_as_large_as_allowed_or_one_tensor(monkeypatch, tmp_path, fragments):
    monkeypatch.setattr(checkpoint, "PART_BYTES", 2000)
    writer = ShardWriter(in_parts=True)
    writer.start(tmp_path, 0, fragments[1:], None, 0, None)
    for path in tmp_path.iterdir():
        sizes = [tensor.nbytes for key, tensor in load_file(path).items() if not key.startswith("rng")]
        assert sum(sizes) <= 2000 or len(sizes) == 1
    writer.close()


def test_a_folder_that_is_not_there_is_told(tmp_path, fragments):
    writer = ShardWriter(in_parts=True)
    with pytest.raises(OSError, match="run_dir must be on a file system that all share"):
        writer.start(tmp_path / "elsewhere", 0, fragments, None, 0, None)
    writer.close()


@pytest.mark.parametrize(("in_parts", "files"), [(False, 1), (True, 3)])
@pytest.mark.fault("learner rank killed while it writes shards", "SIGKILL", "the newest whole checkpoint loads")
def test_a_rank_killed_while_it_writes_leaves_a_whole_checkpoint_the_newest(monkeypatch, tmp_path, in_parts, files):
    """In a process of its own, of which it begins to write as many `files`. Afterwards the next checkpoint succeeds."""
    monkeypatch.setattr(checkpoint, "PART_BYTES", 8 << 20)
    # 64 MiB, in tensors so small that a forked process copies them in one thread.
    state = [Fragment(name=f"w{i}", start=0, master=torch.full((1 << 14,), float(i)), state={}) for i in range(1024)]
    store, writer = Commits(tmp_path), ShardWriter(in_parts=in_parts)
    rank = SimpleNamespace(
        state_bytes=lambda: 64 << 20,
        start_saving=lambda folder: writer.start(folder, 0, state, None, 0, None),
        finish_saving=lambda *, wait: writer.finish(wait),
    )

    def save(step):
        store.start(rank, step)
        return store.finish(rank, wait=True)

    whole = len(list(save(10).glob("rank-*")))
    beside = tmp_path / "writing-000020"

    def killed_in_the_middle():
        nonlocal writer
        shutil.rmtree(beside, ignore_errors=True)
        deadline, child = time.monotonic() + 60, os.fork()
        if not child:
            try:
                writer = ShardWriter(in_parts=in_parts)  # a thread is not forked
                store.start(rank, 20)
                signal.pause()
            finally:
                os._exit(1)
        while not (beside.is_dir() and len(list(beside.iterdir())) >= files) and time.monotonic() < deadline:
            pass
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        return files - 1 <= len(list(beside.glob("rank-*"))) < whole

    assert any(killed_in_the_middle() for _ in range(20)), "on a busy machine it may be through before it is looked at"
    assert newest(store) == (10, [])
    found = Shards(store.path(10))
    assert all(torch.equal(found.full("master", f.name, f.master.shape), f.master) for f in state)
    save(30)
    writer.close()
    assert newest(store) == (30, [])
    assert not beside.exists()
