"""Low-rank adapters (LoRA, arXiv 2106.09685) between learner and engines: only they are pushed, and each engine
adds them to the weights that it was given once.

So decoding costs what it costs without adapters, and requests under way go on with the new ones. In a push an
adapter's halves A [r, in] and B [out, r] of the weight W [out, in] are named `MODULE.lora_A.default.weight` and
`MODULE.lora_B.default.weight`, as peft names them; what is served is W + alpha / r · B A.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch

_HALF = re.compile(r"(?P<module>.+)\.lora_(?P<half>[AB])\.default\.weight")


class Half(NamedTuple):
    """One half of the adapter of a weight."""

    weight: str  # the adapted weight's name in the Hugging Face state dict
    half: str  # "A" or "B"


def half_of(name: str) -> Half | None:
    """What a parameter's name says; None where it is no half of an adapter."""
    found = _HALF.fullmatch(name)
    return Half(f"{found['module']}.weight", found["half"]) if found else None


def plain_name(name: str) -> str:
    """The Hugging Face name of a weight that peft has wrapped."""
    return name.replace(".base_layer.", ".")


def add(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    """weight + scale · b a, formed in fp32, in the weight's type. weight [out, in], a [r, in], b [out, r]."""
    return torch.addmm(weight.float(), b, a, alpha=scale).to(weight.dtype)


class Merger:
    """An engine's end: keeps the adapted weights, in host memory, and merges what is pushed."""

    def __init__(self) -> None:
        self._weights: dict[str, torch.Tensor] = {}
        self._halves: dict[str, dict[str, torch.Tensor]] = {}
        self._awaited: set[str] = set()

    def begin(self, names: Iterable[str], scale: float) -> None:
        """A push of these names starts; `scale` is alpha / r."""
        self._scale, self._halves = scale, {}
        self._awaited = {half.weight for name in names if (half := half_of(name))}

    def merged(
        self, tensors: Iterable[tuple[str, torch.Tensor]], device: torch.device
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Weights to load: those without an adapter as they come, the others when both halves are there. Raises
        RuntimeError where adapters come without the weights that they belong to."""
        for name, tensor in tensors:
            half = half_of(name)
            if half is not None:
                halves = self._halves.setdefault(half.weight, {})
                halves[half.half] = tensor.to(device, torch.float32, copy=True)
                if len(halves) == 2:
                    yield half.weight, self._sum(half.weight, device)
            elif name in self._awaited:
                kept = torch.empty_like(tensor, device="cpu", pin_memory=device.type == "cuda")  # each push reads it
                self._weights[name] = kept.copy_(tensor)
            else:
                yield name, tensor

    def unmerged(self) -> set[str]:
        """Weights of which no whole adapter came in this push."""
        return self._awaited

    def _sum(self, name: str, device: torch.device) -> torch.Tensor:
        if name not in self._weights:
            raise RuntimeError(f"weight push: an adapter of {name} came, and never the weight itself")
        weight, halves = self._weights[name], self._halves.pop(name)
        self._awaited.discard(name)
        return add(weight.to(device, non_blocking=True), halves["A"], halves["B"], self._scale)
