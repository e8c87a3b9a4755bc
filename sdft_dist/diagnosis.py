"""What is behind an error of a run: an actor's end, a machine or its memory."""

from __future__ import annotations

from typing import Any

from sdft_dist.errors import ActorLost, Fault, NotServing, UserError, brief, is_broken_device, is_out_of_memory
from sdft_dist.last_words import is_death, obituary


def explain(error: Exception, actors: list[Any]) -> Exception | None:
    """The error in this project's terms; None where no failure of an actor, a machine or its memory caused it."""
    from ray.exceptions import ObjectLostError, ObjectStoreFullError, OutOfDiskError

    if isinstance(error, OutOfDiskError | ObjectStoreFullError):
        return Fault(f"Ray's object store is full and has no disk to spill to; checkpoints are intact: {brief(error)}")
    if is_out_of_memory(getattr(error, "cause", None)):
        return UserError(
            "a GPU's memory does not hold the learner's step: lower learner.tokens_per_microbatch, give "
            f"learner.gradient_checkpointing=full, or see what sdft plan says; checkpoints are intact: {brief(error)}"
        )
    # The third is what a process group says when a rank hangs; the error's note names the rank.
    lost = isinstance(error, TimeoutError | NotServing | ObjectLostError) or "timed out" in str(error).lower()
    if lost or is_death(error) or is_broken_device(getattr(error, "cause", None)) or _any_dead(actors):
        return ActorLost(obituary(error))
    return None


def _any_dead(actors: list[Any]) -> bool:
    """Whether an actor has ended; its end may become known some seconds after what it caused."""
    import ray

    refs = [actor.__ray_ready__.remote() for actor in actors]
    ready, _ = ray.wait(refs, num_returns=len(refs), timeout=5.0)
    for ref in ready:
        try:
            ray.get(ref)
        except Exception as error:
            if is_death(error):
                return True
            raise
    return False
