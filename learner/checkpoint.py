"""A learner's whole state as shards of named fp32 fragments, one safetensors file per rank, or several.

Not DeepSpeed's own checkpoints: those are pickles, are written under a `latest` marker before all
shards are on disk, and are bound to one number of ranks. Fragments carry the parameter's name and
offset, so any number of ranks, any ZeRO stage, or no DeepSpeed at all can read them.
Keys read `kind|name|start`, where kind is master, ema, or an optimizer state. commits.py decides
which folders count.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from learner.ema import Ema
from learner.zero import Fragment
from sdft_dist.config import Config
from sdft_dist.errors import UserError
from sdft_dist.types import ShardFile

RNG = "rng"
PART_BYTES = 2 << 30


class ShardWriter:
    """Writes one rank's shards in a thread, from a copy, while training goes on; or `in_parts`, before it does, which
    takes PART_BYTES of memory instead of as much as the state."""

    def __init__(self, *, in_parts: bool) -> None:
        self._in_parts = in_parts
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future[list[ShardFile]] | None = None

    def start(
        self,
        folder: Path,
        rank: int,
        fragments: Iterable[Fragment],
        ema: Ema | None,
        optimizer_step: int,
        anchor: str | None,
    ) -> None:
        """Copy the state to CPU memory and begin to write `rank-NNN.safetensors`, or write it and more such files;
        `anchor` is `teacher.anchor`."""
        metadata = {"optimizer_step": str(optimizer_step), "anchor": anchor or ""}
        parts = _parts(_state(fragments, ema), PART_BYTES if self._in_parts else math.inf)
        files = ((folder / f"rank-{rank:03d}{f'-{i}' if i else ''}.safetensors", part) for i, part in enumerate(parts))
        if self._in_parts:
            self._writing = Future()
            self._writing.set_result(_write_all(files, metadata))
        else:
            self._writing = self._thread.submit(_write_all, list(files), metadata)

    def finish(self, wait: bool) -> list[ShardFile] | None:
        """What was written, or None while it is under way and `wait` is false. Raises what writing raised."""
        assert self._writing is not None
        if not wait and not self._writing.done():
            return None
        return self._writing.result()

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def _state(fragments: Iterable[Fragment], ema: Ema | None) -> Iterator[tuple[str, torch.Tensor]]:
    """All that a checkpoint holds of a rank, by its key."""
    yield f"{RNG}|torch|0", torch.get_rng_state()
    for f in fragments:
        for kind, value in {"master": f.master, **f.state}.items():
            yield f"{kind}|{f.name}|{f.start}", value.detach()
    for name, (start, average) in (ema.averages if ema else {}).items():
        yield f"ema|{name}|{start}", average


def _parts(state: Iterable[tuple[str, torch.Tensor]], limit: float) -> Iterator[dict[str, torch.Tensor]]:
    """Copies in CPU memory, of at most `limit` bytes at a time but for single tensors that are larger."""
    part: dict[str, torch.Tensor] = {}
    size = 0
    for key, tensor in state:
        if part and size + tensor.nbytes > limit:
            yield part
            part, size = {}, 0
        part[key] = tensor.to("cpu", copy=True)
        size += tensor.nbytes
    yield part


def _write_all(files: Iterable[tuple[Path, dict[str, torch.Tensor]]], metadata: dict[str, str]) -> list[ShardFile]:
    written = []
    for path, tensors in files:
        written.append(_write(path, tensors, metadata))
        tensors.clear()  # before the next part is copied
    return written


def _write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> ShardFile:
    if not path.parent.is_dir():  # the driver has made it
        raise OSError(f"{path.parent}: is not on this rank's machine: run_dir must be on a file system that all share")
    try:
        save_file(tensors, path, metadata)
    except SafetensorError as e:
        raise OSError(f"{path}: {e}") from e  # what is wrong with the disk is in its text only
    with path.open("rb") as file:
        os.fsync(file.fileno())
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return ShardFile(name=path.name, bytes=path.stat().st_size, sha256=digest)


class Shards:
    """Reads any part of a checkpoint, whatever number of ranks wrote it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pieces: dict[tuple[str, str], list[tuple[int, Any, str]]] = {}
        self.optimizer_step = 0  # updates that Adam's bias correction has counted
        self.anchor: str | None = None  # `teacher.anchor` of the run
        for path in sorted(folder.glob("rank-*.safetensors")):
            file = safe_open(path, "pt")
            metadata = file.metadata() or {}
            self.optimizer_step, self.anchor = int(metadata.get("optimizer_step", 0)), metadata.get("anchor") or None
            for key in file.keys():  # noqa: SIM118  # safe_open is no mapping
                kind, name, start = key.split("|")
                place = (kind, f"{name}-{path.stem}" if kind == RNG else name)
                self._pieces.setdefault(place, []).append((int(start), file, key))

    def has(self, kind: str) -> bool:
        """Whether anything of `kind` was saved."""
        return any(found == kind for found, _ in self._pieces)

    def sizes(self, kind: str) -> dict[str, int]:
        """The parameters of which `kind` was saved, and their numbers of elements."""
        return {name: self._size(kind, name) for found, name in self._pieces if found == kind}

    def _size(self, kind: str, name: str) -> int:
        pieces = self._pieces.get((kind, name), [])
        return max((start + file.get_slice(key).get_shape()[0] for start, file, key in pieces), default=0)

    def read(self, kind: str, name: str, start: int, size: int) -> torch.Tensor:
        """Elements [start, start + size) of a flattened parameter, fp32. Raises UserError where they are
        not all there."""
        out, covered = torch.empty(size, dtype=torch.float32), 0
        for first, file, key in self._pieces.get((kind, name), []):
            piece = file.get_slice(key)
            (length,) = piece.get_shape()
            low, high = max(start, first), min(start + size, first + length)
            if low < high:
                out[low - start : high - start] = piece[low - first : high - first]
                covered += high - low
        if covered != size:
            raise UserError(f"{self.folder}: {kind} of {name} is incomplete: {covered} of {size} elements are there")
        return out

    def full(self, kind: str, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """One whole parameter, fp32. Raises UserError where it is not all there, or is larger."""
        expected, saved = torch.Size(shape).numel(), self._size(kind, name)
        if saved > expected:
            raise UserError(
                f"{self.folder}: {kind} of {name} has {saved} elements, expected {expected} by model.path: give the "
                "model folder that the run began with"
            )
        return self.read(kind, name, 0, expected).view(shape)

    def rng_state(self, rank: int) -> torch.Tensor | None:
        """The state of torch's generator on `rank`; None where there was no such rank."""
        for _, file, key in self._pieces.get((RNG, f"torch-rank-{rank:03d}"), []):
            return file.get_tensor(key)
        return None


def anchor(config: Config, shards: Shards | None) -> str | None:
    """The model folder where the average starts. None where it starts at the student, or goes on from `shards`: the
    run's own, or those of another run whose anchor was the same."""
    wanted = config.teacher.anchor
    if wanted is None or shards is None or not shards.has("ema"):
        return wanted
    if shards.folder.is_relative_to(config.run_dir):
        return None
    return None if shards.anchor == wanted else wanted
