"""The run directory: its layout, and the refusal to write into a used one."""

from __future__ import annotations

import sys
from pathlib import Path

from sdft_dist.config import Config, dump_config
from sdft_dist.errors import UserError


class RunDir:
    """config.yaml · metrics.jsonl · events/ · checkpoints/step-000100/ · model/"""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, config: Config) -> RunDir:
        """Make the directory and save the resolved configuration. Raises UserError where the folder
        already holds something."""
        path = Path(config.run_dir)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise UserError(f"run_dir: {path} is already in use: give another run_dir=…, or remove it")
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").write_text(dump_config(config))
        return cls(path)

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

    @classmethod
    def open(cls, path: Path) -> RunDir:
        """An existing run. Raises UserError where `path` holds none."""
        if not (path / "config.yaml").is_file():
            raise UserError(f"{path}: is not a run directory (it has no config.yaml)")
        return cls(path)

    def checkpoint(self, step: int) -> Path:
        """Folder of the checkpoint after `step` optimizer steps."""
        return self.path / "checkpoints" / f"step-{step:06d}"

    def latest_checkpoint(self) -> Path:
        """The newest committed checkpoint. Raises UserError where there is none."""
        committed = sorted(p.parent for p in self.path.glob("checkpoints/step-*/COMMITTED"))
        if not committed:
            raise UserError(f"{self.path}: has no finished checkpoint")
        return committed[-1]
