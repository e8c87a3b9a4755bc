"""What must stay the same when a run goes on from a checkpoint: settings, data, model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from sdft_dist.config import Config
from sdft_dist.errors import ConfigError
from sdft_dist.recipe import flat
from sdft_dist.types import Problem

# Where and how fast a run works, and what it reports, may change; what it learns may not.
FREE = ("run_dir", "trace", "wandb", "cluster", "eval", "checkpoint", "learner", "rollout.max_held_mib", "data.train")
# Of each file of weights that are hashed: the first bytes, with the names and shapes, and samples evenly over the rest.
FIRST_BYTES, SAMPLES, SAMPLE_BYTES = 1 << 20, 256, 4096


def fingerprint(config: Config, problems: Iterable[Problem]) -> dict[str, Any]:
    """Settings that decide what is learned, a hash of the rows' token ids, and the identity of the model, and of a
    frozen teacher from another folder."""
    entries = {key: value for key, value in flat(config).items() if not _free(key)}
    if not config.model.lora.rank:  # settings of adapters that there are not, and that earlier runs did not write
        entries = {key: value for key, value in entries.items() if not key.startswith("model.lora.")}
    digest = hashlib.sha256()
    for problem in problems:
        for ids in (problem.prompt_ids, problem.teacher_prompt_ids, problem.demonstration_ids):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
    entries["data (token ids)"] = digest.hexdigest()
    models = {"model": (config.model.path, config.model.revision)}
    if config.teacher.kind == "base" and config.teacher.anchor:
        models["teacher.anchor"] = (config.teacher.anchor, None)
    for name, place in models.items():
        entries |= {f"{name} ({what})": value for what, value in _identity(*place).items()}
    return entries


def refuse_another_base(config: Config, before: dict[str, Any]) -> None:
    """Raises ConfigError where model.path holds another model than when the fingerprint `before` was taken, in what an
    export takes from it: the configuration, and the weights where adapters are added to them."""
    parts = ("config.json", "weights", "hub commit") if config.model.lora.rank else ("config.json",)
    now = _identity(config.model.path, config.model.revision)
    # What is None or not there was not known then, or is not now.
    known = [part for part in parts if None not in (before.get(f"model ({part})"), now.get(part))]
    changed = [part for part in known if before[f"model ({part})"] != now[part]]
    if changed:
        back = "put that one back"
        if "hub commit" in changed:
            back = f"give model.revision: {before['model (hub commit)']} in the run's config.yaml"
        raise ConfigError(
            f"model.path: {config.model.path}: is not the model that the run began with: another {', '.join(changed)}; "
            f"{back}"
        )


def _identity(path: str, revision: str | None) -> dict[str, Any]:
    """What tells the model in the folder `path` from another one: its configuration, weights and end tokens; of a hub
    id its commit, once its tokenizer is in the cache."""
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        found = None
        with suppress(ValueError):  # of a path that is no hub id, which whoever loads it refuses
            found = try_to_load_from_cache(path, "tokenizer_config.json", revision=revision)
        return {"hub commit": Path(found).parent.name if isinstance(found, str) else None}
    identity: dict[str, Any] = {"weights": _weights(folder)}
    settings = folder / "config.json"
    if settings.is_file():
        identity["config.json"] = hashlib.sha256(settings.read_bytes()).hexdigest()
    with suppress(OSError, ValueError):  # a model folder need not have them
        identity["end tokens"] = json.loads((folder / "generation_config.json").read_text()).get("eos_token_id")
    return identity


def _weights(folder: Path) -> str:
    """A hash over the names and sizes of the files of weights, and over samples of what is in them: fast for any
    size, and another one after any training, though not for a change of single bytes."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin")):
        size = path.stat().st_size
        digest.update(f"{path.name}/{size}/".encode())
        with path.open("rb") as file:
            digest.update(file.read(FIRST_BYTES))
            for sample in range(SAMPLES):
                file.seek(sample * size // SAMPLES)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def refuse_changes(before: dict[str, Any], now: dict[str, Any], where: Path) -> None:
    """Raises ConfigError that names every difference."""
    keys = sorted(k for k in before.keys() | now.keys() if before.get(k) != now.get(k))
    if keys:
        lines = [f"{key}: was {_told(before, key)}, is {_told(now, key)}" for key in keys]
        raise ConfigError(
            f"{where}: was saved by a run with other settings; go back to them, or give --allow-changes:\n"
            + "\n".join(lines)
        )


def _told(entries: dict[str, Any], key: str) -> str:
    return repr(entries[key]) if key in entries else "not noted"  # by an earlier version of this program


def _free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in FREE)
