"""The errors that a user can mend or must know of, each with the exit code of the command line."""

from __future__ import annotations


class UserError(ValueError):
    """Configuration, data or a model folder is wrong. The message names the field or the row, the
    value found, the value expected, and what to do. Exit code 2."""


class ConfigError(UserError):
    """The configuration is wrong."""


class DataError(UserError):
    """Rows are wrong; the message has a line `file:line: field: problem` for each."""


class NotServing(RuntimeError):
    """An engine has no whole set of weights: a push to it was interrupted."""


class ActorLost(RuntimeError):
    """A learner rank has died or hangs, and its group with it; the run goes on from a checkpoint."""


class Preempted(RuntimeError):
    """Asked to stop (SIGTERM): the state is saved, and `--resume auto` goes on. Exit code 3."""


class Fault(RuntimeError):
    """Machines or disks failed more often than a run survives. Exit code 4."""


class Diverged(RuntimeError):
    """The loss is not a number any more. Exit code 5."""


class ScorerFailed(RuntimeError):
    """A scorer of the user's own has raised an error. Exit code 1, with both tracebacks."""


OURS = (UserError, NotServing, ActorLost, Preempted, Fault, Diverged, ScorerFailed)


def is_broken_device(error: object) -> bool:
    """Whether a GPU's driver has failed under a process, which can compute nothing any more."""
    import torch

    return isinstance(error, torch.AcceleratorError)


def is_out_of_memory(error: object) -> bool:
    """Whether a GPU's memory did not hold what was asked of it."""
    import torch

    return isinstance(error, torch.OutOfMemoryError)


def brief(error: BaseException) -> str:
    """One line: the first of our own errors; the first sentence of the last line of others (Ray's go on for a
    page), with their notes; the type where it says nothing."""
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    if isinstance(error, OURS):
        return lines[0]
    if type(error).__name__ == "OutOfMemoryError":  # Ray's ends with advice
        return lines[0].split(". ")[0]
    return "; ".join([lines[-1].split(". ")[0], *getattr(error, "__notes__", ())])
