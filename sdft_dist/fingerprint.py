"""What must stay the same when a run goes on from a checkpoint: settings, data, model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdft_dist.config import Config
from sdft_dist.errors import ConfigError
from sdft_dist.types import Problem

# Where and how fast a run works, and what it reports, may change; what it learns may not.
FREE = ("run_dir", "trace", "cluster", "eval", "checkpoint", "learner", "rollout.max_held_mib", "data.train")


def fingerprint(config: Config, problems: Iterable[Problem]) -> dict[str, Any]:
    """One entry for each setting that decides what is learned, a hash of the rows' token ids, and one of
    the model's configuration."""
    entries = {key: value for key, value in _flat("", config.model_dump(mode="json")) if not _free(key)}
    if not config.model.lora.rank:  # settings of adapters that there are not, and that earlier runs did not write
        entries = {key: value for key, value in entries.items() if not key.startswith("model.lora.")}
    digest = hashlib.sha256()
    for problem in problems:
        for ids in (problem.prompt_ids, problem.teacher_prompt_ids, problem.demonstration_ids):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    entries["data (token ids)"] = digest.hexdigest()
    settings = Path(config.model.path) / "config.json"
    if settings.is_file():
        entries["model (config.json)"] = hashlib.sha256(settings.read_bytes()).hexdigest()
    return dict(json.loads(json.dumps(entries)))


def refuse_changes(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Raises ConfigError that names every difference."""
    keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if keys:
        lines = [f"{key}: was {before.get(key)!r}, is {now.get(key)!r}" for key in keys]
        raise ConfigError(
            f"{where}: was saved by a run with other settings; go back to them, or give --allow-changes:\n"
            + "\n".join(lines)
        )


def _flat(prefix: str, tree: dict[str, Any]) -> Iterable[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(f"{prefix}{name}.", value)
        else:
            yield f"{prefix}{name}", value


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)
