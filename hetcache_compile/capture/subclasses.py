"""Weights that are tensor subclasses, such as torchao's quantised ones, as the plain tensors they are made of.

`torch.export` takes apart subclasses that a module holds, but a graph of Dynamo is given its weights as inputs. So such
a graph gets an input for each plain tensor, and puts the subclass together inside, where capture looks through it.
"""

from __future__ import annotations

import copy
import operator
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils.weak import WeakIdKeyDictionary


def plain_parts(tensor: Any) -> Iterator[torch.Tensor]:
    """The plain tensors that a subclass is made of, those of subclasses inside it too; a plain tensor itself."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from plain_parts(getattr(tensor, name))


@dataclass(eq=False)
class PutTogether:
    """Makes a subclass of its plain tensors; the other way round of `plain_parts`. A node of a graph calls it."""

    cls: type
    names: tuple[str, ...]
    parts: tuple[PutTogether | None, ...]
    context: Any
    size: torch.Size
    stride: tuple[int, ...]
    __name__: str = field(default="put_together", repr=False)

    @classmethod
    def of(cls, tensor: Any) -> PutTogether:
        """What puts tensors like this one together."""
        names, context = tensor.__tensor_flatten__()
        inner = [getattr(tensor, name) for name in names]
        parts = tuple(cls.of(part) if is_traceable_wrapper_subclass(part) else None for part in inner)
        return cls(type(tensor), tuple(names), parts, context, tensor.shape, tensor.stride())

    def alike(self, other: PutTogether | None) -> bool:
        """Whether both make the same of the same tensors."""
        if other is None or self._description != other._description:
            return False
        pairs = zip(self.parts, other.parts, strict=True)
        return all(a is b if a is None else a.alike(b) for a, b in pairs)

    @property
    def _description(self) -> tuple[Any, ...]:
        return self.cls, self.names, self.context, self.size, self.stride

    def __call__(self, *tensors: torch.Tensor) -> torch.Tensor:
        """The subclass."""
        return self._take(iter(tensors))

    def _take(self, tensors: Iterator[torch.Tensor]) -> torch.Tensor:
        inner = {
            name: next(tensors) if part is None else part._take(tensors)
            for name, part in zip(self.names, self.parts, strict=True)
        }
        made: torch.Tensor = self.cls.__tensor_unflatten__(inner, self.context, self.size, self.stride)  # type: ignore[attr-defined]
        return made


class Unwrapping:
    """A graph of Dynamo without inputs that are subclasses, and what makes its inputs of those of a call.

    Attributes:
        graph: a copy in which the plain tensors come after all other inputs; the graph itself where all are plain.
        parts: where these come among its inputs.
    """

    def __init__(self, graph: GraphModule) -> None:
        values = [node.meta.get("example_value") for node in graph.graph.find_nodes(op="placeholder")]
        wrapped = [number for number, value in enumerate(values) if is_traceable_wrapper_subclass(value)]
        plain = [number for number, value in enumerate(values) if not is_traceable_wrapper_subclass(value)]
        self.graph = _with_plain_inputs(graph) if wrapped else graph
        num_inputs = len(self.graph.graph.find_nodes(op="placeholder"))
        self.parts = range(len(plain), num_inputs)
        self._weights = _taking(wrapped)
        self._others = _taking(plain)
        self._known: Any = WeakIdKeyDictionary()

    def __call__(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The inputs of the graph: weights are taken apart once for as long as they are the same objects."""
        weights = self._weights(inputs)
        if not weights:
            return inputs
        known, parts = self._known.get(weights[0], ((), ()))
        if not known or not all(map(operator.is_, weights, (weight() for weight in known))):
            parts = tuple(part for weight in weights for part in plain_parts(weight))
            self._known[weights[0]] = tuple(map(weakref.ref, weights)), parts
        return (*self._others(inputs), *parts)

    def watched(self, given: Sequence[Any], inputs: Sequence[Any]) -> Sequence[Any]:
        """What tells that weights changed: the graph's inputs, and subclasses behind them.

        Who writes into a subclass raises its own count of writes, and not that of the tensors inside.
        """
        return (*inputs, *self._weights(given)) if self.parts else inputs


def _taking(numbers: Sequence[int]) -> Callable[[Sequence[Any]], tuple[Any, ...]]:
    """What picks these of a sequence. Of one number alone an itemgetter makes no tuple."""
    if len(numbers) > 1:
        return operator.itemgetter(*numbers)
    return lambda values: tuple(values[number] for number in numbers)


def _with_plain_inputs(source: GraphModule) -> GraphModule:
    module = GraphModule(source, copy.deepcopy(source.graph))
    graph = module.graph
    kinds: list[PutTogether] = []
    places = list(graph.find_nodes(op="placeholder"))
    last = places[-1]
    for node in places:
        value = node.meta.get("example_value")
        if not is_traceable_wrapper_subclass(value):
            continue
        whole = PutTogether.of(value)
        # Blocks that are alike must call one object, or they would not be found to be alike.
        kind = next((known for known in kinds if known.alike(whole)), whole)
        kinds += [kind] if kind is whole else []
        parts = []
        for number, part in enumerate(plain_parts(value)):
            with graph.inserting_after(last):
                last = graph.placeholder(f"{node.name}{number}")
            last.meta = {"example_value": part}
            parts.append(last)
        if node.users:
            with graph.inserting_before(min(node.users)):
                made = graph.call_function(kind, tuple(parts))
            made.meta = {"example_value": value}
            node.replace_all_uses_with(made)
        graph.erase_node(node)
    graph.lint()
    module.recompile()
    return module
