"""The errors that a user can mend or must know of, each with the exit code of the command line."""

from __future__ import annotations


def brief(error: BaseException) -> str:
    """The first sentence of an error's last line, or its type where it says nothing; Ray's go on for a page."""
    lines = str(error).strip().splitlines()
    return lines[-1].split(". ")[0] if lines else type(error).__name__


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
