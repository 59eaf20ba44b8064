"""Calls whose graph depends on their data: capture them for the values that this data has.

Some models drop padded text (`nonzero`), sort rows by length, or branch on whether an image was given. A static
graph cannot hold that, but over an edit such data stays the same. So the call is captured once more:

* masks and ids (integer and bool inputs of two dims or more) become constants, and what is computed from them
  alone is computed at capture;
* where Python asks for the value of something computed from other inputs alone, it is told.

The inputs that this used are *assumed*: the captured graph is right for their values only, and says so when
they change.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

ASKING = {
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__index__,
    torch.Tensor.item,
    torch.Tensor.tolist,
}
IN_PLACE = re.compile(r"__setitem__|__i\w+__|.*[^_]_")
LARGEST = 2**24
"""Numbers in a result that is computed at capture. A larger one, such as a mask of all tokens against all, is left to
the graph."""
MAKING = {torch.zeros, torch.ones, torch.full, torch.arange, torch.tensor}
"""Operators whose results are known without any input."""


@dataclass(frozen=True)
class Value:
    """What a tensor of the trace really holds, and the inputs it was computed from. `traced is real`: a constant."""

    traced: torch.Tensor
    real: torch.Tensor
    inputs: frozenset[int]


class Known(TorchFunctionMode):
    """Follows the real values of inputs through operators, until they meet weights."""

    def __init__(self, values: Sequence[Value]) -> None:
        super().__init__()
        self.values = {id(value.traced): value for value in values}
        self.assumed: set[int] = set()

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run `func`, for real too where every tensor's value is known."""
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.__iter__:
            return iter(self.__torch_function__(torch.Tensor.unbind, types, (args[0],)))
        given = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, torch.SymInt | torch.SymFloat | torch.SymBool) for leaf in given):
            return func(*args, **kwargs)
        found = [self.values.get(id(leaf)) for leaf in given if _is_tensor(leaf)]
        known = [value for value in found if value is not None]
        if not found and func in MAKING:
            with _disable_current_modes():
                real = func(*args, **kwargs)
            traced = func(*args, **kwargs)
            self._remember(traced, real, frozenset())
            return traced
        if known and (len(known) < len(found) or any(value.traced is not value.real for value in known)):
            for changed in _changed_by(func, args, kwargs):
                self._forget(changed)
                known = []
        if not known or len(known) < len(found):
            return func(*self._indexed(func, args), **kwargs)
        inputs = frozenset[int]().union(*(value.inputs for value in known))
        constant = all(value.traced is value.real for value in known)
        real_args, real_kwargs = pytree.tree_map_only(
            torch.Tensor, lambda tensor: self.values[id(tensor)].real, (tuple(args), kwargs)
        )
        with _disable_current_modes():
            large = _is_large(func, real_args, real_kwargs)
            real = None if large else func(*real_args, **real_kwargs)
        if large:
            return func(*self._indexed(func, args), **kwargs)
        if constant or func in ASKING:
            self.assumed |= inputs
            self._remember(real, real, inputs)
            return real
        traced = func(*self._indexed(func, args), **kwargs)
        self._remember(traced, real, inputs)
        return traced

    def _forget(self, tensor: torch.Tensor) -> None:
        """What is in the memory of a tensor is not known any more."""
        known = self.values.get(id(tensor))
        if known is None:
            return
        memory = known.real.untyped_storage().data_ptr()
        changed = [key for key, value in self.values.items() if value.real.untyped_storage().data_ptr() == memory]
        for key in changed:
            del self.values[key]

    def _indexed(self, func: Any, args: Sequence[Any]) -> Sequence[Any]:
        """The arguments, with no mask and no number of known value as an index."""
        return (args[0], self._positions(args[1])) if func is torch.Tensor.__getitem__ else args

    def _remember(self, traced: Any, real: Any, inputs: frozenset[int]) -> None:
        for a, b in zip(pytree.tree_leaves(traced), pytree.tree_leaves(real), strict=True):
            if _is_tensor(a):
                self.values[id(a)] = Value(a, b, inputs)

    def _positions(self, index: Any) -> Any:
        """An index in which a mask of known value is the positions where it holds, and a slice ends at a number."""
        if isinstance(index, slice):
            return slice(*map(self._number, (index.start, index.stop, index.step)))
        if isinstance(index, tuple):
            parts = map(self._positions, index)
            return tuple(p for part in parts for p in (part if isinstance(part, tuple) else (part,)))
        value = self.values.get(id(index))
        if value is None or index.dtype != torch.bool:
            return index
        self.assumed |= value.inputs
        with _disable_current_modes():
            positions = value.real.nonzero(as_tuple=True)
        self._remember(positions, positions, value.inputs)
        return positions

    def _number(self, value: Any) -> Any:
        """The number that a tensor of known value holds. Python does not ask a tensor that ends a slice."""
        known = self.values.get(id(value))
        if known is None:
            return value
        self.assumed |= known.inputs
        with _disable_current_modes():
            return known.real.item()


def _is_large(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether a call has a result of more than `LARGEST` numbers."""
    try:
        made = func(*pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), args), **kwargs)
    except (RuntimeError, NotImplementedError, TypeError):  # only data tells its size
        return False
    return any(_is_tensor(leaf) and leaf.numel() > LARGEST for leaf in pytree.tree_leaves(made))


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _changed_by(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
    """The tensors that an operator writes into."""
    name = getattr(func, "__name__", "")
    in_place = re.fullmatch(r"__setitem__|__i\w+__|.*[^_]_", name) and name not in (
        "__index__",
        "__invert__",
        "__int__",
    )
    written = [args[0] if in_place and args else None, kwargs.get("out")]
    return [tensor for tensor in pytree.tree_leaves(written) if _is_tensor(tensor)]


def is_constant(value: Any) -> bool:
    """Masks, ids and segments; not timesteps, which have one dim and change from step to step."""
    return _is_tensor(value) and value.ndim >= 2 and not (value.is_floating_point() or value.is_complex())


def know(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> set[int]:
    """Let calls of `model` know the data of this call. Returns the positions of the leaves that a call assumed."""
    given = pytree.tree_leaves((tuple(args), dict(kwargs)))
    constants = {number: leaf.clone() for number, leaf in enumerate(given) if is_constant(leaf)}
    assumed: set[int] = set()
    forward = model.forward

    @functools.wraps(forward)
    def knowing(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = pytree.tree_flatten((args, kwargs))
        leaves = [constants.get(number, leaf) for number, leaf in enumerate(leaves)]
        values = [
            Value(leaf, constants.get(number, given[number]), frozenset({number}))
            for number, leaf in enumerate(leaves)
            if _is_tensor(leaf)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        with Known(values) as mode:
            result = forward(*args, **kwargs)
        assumed.update(mode.assumed | set(constants))
        return result

    model.forward = knowing
    return assumed
