"""Put other nodes in the place of one: with their values on fake tensors, and only where their layout will do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from ..ir.graphs import AddNode, fake_mode
from ..rules.rule import position, wrap

aten = torch.ops.aten

TRACES = ("stack_trace", "nn_module_stack")

VIEWS: tuple[Any, ...] = (
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.transpose.int, aten.permute.default,
    aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default,
    aten.slice.Tensor, aten.select.int, aten.alias.default, aten.detach.default, aten.t.default,
)  # fmt: skip
"""Their result shows the memory of their operand, so its strides follow from those of the operand."""

MAKE_THEIR_OWN: tuple[Any, ...] = (
    aten.linear.default, aten.matmul.default, aten.bmm.default, aten.mm.default, aten.addmm.default,
)  # fmt: skip
"""The strides of their result do not follow from those of an operand."""

WRITES: tuple[Any, ...] = (aten.copy.default, aten.slice_scatter.default)
"""The strides of their result are those of the first operand, which the second is written into."""


class Replacement:
    """Writes nodes in front of others, and puts them in their place.

    An equal call is written once, if it stands before all that need it. Each node gets a fake value, the traces of the
    node that it stands in front of, and the name of the pass.
    """

    def __init__(self, module: GraphModule, name: str) -> None:
        self.module, self.name = module, name
        self.known: dict[tuple[Any, str, str], Node] = {}

    def before(self, place: Node) -> AddNode:
        """`call(op, *args, **kwargs)` adds a node in front of `place`, if none does the same there already."""

        def call(op: Any, *args: Any, **kwargs: Any) -> Node:
            key = op, repr(args), repr(kwargs)
            known = self.known.get(key)
            if known is None or known._erased or not known < place:
                with self.module.graph.inserting_before(place):
                    node = self.module.graph.call_function(op, args, kwargs)
                node.meta = {trace: place.meta[trace] for trace in TRACES if trace in place.meta}
                node.meta["val"] = self._value(node, {})
                node.meta["hetcache"] = self.name
                self.known[key] = node
            return self.known[key]

        return call

    def put(self, old: Node, new: Node) -> bool:
        """Put `new` in the place of `old`, copied where a view of the result needs that; False where none will do."""
        return self._put(old, new) or self._put(old, self.before(old)(aten.clone.default, new, **CONTIGUOUS))

    def _put(self, old: Node, new: Node) -> bool:
        changed: dict[Node, Any] = {}
        if not self._fits(old, new.meta["val"], changed):
            return False
        for node, value in changed.items():
            node.meta["val"] = value
        old.replace_all_uses_with(new)
        self.module.graph.erase_node(old)
        return True

    def _fits(self, node: Node, value: Any, changed: dict[Node, Any]) -> bool:
        """Whether the users of a node can take a value of other strides; `changed` gets those of views of it."""
        if value.stride() == node.meta["val"].stride():
            return True
        for user in node.users:
            if user.op == "output" or user.target in MAKE_THEIR_OWN:
                continue
            if user.target is aten.clone.default and user.kwargs == CONTIGUOUS:
                continue
            if user.target in WRITES and user.args[0] is not node:
                continue
            if user.target not in VIEWS:
                return False
            try:
                changed[user] = self._value(user, {node: value})
            except (RuntimeError, ValueError):  # no view of these strides
                return False
            if not self._fits(user, changed[user], changed):
                return False
        return True

    def _value(self, node: Node, instead: dict[Node, Any]) -> Any:
        """What a call gives for fake operands. Those of a graph may be of several modes: these are all of one."""
        with fake_mode(self.module) as mode, torch.no_grad():

            def fresh(operand: Node) -> Any:
                return pytree.tree_map_only(torch.Tensor, _alike, instead.get(operand, operand.meta["val"]))

            assert mode is not None
            args, kwargs = map_arg((node.args, node.kwargs), fresh)
            return node.target(*args, **kwargs)  # type: ignore[operator]


CONTIGUOUS = {"memory_format": torch.contiguous_format}


def rows_of(arguments: Sequence[Any], shape: Sequence[int]) -> tuple[int, int, int | None]:
    """The dim, start and end of a slice `(dim, start, end, step)` of a shape; no end where rows are left out."""
    defaults: tuple[Any, ...] = (0, None, None, 1)
    dim, start, end, step = [*arguments, *defaults[len(arguments) :]]
    size = shape[dim]
    first, last = position(start, size, 0), position(end, size, size)
    return wrap(dim, len(shape)), first, last if step == 1 else None


def _alike(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
