"""A rank's shards, written in one file or in parts, hold the same state."""

import pytest
import torch
from safetensors.torch import load_file

from learner import checkpoint
from learner.checkpoint import Shards, ShardWriter
from learner.ema import Ema
from learner.zero import Fragment


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
