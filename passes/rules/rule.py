"""What a rule is asked, and the two computations that most rules share: dims that move, operands that broadcast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Protocol

from torch.fx import Node

from ..ir.axis import FREE, AxisState, Edit, Flow, Gather, Never, OnGrid, Reborn, Tokens
from ..ir.refusal import shape_of


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


Answer = Flow | str | Reborn | Never
"""The flow of a node, or why it cannot be computed on the active tokens alone (a string), or not at all."""


class Rule(Protocol):
    """What a table of rules holds for an operator: a function that says what becomes of the token axis in it."""

    __name__: str

    def __call__(self, q: Query, /) -> Answer:
        """What it says of one node."""


def wrap(dim: int, rank: int) -> int:
    """A dim that counts from the end, counted from the start."""
    return dim + rank if dim < 0 else dim


def position(value: int | None, size: int, default: int) -> int:
    """A place in a dim, as Python's slices count."""
    if value is None:
        return default
    return max(0, min(size, value + size if value < 0 else value))


def move_dims(state: AxisState, new_dim: Callable[[int], int | None]) -> AxisState:
    """The state after dims have moved; a token axis must not go (`None`), a guess whose dim goes is dropped."""
    if isinstance(state, Tokens):
        dim = new_dim(state.dim)
        assert dim is not None
        return state.at(dim)
    if isinstance(state, OnGrid):
        moved = (tuple((p, new_dim(p.dim)) for p in guess) for guess in state.guesses)
        kept = [guess for guess in moved if all(dim is not None for _, dim in guess)]
        return grid_of(tuple(replace(p, dim=dim) for p, dim in guess) for guess in kept)  # type: ignore[arg-type]
    return FREE


def works_along(state: AxisState, dims: set[int], reason: str, keeps_rank: bool = True) -> Flow | str:
    """The flow of an operator that mixes or cuts what lies along `dims`, and keeps or removes them all."""
    if isinstance(state, Tokens) and state.dim in dims:
        return reason
    return Flow(
        move_dims(state, lambda d: None if d in dims else d if keeps_rank else d - sum(gone < d for gone in dims))
    )


def grid_of(guesses: Any) -> AxisState:
    """`OnGrid`, or `FREE` where no guess is left."""
    known = frozenset(guesses)
    return OnGrid(known) if known else FREE


def align(q: Query, operands: list[Node], rank: int, own_dims: tuple[int, ...] = ()) -> Flow | str:
    """Operands that broadcast against each other, one row of the token axis with one row.

    1. All token operands must have the same token axis, at the same dim counted from the right.
    2. A whole operand of full size there is positional data: gather it. One of size 1, or without that dim, stays.
    3. `own_dims` are dims (from the left, of `rank`) the operator works along: no token axis there.
    """
    states = {operand: q.state(operand) for operand in operands}
    axes = {s.at(s.dim - len(shape_of(o)) + rank) for o, s in states.items() if isinstance(s, Tokens)}
    if not axes:
        return Flow(_common_grid(states, rank, own_dims))
    if len(axes) > 1:
        return "its operands have different token axes"
    tokens = axes.pop()
    if tokens.dim in own_dims:
        return "it works along the token axis"
    edits: list[Edit] = []
    for operand, state in states.items():
        shape = shape_of(operand)
        dim = tokens.dim - rank + len(shape)
        if isinstance(state, Tokens) or dim < 0 or shape[dim] == 1:
            continue
        if shape[dim] != tokens.size(q.num_tokens):
            return f"an operand of size {shape[dim]} meets the token axis of size {tokens.size(q.num_tokens)}"
        edits.append(Gather(operand, tokens.at(dim)))
    return Flow(tokens, tuple(edits))


def _common_grid(states: Mapping[Node, AxisState], rank: int, own_dims: tuple[int, ...]) -> AxisState:
    """The guesses that all operands which are laid out on the grid agree on."""
    guesses = []
    for operand, state in states.items():
        shift = rank - len(shape_of(operand))
        if isinstance(state, OnGrid):
            guesses.append(frozenset(tuple(replace(p, dim=p.dim + shift) for p in guess) for guess in state.guesses))
    common = frozenset.intersection(*guesses) if guesses else frozenset()
    return grid_of(guess for guess in common if not any(place.dim in own_dims for place in guess))
