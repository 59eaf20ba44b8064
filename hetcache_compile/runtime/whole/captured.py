"""A model that was captured whole, for calls of one kind, as a graph that sessions run."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ...capture.capture import Program, capture
from ...capture.offloading import lies_elsewhere
from ...capture.structure import TENSORS
from ...compilation.options import BackendOptions
from ...sessions.branches import Remembered, holds, remember
from ..dispatch import CompiledGraph
from ..prepare import Prepared, Preparer


class PlainlyError(Exception):
    """A call runs plainly, and it was said why."""


class WholeGraph(CompiledGraph):
    """A model that was captured whole. Its inputs are the weights, and after them the leaves of a call's arguments."""

    def __init__(self, program: Program, options: BackendOptions, offloaded: frozenset[int]) -> None:
        super().__init__(program.module, options)
        self.preparer = _Captured(program, options, offloaded)
        self._varying = lambda inputs: None

    def run_plain(self, inputs: Sequence[Any]) -> NoReturn:
        """Leave it to who calls.

        Raises:
            PlainlyError: always.
        """
        raise PlainlyError


class _Captured(Preparer):
    """A preparer of what is captured already."""

    def __init__(self, program: Program, options: BackendOptions, offloaded: frozenset[int]) -> None:
        super().__init__(program.module, options, offloaded)
        self.program = program

    def capture(self, inputs: Sequence[Any]) -> Prepared:
        """The program."""
        return Prepared(self.program)


class Capture:
    """A model captured for arguments of one kind, its `key`, and where it asked for them, their values."""

    def __init__(
        self,
        model: nn.Module,
        options: BackendOptions,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        key: Hashable,
        device: torch.device | None,
    ) -> None:
        self.key = key
        program = capture(model, args, kwargs, device)
        found = {name: place for name, target in program.targets.items() if (place := place_of(model, target))}
        weights, self.places = list(found), list(found.values())
        state = {name: value for name, value in program.state.items() if name not in weights}
        inputs = (*weights, *program.inputs)
        leaves = pytree.tree_leaves((tuple(args), dict(kwargs)))
        numbers = [program.inputs.index(name) for name in program.assumed]
        self.assumed: dict[int, Remembered] = {number: remember([leaves[number].clone()])[0] for number in numbers}
        self.names = list(program.assumed)
        self.out_spec = program.out_spec
        in_spec = pytree.tree_structure((tuple(range(len(inputs))), {}))
        held = enumerate(holder[name] for holder, name in self.places)
        offloaded = frozenset(n for n, weight in held if device is not None and lies_elsewhere(weight, device))
        program = replace(program, state=state, inputs=inputs, in_spec=in_spec, assumed={})
        self.graph = WholeGraph(program, options, offloaded)
        self._last: dict[int, Remembered] = {}

    def fits(self, leaves: Sequence[Any]) -> bool:
        """Whether the assumed inputs have the assumed values. Those of the call before do, unless written since."""
        for number, value in self.assumed.items():
            leaf, known = leaves[number], self._last.get(number)
            same = known is not None and known[0] is leaf and not leaf.is_inference() and holds(known, leaf)
            if not same and not holds(value, leaf):
                return False
            self._last[number] = remember([leaf])[0]
        return True

    def __call__(self, leaves: Sequence[Any]) -> Any:
        """Run a call in a session.

        Raises:
            PlainlyError: it is refused.
        """
        outputs = self.graph(*(held[name] for held, name in self.places), *leaves)
        return pytree.tree_unflatten(outputs, self.out_spec)


def place_of(model: nn.Module, target: str) -> tuple[dict[str, torch.Tensor], str] | None:
    """The dict in which a module holds a weight or buffer, and its name there; None if it is none."""
    path, _, name = target.rpartition(".")
    try:
        holder = vars(model.get_submodule(path))
    except AttributeError:
        return None
    return next(((holder[kind], name) for kind in TENSORS if name in holder[kind]), None)
