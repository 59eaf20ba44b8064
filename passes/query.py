"""What a rule is asked, and the one computation that most rules share: operands that broadcast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from torch.fx import Node

from .axis import FREE, AxisState, Edit, Flow, Gather, Grid, Tokens
from .refusal import shape_of


@dataclass(frozen=True)
class Query:
    """A node, the states of the nodes before it, and the token grid (T', H', W')."""

    node: Node
    states: Mapping[Node, AxisState]
    grid: tuple[int, int, int]

    @property
    def num_tokens(self) -> int:
        """N = T'·H'·W'."""
        return prod(self.grid)

    @property
    def grid_sizes(self) -> tuple[int, ...]:
        """The grid's sizes without those that are 1: a dim of size 1 leaves no trace in a reshape."""
        return tuple(size for size in self.grid if size != 1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the node's (first) result in the full form."""
        return shape_of(self.node)

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument of the node, passed by position or by name."""
        if position < len(self.node.args):
            return self.node.args[position]
        return self.node.kwargs.get(name, default)

    def state(self, value: Any) -> AxisState:
        """The state of an argument; anything that is no node is token-free."""
        return self.states[value] if isinstance(value, Node) else FREE

    def first(self) -> tuple[Node, AxisState]:
        """The first argument, which must be a node, and its state."""
        operand = self.node.args[0]
        assert isinstance(operand, Node)
        return operand, self.states[operand]


Rule = Callable[[Query], Flow | str]


def wrap(dim: int, rank: int) -> int:
    """A dim that counts from the end, counted from the start."""
    return dim + rank if dim < 0 else dim


def align(q: Query, operands: list[Node], rank: int, own_dims: tuple[int, ...] = ()) -> Flow | str:
    """Operands that broadcast against each other, one row of the token axis with one row.

    1. All token operands must have the token axis at the same dim, counted from the right.
    2. A whole operand of size N there is positional data: gather it. One of size 1, or without that dim, stays.
    3. `own_dims` are dims (from the left, of `rank`) the operator works along: no token axis there.
    """
    states = {operand: q.state(operand) for operand in operands}
    places = {s.dim - len(shape_of(o)) for o, s in states.items() if isinstance(s, Tokens)}
    if not places:
        grids = {s for o, s in states.items() if isinstance(s, Grid) and len(shape_of(o)) == rank}
        return Flow(grids.pop() if len(grids) == 1 else FREE)
    if len(places) > 1:
        return "its operands have their token axes at different dims"
    place = places.pop()
    if place + rank in own_dims:
        return "it works along the token axis"
    edits: list[Edit] = []
    for operand, state in states.items():
        shape = shape_of(operand)
        if isinstance(state, Tokens) or len(shape) < -place or shape[place] == 1:
            continue
        if shape[place] != q.num_tokens:
            return f"an operand of size {shape[place]} meets the token axis of size {q.num_tokens}"
        edits.append(Gather(operand, place + len(shape)))
    return Flow(Tokens(place + rank), tuple(edits))
