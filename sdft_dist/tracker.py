"""A run's metrics at Weights & Biases, beside metrics.jsonl, where the field `wandb` names a project.

The run directory holds the run's id there, so that attempts and resumed runs are one run. What is wrong before the
start ends it; what fails later is told once, as metrics.jsonl has everything.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdft_dist.config import Config
from sdft_dist.errors import Fault, Preempted, UserError, brief
from sdft_dist.files import write_whole
from sdft_dist.recipe import flat

Tracker = Callable[[str, int, dict[str, float]], None]  # kind of a record, step, its numbers by name
FINISH_S = 20.0  # for what has not been uploaded at the end; `wandb sync` uploads the rest


def untracked(kind: str, step: int, numbers: dict[str, float]) -> None:
    """Of a run that is not tracked."""


@contextmanager
def tracked(config: Config, folder: Path, say: Callable[[str], None]) -> Iterator[Tracker]:
    """What takes the numbers of the run in `folder`, as KIND/NAME. Raises UserError where nobody is logged in, Fault
    where the server does not answer. Steps that are done again after a restart are there as they were first."""
    if config.wandb is None:
        yield untracked
        return
    import wandb

    entity, _, project = config.wandb.rpartition("/")
    known = folder / "wandb" / "run-id"
    if not known.exists():
        write_whole(known, uuid.uuid4().hex)
    options = wandb.Settings(silent=True, console="off", disable_code=True, disable_git=True, finish_timeout=FINISH_S)
    try:
        run = wandb.init(
            entity=entity or None,
            project=project,
            id=known.read_text(),
            resume="allow",
            name="/".join(folder.parts[-2:]),  # of sweeps all end in "run"
            job_type=config.method,
            dir=folder,
            config=flat(config),
            allow_val_change=True,  # a resumed run may have other free settings
            settings=options,
        )
    except wandb.errors.Error as e:
        kind = UserError if isinstance(e, wandb.errors.UsageError) else Fault
        raise kind(f"wandb: {str(e).splitlines()[0]} Or set WANDB_MODE=offline, and `wandb sync` later") from e
    failed = False

    def track(kind: str, step: int, numbers: dict[str, float]) -> None:
        nonlocal failed
        if failed or step < run.step:  # W&B's steps only grow
            return
        try:
            run.log({f"{kind}/{name}": value for name, value in numbers.items()}, step=step)
        except Exception as error:  # of a process of W&B's that has died; the run is worth more
            failed = True
            say(f"wandb: {brief(error)}: gets nothing any more; metrics.jsonl has everything")

    code = 1
    try:
        yield track
        code = 0
    except Preempted:
        run.mark_preempting()  # so that it does not count as failed there
        raise
    finally:
        with suppress(Exception):  # as above
            run.finish(exit_code=code)
            wandb.teardown()  # ends its process
