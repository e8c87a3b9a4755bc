"""The run directory: its layout, who may write into it, and where a run begins.

config.yaml · metrics.jsonl · run.log · rows.txt · events/ · eval/ · samples/ · attempts/001/ ·
checkpoints/step-000100/ · model/ · adapter/ · origin.json · lock
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from sdft_dist import commits
from sdft_dist.commits import Commits
from sdft_dist.config import Config
from sdft_dist.errors import Fault, UserError
from sdft_dist.evaluate import Judged
from sdft_dist.files import read_jsonl, write_jsonl, write_whole
from sdft_dist.fingerprint import refuse_changes
from sdft_dist.recipe import dump_config, load_config

# Files that a start leaves which failed before its first step, besides an empty metrics.jsonl.
LEFT_BY_A_START = {
    "config.yaml",
    "config.yaml.new",
    "lock",
    "run.log",
    "rows.txt",
    "attempts",
    "events",
    "origin.json",
    "wandb",
}
EXPORTS = ("model", "adapter")  # in this order: without the first a run is not finished
ORIGIN = "origin.json"  # of a run that went on from another one's checkpoint
LEASE_S = 180.0  # for which NFS may keep the lock of a machine that is gone
LOOK_S = 1.0  # for which `sdft status` may hold it


@dataclass(frozen=True)
class Start:
    """Where a run begins: after `step` optimizer steps, with the state in `checkpoint`."""

    step: int = 0
    checkpoint: Path | None = None


class RunDir:
    """A run's folder. What writes into it holds its lock; see `claim`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.commits = Commits(path / "checkpoints")
        self._lock: TextIO | None = None

    @classmethod
    def claim(
        cls, config: Config, resume: str | None, facts: dict[str, Any], *, allow_changes: bool
    ) -> tuple[RunDir, Start]:
        """Take the directory of `config`, and say where the run begins.

        `resume` is None for a new run; "auto" for the newest sound checkpoint here, or the beginning where
        there is none; "step=N" for that one; or the folder of another run or of one checkpoint of it, for a
        new run that goes on from there. `facts` holds the fingerprint under that name. What came after that
        place is left for `rewind`. Raises UserError where the folder is in use, where there is no such sound
        checkpoint, or where settings differ.
        """
        run = cls(Path(config.run_dir))
        keep = config.checkpoint
        run.commits = Commits(run.commits.folder, keep_last=keep.keep_last, keep_every=keep.keep_every, facts=facts)
        here = resume == "auto" or (resume or "").startswith("step=")
        try:
            if not here or not run._is_run():
                run._refuse_used()
            run.path.mkdir(parents=True, exist_ok=True)
            run._take_lock()
        except OSError as e:
            raise UserError(f"run_dir: {run.path}: cannot be made or written to: {e.strerror}") from e
        try:
            start = run._start(resume) if resume else Start()
            if start.checkpoint is not None and not allow_changes:
                refuse_changes(commits.facts(start.checkpoint)["fingerprint"], facts["fingerprint"], start.checkpoint)
            read_jsonl(run.path / "metrics.jsonl")  # raises now what a rewind would raise
        except UserError:
            run.release()
            raise
        if not here:
            run._note_origin(start)
        write_whole(run.path / "config.yaml", dump_config(config))
        return run, start

    def _is_run(self) -> bool:
        """Whether a run has begun here; a recipe of the user's own has the same name as its settings."""
        marks = ("lock", "attempts", "checkpoints")
        return (self.path / "config.yaml").is_file() and any((self.path / name).exists() for name in marks)

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run, to read. Raises UserError where `path` holds none."""
        if not (path / "config.yaml").is_file():
            missing = "it has no config.yaml" if path.is_dir() else "there is no such folder"
            raise UserError(f"{path} is not a run directory: {missing}")
        return cls(path)

    def release(self) -> None:
        """Let go of the lock; the end of the process does it too."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @property
    def finished(self) -> bool:
        """Whether a run came to its end here: the model is the last that it writes."""
        return (self.path / "model").is_dir()

    def set_aside(self, step: int) -> None:
        """Rename what a finished run has exported, as it goes on from `step` and is not finished before its new end."""
        for name in EXPORTS:
            if (self.path / name).is_dir():
                beside = self.path / f"{name}.until-{step:06d}"
                shutil.rmtree(beside, ignore_errors=True)
                (self.path / name).rename(beside)
                self.say(f"goes on: {name}/ is {beside.name}/ now")

    def owner(self) -> str | None:
        """Who writes into it now; None where nobody does."""
        try:
            with (self.path / "lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return (self.path / "lock").read_text().strip() or "another process"
        except OSError:  # there is none, or the file system has no locks
            return None
        return None

    def note_rows(self, dropped: list[str], truncated: list[str]) -> None:
        """Write which rows were left out or shortened into `rows.txt`, and say how many."""
        if dropped or truncated:
            lines = [f"dropped {line}" for line in dropped] + [f"shortened {line}" for line in truncated]
            (self.path / "rows.txt").write_text("\n".join(lines) + "\n")
            print(
                f"data.too_long: {len(dropped)} rows dropped, {len(truncated)} demonstrations shortened; "
                f"see {self.path / 'rows.txt'}",
                file=sys.stderr,
            )

    def note_evaluation(self, step: int, judged: dict[str, list[Judged]]) -> None:
        """Write every held-out row, with its completion, into `eval/step-NNNNNN.jsonl`."""
        write_evaluation(self._evaluation(step), judged)

    def evaluation(self, step: int) -> dict[str, list[Judged]]:
        """What `note_evaluation` wrote, in its order; empty where nothing was evaluated at that step. Raises UserError
        where a line is damaged."""
        judged: dict[str, list[Judged]] = {}
        for row in read_jsonl(self._evaluation(step)):
            fields = {name: row[name] for name in Judged._fields if name in row}
            judged.setdefault(row["set"], []).append(Judged(**fields))
        return judged

    def _evaluation(self, step: int) -> Path:
        return self.path / "eval" / f"step-{step:06d}.jsonl"

    def samples(self, step: int) -> Path:
        """The file for samples that a step was taken on."""
        return self.path / "samples" / f"step-{step:06d}.jsonl"

    def files_of_steps(self, folder: str) -> list[tuple[int, Path]]:
        """Step and file of all that is in `eval` or `samples`, in order."""
        found = ((path.stem.removeprefix("step-"), path) for path in sorted(self.path.glob(f"{folder}/step-*.jsonl")))
        return [(int(step), path) for step, path in found if step.isdecimal()]  # not of a copy that somebody made

    def new_attempt(self, config: Config) -> Path:
        """A folder for what belongs to one attempt only, numbered from 001: its settings, and its trace."""
        attempts = self.path / "attempts"
        attempts.mkdir(exist_ok=True)
        last = max((int(path.name) for path in attempts.iterdir() if path.name.isdecimal()), default=0)
        folder = attempts / f"{last + 1:03d}"
        folder.mkdir()
        write_whole(folder / "config.yaml", dump_config(config))  # `sdft status` may look for it now
        return folder

    def say(self, text: str) -> None:
        """One line about the run's life, into run.log; further lines of `text` are indented below it."""
        with (self.path / "run.log").open("a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} " + text.replace("\n", "\n    ") + "\n")

    def newest(self) -> Start:
        """The newest sound checkpoint, or where the run began while it has none at all. Says which ones were passed
        over; raises UserError where that is all, and where a finished run has none any more."""
        step, broken = commits.newest(self.commits)
        if broken and step is None:
            raise UserError(
                f"{self.path}: none of its checkpoints is sound; remove them to begin anew\n" + "\n".join(broken)
            )
        if step is None and self.finished:
            raise UserError(
                f"{self.path}: is finished, and its checkpoints were removed: there is nothing to go on from; give "
                f"another run_dir=…, or remove {self.path / 'model'} to begin anew"
            )
        for line in broken:
            print(f"sdft: {line}", file=sys.stderr)
            self.say(line)
        return self._origin() if step is None else Start(step, self.commits.path(step))

    def _note_origin(self, start: Start) -> None:
        path = self.path / ORIGIN
        path.unlink(missing_ok=True)  # of a start that failed
        if start.checkpoint is not None:
            write_whole(path, json.dumps({"step": start.step, "checkpoint": str(start.checkpoint.absolute())}))

    def _origin(self) -> Start:
        """The beginning, or the checkpoint of another run from which this one went on."""
        path = self.path / ORIGIN
        if not path.is_file():
            return Start()
        told = json.loads(path.read_text())
        commits.read_manifest(Path(told["checkpoint"]))  # raises where it is not sound
        return Start(told["step"], Path(told["checkpoint"]))

    def rewind(self, step: int) -> None:
        """Forget what came after `step`, which will be done again: checkpoints, evaluations, samples, metrics, and what
        was exported at the end of a history that went further. Raises UserError where the metrics are damaged."""

        def left(other: int) -> bool:
            return other > step or step == 0  # what is measured at the start is measured again, too

        metrics = self.path / "metrics.jsonl"
        records = read_jsonl(metrics)
        kept = [record for record in records if not left(record["step"])]
        files = [path for folder in ("eval", "samples") for at, path in self.files_of_steps(folder) if left(at)]
        if files or len(kept) < len(records) or any(map(left, self.commits.steps())):
            for name in EXPORTS:
                if (self.path / name).is_dir():
                    shutil.rmtree(self.path / name)
        self.commits.drop_after(step)
        for path in files:
            path.unlink()
        if metrics.is_file():  # last, as a rewind that is interrupted shall find again that something was left
            # Cut, for whoever has it open to go on writing; steps only rise in it.
            lines = metrics.read_bytes().split(b"\n")[: len(kept)]
            os.truncate(metrics, sum(len(line) + 1 for line in lines))

    def checkpoint(self, step: int | None) -> Path:
        """Folder of a checkpoint, the newest where `step` is None. Raises UserError where there is none."""
        steps = self.commits.steps()
        if not steps:
            raise UserError(f"{self.path}: has no finished checkpoint")
        if step is not None and step not in steps:
            raise UserError(f"{self.path}: has no finished checkpoint of step {step}; there are {steps}")
        return self.commits.path(steps[-1] if step is None else step)

    def _start(self, resume: str) -> Start:
        """Where `resume` says to begin, at a checkpoint that is sound."""
        if resume == "auto":
            return self.newest()
        if resume.startswith("step="):
            number = resume.removeprefix("step=")
            if not number.isdecimal():
                raise UserError(f"--resume: got {resume!r}, expected step=N with a number")
            folder = self.checkpoint(int(number))
        else:
            folder = Path(resume).absolute()  # ranks of a cluster that runs work in its folder, not in this one
            if not folder.is_dir():
                raise UserError(f"--resume: {resume}: no such folder; give auto, step=N, or a run or checkpoint")
            if (folder / "config.yaml").is_file():
                folder = RunDir(folder).checkpoint(None)
        return Start(int(commits.read_manifest(folder)["step"]), folder)

    def _refuse_used(self) -> None:
        """Raises UserError unless the folder is empty, or holds no more than the files of a start that failed."""
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"run_dir: {self.path} is a file, expected a folder")
        if owner := self.owner():
            raise UserError(f"run_dir: {self.path} is being written to by {owner}")
        names = {p.name for p in self.path.iterdir() if p.name != "metrics.jsonl" or p.stat().st_size}
        is_run, steps = self._is_run(), self.commits.steps()
        if names <= {"lock", "config.yaml.new"} or (is_run and names <= LEFT_BY_A_START):
            return
        if not is_run and not steps:
            first = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
            raise UserError(f"run_dir: {self.path} holds files that are not a run's ({first}): give another run_dir=…")
        ways = f"go on from step {steps[-1]} with --resume auto, " if steps else "remove it, as it has no checkpoint, "
        raise UserError(f"run_dir: {self.path} is already in use: {ways}or give another run_dir=…")

    def _take_lock(self) -> None:
        """Raises UserError where a process of this machine has it, Fault where one of another has had it for LEASE_S
        longer: NFS keeps the locks of a machine that died for a while."""
        # The kernel lets go of it with its owner, however that ends.
        lock = (self.path / "lock").open("a+")
        began, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                lock.seek(0)
                owner = lock.read().strip() or "another process"
                text = f"run_dir: {self.path} is being written to by {owner}"
                elsewhere = " on " in owner and owner.rpartition(" on ")[2] != socket.gethostname()
                if time.monotonic() - began > (LEASE_S if elsewhere else LOOK_S):
                    lock.close()
                    raise (Fault if elsewhere else UserError)(text) from None
                if elsewhere and not told:
                    print(f"sdft: {text}; waits {LEASE_S:.0f} s for the end of its lock", file=sys.stderr)
                    told = True
                time.sleep(LOOK_S / 2)
            except OSError as e:
                lock.close()
                raise UserError(
                    f"run_dir: {self.path}: its file system has no locks ({e.strerror}): use another"
                ) from e
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        self._lock = lock


def refuse_other_settings(config: Config, ignore: Collection[str] = ()) -> None:
    """Raises UserError where `config.run_dir` was begun with other settings, in sections besides `ignore`."""
    path = Path(config.run_dir) / "config.yaml"
    if not path.is_file():
        return
    before, now = load_config(path).model_dump(), config.model_dump()
    differing = [name for name in now if name not in ("run_dir", *ignore) and before[name] != now[name]]
    if differing:
        raise UserError(f"{path.parent}: was run with another {', '.join(differing)}: give another `out`, or remove it")


def write_evaluation(path: Path, judged: Mapping[str, Sequence[Judged]]) -> None:
    """Write every held-out row, with its completion, as a line of JSON."""
    numbered = ((name, i, row) for name, rows in judged.items() for i, row in enumerate(rows))
    write_jsonl(path, ({"set": name, "row": i, **row._asdict()} for name, i, row in numbered))
