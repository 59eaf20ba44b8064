"""Keys and values of the text and the like: made in FULL steps, and again where what makes them changed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..capture.capture import Program
from ..passes.analysis.hoist import Hoisted
from ..passes.analysis.inputs import is_state
from ..sessions.branches import Branch, version


@dataclass(frozen=True)
class Made:
    """What keys and values were made of.

    Attributes:
        weights: a number that is another one after parameters changed.
        given: the tensors, but for parameters, and how often each was changed in place.
        copies: of those that a call is given and no module holds; None of the others.
    """

    weights: int
    given: tuple[tuple[torch.Tensor, int], ...]
    copies: tuple[torch.Tensor | None, ...]

    def holds(self, weights: int, given: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same.

        A text may be another object in each call, of memory that is written anew, so it is compared by value. What is
        written through `.data` into one object is not seen before the next FULL step.
        """
        pairs = zip(self.given, self.copies, given, strict=True)
        return weights == self.weights and all(_is_same(*known, copy, now) for known, copy, now in pairs)


def _is_same(old: torch.Tensor, old_version: int, copy: torch.Tensor | None, now: torch.Tensor) -> bool:
    counted = copy is None or not now.is_inference()  # tensors of inference mode count no changes
    if old is now and old_version == version(now) and counted:
        return True
    alike = copy is not None and (copy.dtype, copy.device, copy.shape) == (now.dtype, now.device, now.shape)
    return alike and bool(torch.equal(copy, now))  # type: ignore[arg-type]


class Unchanging:
    """What a graph takes as its last inputs, after `passes.analysis.hoist`.

    Args:
        hoisted: the graph in two.
        program: what was taken apart.
    """

    def __init__(self, hoisted: Hoisted, program: Program) -> None:
        self._make, self._names = hoisted.before, hoisted.names
        self._values = [node.meta["val"] for node in hoisted.before.graph.output_node().all_input_nodes]
        places = {name: number for number, name in enumerate(program.inputs)}
        self._takes = [program.state.get(name, places.get(name)) for name in hoisted.takes]
        self._is_state = [name in program.state or is_state(name) for name in hoisted.takes]

    def empty(self, device: torch.device) -> list[torch.Tensor]:
        """Memory for them."""
        return [torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=device) for one in self._values]

    def memory(self, branch: Branch, owner: Hashable, device: torch.device) -> list[torch.Tensor]:
        """Those of a branch, allocated if need be."""
        memory = branch.memory(owner)
        if self._names[0] not in memory:
            branch.made_of = None
            memory.update(zip(self._names, self.empty(device), strict=True))
        return [memory[name] for name in self._names]

    def of(
        self, branch: Branch, owner: Hashable, weights: int, inputs: Sequence[Any], *, anew: bool
    ) -> list[torch.Tensor]:
        """Those of a branch, made anew unless they were made of the same.

        Args:
            branch: whose memory has room for them.
            owner: of that memory.
            weights: a number that is another one after parameters changed.
            inputs: of the graph.
            anew: whether to make them without a look, as in a FULL step, which is right whatever was done meanwhile.
        """
        memory = branch.memory(owner)
        held = [memory[name] for name in self._names]
        taken = [inputs[place] if isinstance(place, int) else place for place in self._takes]
        places = [number for number, one in enumerate(taken) if not isinstance(one, torch.nn.Parameter)]
        given: list[Any] = [taken[number] for number in places]
        if not anew and branch.made_of is not None and branch.made_of.holds(weights, given):
            return held
        branch.made_of = None
        # The casts that autocast asks for are in the graph.
        with torch.autocast(held[0].device.type, enabled=False):
            for one, new in zip(held, self._make(*taken), strict=True):
                one.copy_(new)
        copies = tuple(None if self._is_state[n] else one.clone() for n, one in zip(places, given, strict=True))
        branch.made_of = Made(weights, tuple((one, version(one)) for one in given), copies)
        return held
