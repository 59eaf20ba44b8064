"""Keys and values of the text and the like: made when a branch begins, and again where what makes them changed."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch

from ..capture.capture import Program
from ..passes.analysis.hoist import Hoisted
from ..passes.analysis.inputs import is_state
from .branches import Branch, Remembered, holds, remember


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
        self._others = [places[name] for name in hoisted.takes if name not in program.state and not is_state(name)]

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

    def of(self, branch: Branch, owner: Hashable, weights: int, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """Those of a branch, made anew unless they were made of the same.

        Args:
            branch: whose memory has room for them.
            owner: of that memory.
            weights: a number that is another one after the weights changed.
            inputs: of the graph.
        """
        memory = branch.memory(owner)
        held = [memory[name] for name in self._names]
        others = [inputs[number] for number in self._others]
        known = branch.made_of
        if known is None or known[0] != weights or not all(map(holds, known[1], others)):
            given = [inputs[place] if isinstance(place, int) else place for place in self._takes]
            # The casts that autocast asks for are in the graph.
            with torch.autocast(held[0].device.type, enabled=False):
                for one, new in zip(held, self._make(*given), strict=True):
                    one.copy_(new)
            branch.made_of = weights, kept(others)
        return held


def kept(tensors: Sequence[torch.Tensor]) -> tuple[Remembered, ...]:
    """The tensors as they are now. Those of inference mode count no changes: theirs are seen by value."""
    return remember([tensor.clone() if tensor.is_inference() else tensor for tensor in tensors])
