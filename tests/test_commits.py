"""Checkpoints that count: whole ones only, whatever interrupts the writing or damages a file."""

import hashlib
import itertools
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

from sdft_dist import commits
from sdft_dist.commits import Commits, check, newest
from sdft_dist.errors import Fault, UserError
from sdft_dist.types import ShardFile


class FakeSaver:
    """Two ranks that write a few bytes each."""

    done = True

    def state_bytes(self):
        return 1000

    def start_saving(self, folder):
        self.folder = folder

    def finish_saving(self, *, wait):
        if not (self.done or wait):
            return None
        files = []
        for rank in range(2):
            content = os.urandom(500)
            (self.folder / f"rank-{rank:03d}.safetensors").write_bytes(content)
            digest = hashlib.sha256(content).hexdigest()
            files.append(ShardFile(name=f"rank-{rank:03d}.safetensors", bytes=len(content), sha256=digest))
        return files


def save(store, step):
    saver = FakeSaver()
    store.start(saver, step)
    return store.finish(saver, wait=True)


@pytest.fixture
def store(tmp_path):
    return Commits(tmp_path / "checkpoints", keep_last=3)


def test_the_newest_counts_and_old_ones_go(tmp_path):
    store = Commits(tmp_path, keep_last=2, keep_every=20)
    for step in (10, 20, 30, 40, 50):
        save(store, step)
    assert store.steps() == [20, 40, 50]
    assert newest(store) == (50, [])


def test_training_goes_on_while_shards_are_written(store):
    saver = FakeSaver()
    saver.done = False
    store.start(saver, 10)
    assert store.finish(saver, wait=False) is None
    assert store.steps() == []
    saver.done = True
    assert store.finish(saver, wait=False) == store.path(10)
    assert store.finish(saver, wait=True) is None, "nothing more is pending"


def test_what_a_lost_learner_had_begun_is_forgotten(store):
    lost = FakeSaver()
    lost.done = False
    store.start(lost, 10)
    store.abandon()
    save(store, 20)
    assert newest(store) == (20, [])


PHASES = ["shards", "manifest", "its folder", "rename", "the parent", "marker", "marker's folder"]


def save_and_die(store, step, phase):
    """Save in a process of its own that is killed just before `phase`, the calls that change the disk being
    counted in order. Returns the signal that ended it."""
    child = os.fork()
    if not child:
        calls = itertools.count()

        def counted(function):
            def call(*args, **kwargs):
                if next(calls) == PHASES.index(phase):
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*args, **kwargs)

            return call

        FakeSaver.finish_saving, Path.rename = counted(FakeSaver.finish_saving), counted(Path.rename)
        commits._write_durably, commits._sync = counted(commits._write_durably), counted(commits._sync)
        try:
            save(store, step)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize("time", range(3))
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.fault(
    "killed at a phase of a checkpoint", "SIGKILL before each of 7 phases, 3 times", "the newest whole one loads"
)
def test_a_kill_at_any_phase_leaves_a_whole_checkpoint_the_newest(store, phase, time):
    """Afterwards the next checkpoint succeeds."""
    save(store, 10)
    assert save_and_die(store, 20, phase) == -signal.SIGKILL
    step, broken = newest(store)
    assert step == (20 if phase == "marker's folder" else 10)
    assert broken == []
    assert check(store.path(step)) is None
    save(store, 30)
    assert newest(store) == (30, [])


DAMAGE = {
    "flipped": lambda path: path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:]),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "deleted": lambda path: path.unlink(),
}


def test_an_old_checkpoint_that_is_being_read_does_not_end_a_run(store, monkeypatch):
    """Its folder cannot be removed on NFS; it does not count any more."""

    def busy(folder, ignore_errors=False):
        if not ignore_errors:
            raise OSError(39, "Directory not empty")

    monkeypatch.setattr(shutil, "rmtree", busy)
    for step in (10, 20, 30, 40):
        save(store, step)
    assert store.steps() == [20, 30, 40]
    (store.folder / "writing-000050").mkdir()
    save(store, 50)
    monkeypatch.undo()
    save(store, 60)
    assert sorted(path.name for path in store.folder.iterdir()) == [f"step-0000{step}" for step in (40, 50, 60)]


@pytest.mark.parametrize("name", ["rank-001.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.fault("shard or manifest damaged", "flipped byte, cut, deleted", "noticed; an older checkpoint is taken")
def test_damage_is_noticed_and_an_older_checkpoint_is_taken(store, damage, name):
    save(store, 10)
    DAMAGE[damage](save(store, 20) / name)
    step, (line,) = newest(store)
    assert step == 10
    assert "step 20 is passed over" in line
    assert name in line
    with pytest.raises(UserError, match=name):
        commits.read_manifest(store.path(20))


def no_space(*args, **kwargs):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("place", "name", "instead", "told"),
    [
        (shutil, "disk_usage", lambda path: SimpleNamespace(free=100), r"needs 0 MiB in .*, 0 MiB are free"),
        (FakeSaver, "finish_saving", no_space, ".*No space left on device"),
        (commits, "_write_durably", no_space, ".*No space left on device"),
    ],
    ids=["looked at", "shards", "manifest"],
)
@pytest.mark.fault("disk full at a checkpoint", "no space, failing writer", "exit 4, earlier ones intact")
def test_a_full_disk_leaves_what_there_is(store, monkeypatch, place, name, instead, told):
    save(store, 10)
    monkeypatch.setattr(place, name, instead)
    with pytest.raises(Fault, match=f"step 20: {told}; earlier checkpoints are intact"):
        save(store, 20)
    assert newest(store) == (10, [])


def test_a_copy_that_somebody_keeps_is_left_alone(store):
    kept = shutil.copytree(save(store, 10), store.folder / "step-000010-good")
    for step in (20, 30, 40):
        save(store, step)
    assert store.steps() == [20, 30, 40]
    assert kept.is_dir()


def test_a_silent_rank_is_no_full_disk(store, monkeypatch):
    """It ends an attempt, from which a run recovers; a full disk ends the run."""

    def hang(self, *, wait):
        raise TimeoutError("no answer in 120 s from 0 of 0 … 1")

    monkeypatch.setattr(FakeSaver, "finish_saving", hang)
    with pytest.raises(TimeoutError, match="no answer"):
        save(store, 10)


@pytest.mark.parametrize("go_on", [lambda store: store.drop_after(10), lambda store: save(store, 30)])
def test_a_folder_that_a_kill_left_without_its_marker_goes_when_the_run_goes_on(store, go_on):
    save(store, 10)
    copy = shutil.copytree(store.path(10), store.folder / "step-000010-mine")
    (copy / commits.MARKER).unlink()
    assert save_and_die(store, 20, "marker") == -signal.SIGKILL
    assert store.path(20).exists()
    go_on(store)
    assert not store.path(20).exists()
    assert store.steps()[0] == 10
    assert copy.exists()


def test_what_a_kill_left_takes_no_space_of_the_next(store, monkeypatch):
    left = store.folder / "writing-000010"
    left.mkdir(parents=True)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=100 if left.exists() else 10_000))
    save(store, 20)
    assert store.steps() == [20]
