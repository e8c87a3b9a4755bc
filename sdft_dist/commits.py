"""Which checkpoints of a run count: written beside, hashed, renamed into place, then marked.

A folder `step-000100` counts when its COMMITTED file holds the hash of its manifest.json, which holds
size and hash of every shard. Whatever a kill leaves behind has another name or no marker.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from sdft_dist.errors import Fault, UserError
from sdft_dist.types import ShardFile

MANIFEST, MARKER = "manifest.json", "COMMITTED"
HEADROOM = 1.05  # of the space that a checkpoint needs
READERS = 8  # files that are hashed at a time


class Saver(Protocol):
    """What a checkpoint needs of the learner."""

    def state_bytes(self) -> int: ...
    def start_saving(self, folder: Path) -> None: ...
    def finish_saving(self, *, wait: bool) -> list[ShardFile] | None: ...


class Commits:
    """The checkpoints below `folder`; `facts` go into every manifest."""

    def __init__(self, folder: Path, *, keep_last: int = 2, keep_every: int = 0, facts: dict[str, Any] | None = None):
        self.folder, self._keep_last, self._keep_every, self._facts = folder, keep_last, keep_every, facts or {}
        self._pending: tuple[int, Path] | None = None  # step, and where its shards are being written
        self.kept: int | None = None  # a step whose checkpoint is not removed, besides the newest

    def start(self, saver: Saver, step: int) -> None:
        """Begin to save the state after `step` optimizer steps. Raises Fault where there is no space."""
        self.finish(saver, wait=True)
        with _disk(step):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clear()
            needed, free = int(HEADROOM * saver.state_bytes()), shutil.disk_usage(self.folder).free
            if needed > free:
                raise Fault(
                    f"checkpoint of step {step}: needs {needed >> 20} MiB in {self.folder}, {free >> 20} MiB are free; "
                    "earlier checkpoints are intact"
                )
            beside = self.folder / f"writing-{step:06d}"
            beside.mkdir(exist_ok=True)  # what is being read of an older one stays on NFS, and does not count
            saver.start_saving(beside)
            self._pending = step, beside

    def finish(self, saver: Saver, *, wait: bool) -> Path | None:
        """Commit what `start` began, if it is written or `wait` says to wait for it; returns its folder.
        Raises Fault where it could not be written, TimeoutError where a rank does not answer."""
        if self._pending is None:
            return None
        step, beside = self._pending
        with _disk(step):
            files = saver.finish_saving(wait=wait)
            if files is None:
                return None
            self._pending = None
            folder = self._commit(step, beside, files)
            self._prune()
            return folder

    def abandon(self) -> None:
        """Forget what was begun by a learner that is no more."""
        self._pending = None

    def _commit(self, step: int, beside: Path, files: Sequence[ShardFile]) -> Path:
        shards = {f.name: {"bytes": f.bytes, "sha256": f.sha256} for f in files}
        manifest = json.dumps({"step": step, "files": shards, **self._facts}, indent=1).encode()
        _write_durably(beside / MANIFEST, manifest)
        _sync(beside)
        folder = self.path(step)
        if folder.exists():  # of a history that this run has left
            _remove(folder)
        beside.rename(folder)
        _sync(self.folder)
        _write_durably(folder / MARKER, hashlib.sha256(manifest).hexdigest().encode())
        _sync(folder)
        return folder

    def _prune(self) -> None:
        steps = self.steps()
        for step in steps[: -self._keep_last]:
            if step != self.kept and not (self._keep_every and step % self._keep_every == 0):
                # On NFS what somebody is reading stays until then; `_clear` takes it later.
                _remove(self.path(step), ignore_errors=True)

    def path(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.folder / f"step-{step:06d}"

    def steps(self) -> list[int]:
        """Steps of all checkpoints with a marker, ascending."""
        folders = [p.parent for p in self.folder.glob(f"step-*/{MARKER}")]
        found = ((int(own.name.removeprefix("step-")), own) for own in folders if re.fullmatch(r"step-\d+", own.name))
        return sorted(step for step, own in found if own == self.path(step))  # not of a copy that somebody made

    def drop_after(self, step: int) -> None:
        """Remove later checkpoints, of a history that the run leaves by going back to `step`, and what kills left."""
        for later in self.steps():
            if later > step:
                _remove(self.path(later))
        self._clear()

    def _clear(self) -> None:
        """Remove what kills left: shards without a manifest, and folders that were renamed or removed but half."""
        for left in self.folder.glob("*-*"):
            if re.fullmatch(r"(writing|step)-\d+", left.name) and not (left / MARKER).exists():
                shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _disk(step: int) -> Iterator[None]:
    """Raises Fault where the disk fails."""
    try:
        yield
    except TimeoutError:  # an OSError by name, but of a silent rank, not of the disk
        raise
    except OSError as e:
        raise Fault(f"checkpoint of step {step}: {e}; earlier checkpoints are intact") from e


def check(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None: every file is read and hashed, some at a time."""
    try:
        raw = (folder / MANIFEST).read_bytes()
        if hashlib.sha256(raw).hexdigest().encode() != (folder / MARKER).read_bytes().strip():
            return f"{MANIFEST} is not the one that was committed"
        files = json.loads(raw)["files"]
        with ThreadPoolExecutor(READERS) as readers:
            problems = readers.map(partial(_check_file, folder), files, files.values())
            return next((problem for problem in problems if problem is not None), None)
    except FileNotFoundError as e:
        return f"{Path(e.filename).name} is missing"


def _check_file(folder: Path, name: str, expected: dict[str, Any]) -> str | None:
    size = (folder / name).stat().st_size
    if size != expected["bytes"]:
        return f"{name} has {size} bytes, not {expected['bytes']}"
    with (folder / name).open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
            return f"{name} is corrupt: its hash is not the one in {MANIFEST}"
    return None


def newest(commits: Commits) -> tuple[int | None, list[str]]:
    """The newest sound checkpoint's step, and a line for each newer one that is not sound."""
    broken: list[str] = []
    for step in reversed(commits.steps()):
        problem = check(commits.path(step))
        if problem is None:
            return step, broken
        broken.append(f"checkpoint of step {step} is passed over: {problem}")
    return None, broken


def read_manifest(folder: Path) -> dict[str, Any]:
    """The facts of a checkpoint. Raises UserError where it is not sound."""
    problem = check(folder)
    if problem is not None:
        raise UserError(f"{folder}: no sound checkpoint: {problem}")
    return facts(folder)


def facts(folder: Path) -> dict[str, Any]:
    """The facts of a checkpoint that is known to be sound."""
    return dict(json.loads((folder / MANIFEST).read_text()))


def _remove(folder: Path, *, ignore_errors: bool = False) -> None:
    """The marker first, so that a kill in between leaves nothing that counts."""
    (folder / MARKER).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=ignore_errors)


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
