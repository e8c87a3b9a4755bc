"""Records into Ray's object store and out of it: small ones share an object, because each costs a fixed price."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from sdft_dist.types import Piece

OBJECT_BYTES = 1 << 20  # an object is closed when it holds this much


def put(records: Sequence[Any]) -> list[Piece]:
    """One Piece for each record (a dataclass with numpy fields), in order."""
    import ray

    pieces: list[Piece] = []
    pending: list[Any] = []
    size = 0
    for i, record in enumerate(records):
        pending.append(record)
        size += _num_bytes(record)
        if size >= OBJECT_BYTES or i == len(records) - 1:
            ref = ray.put(pending)
            pieces += [Piece(ref, row) for row in range(len(pending))]
            pending, size = [], 0
    return pieces


def fetch(pieces: Sequence[Piece]) -> list[Any]:
    """The records that `pieces` name, in order; each object is fetched once."""
    import ray

    refs = list(dict.fromkeys(piece.ref for piece in pieces))
    objects = dict(zip(refs, ray.get(refs), strict=True))
    return [objects[piece.ref][piece.row] for piece in pieces]


def _num_bytes(record: Any) -> int:
    values = (getattr(record, name) for name in record.__dataclass_fields__)
    return sum(value.nbytes for value in values if isinstance(value, np.ndarray))
