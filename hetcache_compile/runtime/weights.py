"""Whether a model's weights changed since its cache was filled."""

from __future__ import annotations

import operator
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary

from ..ranks.facts import checksum

FEW = 256
"""A model of at most so many weights is looked at whole in every call."""
WINDOW = 48
"""Weights of a larger one that are looked at in a call that computes nothing."""
State = tuple[tuple[int, ...], tuple[int, ...]]
"""Addresses of some weights, and how often each was written in place."""

_address = torch.Tensor.data_ptr
_version = operator.attrgetter("_version")


@dataclass
class Seen:
    """The weights of one model as they were last seen, by window, how often they changed, and where to look next.

    What they hold is known from the first time on that they were not where they had been.
    """

    states: list[State]
    generation: int = 0
    next: int = 0
    content: tuple[Any, ...] | None = None


class Weights:
    """The weights among a graph's inputs.

    A weight changes when it is another tensor, in other memory, or written in place, which torch counts for all but
    tensors of inference mode and writes through `.data`. A call that computes looks at every weight. One that only
    reads the cache looks at some of a large model's, spread over all of it, and at others the next time: loading,
    moving, casting and fusing change weights everywhere.

    Who offloads a model between its calls brings the same weights back to other memory. So what looks changed is
    compared by what it holds. That reads every weight once, which is little beside the copy that brought them. It is
    not done before weights have moved once, which counts as a change, unless they are known to move.

    Args:
        inputs: of a call.
        parts: positions of plain tensors that a weight is made of.
        held: positions of other tensors that modules hold, such as the scales of a quantised weight.
        moving: whether they are known to move, so that what they hold is looked at the first time already.
    """

    def __init__(
        self, inputs: Sequence[Any], parts: Collection[int] = (), held: Collection[int] = (), *, moving: bool = False
    ) -> None:
        self._moving = moving
        numbers = [n for n, value in enumerate(inputs) if n in parts or isinstance(value, torch.nn.Parameter)]
        self._first = numbers[0] if numbers else None
        numbers += [n for n in sorted({*held} - {*numbers}) if isinstance(inputs[n], torch.Tensor)]
        self._numbers = numbers
        self._counted = not any(inputs[number].is_inference() for number in numbers)
        count = 1 if 0 < len(numbers) <= FEW else -(-len(numbers) // WINDOW)
        # Of one number alone an itemgetter makes no tuple.
        windows = [numbers[start::count] for start in range(count)]
        self._windows = [operator.itemgetter(*(window * 2 if len(window) == 1 else window)) for window in windows]
        self._models: Any = WeakIdKeyDictionary()

    def anchor(self, inputs: Sequence[Any]) -> Any:
        """What the model is known by: its first weight. Dynamo may run one graph for two modules of one structure."""
        return None if self._first is None else inputs[self._first]

    def generation(self, model: Any, inputs: Sequence[Any], thorough: bool) -> int:
        """A number that is another one after the weights changed.

        Args:
            model: its anchor.
            inputs: of the call.
            thorough: whether to look at every weight.
        """
        with torch._C.DisableTorchFunctionSubclass():  # a weight may be of a class with its own idea of an operator
            return self._generation(model, inputs, thorough)

    def _generation(self, model: Any, inputs: Sequence[Any], thorough: bool) -> int:
        seen = self._models.get(model)
        if seen is None:
            content = checksum(self.of(inputs)) if self._moving else None
            self._models[model] = Seen(self._all(inputs), content=content)
            return 0
        if not self._windows:
            return 0
        if thorough or self._state(seen.next, inputs) != seen.states[seen.next]:
            states = self._all(inputs)
            if states != seen.states:
                seen.states, before = states, seen.content
                seen.content = checksum(self.of(inputs))
                seen.generation += seen.content != before
        seen.next = (seen.next + 1) % len(self._windows)
        return int(seen.generation)

    def of(self, inputs: Sequence[Any]) -> list[torch.Tensor]:
        """The weights, those that are made of plain tensors by these."""
        return [inputs[number] for number in self._numbers if not is_traceable_wrapper_subclass(inputs[number])]

    def _all(self, inputs: Sequence[Any]) -> list[State]:
        return [self._state(window, inputs) for window in range(len(self._windows))]

    def _state(self, window: int, inputs: Sequence[Any]) -> State:
        weights = self._windows[window](inputs)
        return tuple(map(_address, weights)), tuple(map(_version, weights)) if self._counted else ()
