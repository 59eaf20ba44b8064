"""The words of the token-axis analysis.

Every node of a graph has one *axis state*. `Tokens(dim)` is a promise: in a partial form the node holds, along
`dim`, the M active rows of what it holds in the full form. All rules keep that promise, so a partial form is
exact by induction; nothing depends on sizes being different from one another.

An *edit* is one thing the partial form has to do differently at a node. The analysis attaches edits to nodes,
and each form is one reading of the same edits (see `forms`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import Node


@dataclass(frozen=True)
class Free:
    """No token axis that matters: the node is computed whole in every form that needs it."""

    def __str__(self) -> str:
        return "token-free"


@dataclass(frozen=True)
class Grid:
    """Computed whole, and `dims` hold the token grid (those of T', H', W' that are larger than 1, in order).

    A hint, never a promise: it tells where a reshape gives birth to the token axis.
    """

    dims: tuple[int, ...]

    def __str__(self) -> str:
        return f"token grid at dims {self.dims}"


@dataclass(frozen=True)
class Tokens:
    """`dim` (not negative) is the token axis: N rows in the full form, M in the partial form."""

    dim: int

    def __str__(self) -> str:
        return f"token axis at dim {self.dim}"


AxisState = Free | Grid | Tokens
FREE = Free()


@dataclass(frozen=True)
class Gather:
    """Positional data: `operand` is whole and meets the token axis at its dim `dim`. Take its active rows."""

    operand: Node
    dim: int


@dataclass(frozen=True)
class Resize:
    """The shape in argument `arg` names the token count at `position`. N becomes M."""

    arg: int
    position: int


@dataclass(frozen=True)
class Enter:
    """The token axis is born in this node's result, at `dim`. Take its active rows."""

    dim: int


@dataclass(frozen=True)
class Leave:
    """The token axis (dim `dim` of `operand`) ends here. Write the active rows into the cached whole tensor."""

    operand: Node
    dim: int


@dataclass(frozen=True)
class Attend:
    """Self-attention over the token axis (dim `dim` of `key` and `value`). Append the cached context rows."""

    key: Node
    value: Node
    dim: int


Edit = Gather | Resize | Enter | Leave | Attend


@dataclass(frozen=True)
class Flow:
    """What a rule says of a node: the state of its result and the edits it needs.

    A node with several results (split, unbind) has one state that holds for each of them.
    """

    state: AxisState
    edits: tuple[Edit, ...] = ()
