"""The words of the token-axis analysis.

Every node of a graph has one *axis state*. `Tokens` is a promise: in a partial form the node holds, along one dim,
the M active rows of what it holds in the full form, and every row that is no token. All rules keep that promise, so
a partial form is exact by induction; nothing depends on sizes being different from one another.

The rows of a dim that holds tokens, in the words of `Tokens`:

    plain                       N                               Tokens(dim)
    joint with text             L + N                           Tokens(dim, whole=(L, 0))
    two streams and text        N + L + N                       Tokens(dim, whole=(0, L, 0))
    folded with batch, heads    B x N, N x H                    Tokens(dim, outer=B), Tokens(dim, inner=H)

An *edit* is one thing the partial form has to do differently at a node. The analysis attaches edits to nodes,
and each form is one reading of the same edits (see `writing.write`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import Node


@dataclass(frozen=True)
class Place:
    """Where a factor stands: dim `dim` runs over `outer` x factor x `inner`, in this order."""

    dim: int
    outer: int = 1
    inner: int = 1


@dataclass(frozen=True)
class Free:
    """No token axis that matters: the node is computed whole in every form that needs it."""

    def __str__(self) -> str:
        return "token-free"


@dataclass(frozen=True)
class OnGrid:
    """Computed whole, and laid out on the token grid.

    Each guess has a `Place` for every one of T', H', W' that is larger than 1, in order. Guesses are hints, never
    promises: they tell where a reshape gives birth to the token axis, and a reshape or product that contradicts a
    guess drops it.
    """

    guesses: frozenset[tuple[Place, ...]]

    def __str__(self) -> str:
        dims = sorted({tuple(place.dim for place in guess) for guess in self.guesses})
        return "token grid at dims " + " or ".join(map(str, dims))


@dataclass(frozen=True)
class Tokens:
    """Dim `dim` (not negative) is the token axis: N tokens in the full form, M in the partial form.

    The dim runs over `outer` x rows x `inner`. The rows are runs of tokens; `whole` counts the other rows before,
    between and after the runs, which every form computes.
    """

    dim: int
    whole: tuple[int, ...] = (0, 0)
    outer: int = 1
    inner: int = 1

    @property
    def plain(self) -> bool:
        """Whether the dim holds one run of tokens and nothing else."""
        return self.folds == 1 and self.whole == (0, 0)

    @property
    def folds(self) -> int:
        """How often each row appears along the dim."""
        return self.outer * self.inner

    def rows(self, num_tokens: int) -> int:
        """Rows before folding, with `num_tokens` tokens in a run."""
        return sum(self.whole) + (len(self.whole) - 1) * num_tokens

    def size(self, num_tokens: int) -> int:
        """The size of the dim."""
        return self.folds * self.rows(num_tokens)

    def at(self, dim: int) -> Tokens:
        """The same rows at another dim."""
        return replace(self, dim=dim)

    def __str__(self) -> str:
        text = f"token axis at dim {self.dim}"
        if self.whole != (0, 0):
            text += ", rows " + " + N + ".join(map(str, self.whole))
        if self.folds > 1:
            text += f", folded {self.outer} x rows x {self.inner}"
        return text


@dataclass(frozen=True)
class Parts:
    """A node with several results (split, unbind), one state for each."""

    states: tuple[AxisState, ...]

    def __str__(self) -> str:
        return "; ".join(map(str, self.states))


@dataclass(frozen=True)
class Piece:
    """The rows `start` to `end` of a token axis that is laid out as `tokens`, cut out at the slices `cuts`.

    A partial form does not cut: the node holds all the rows it would hold as `tokens`, and those outside the piece
    mean nothing. So it may go only where rows are independent, until all pieces are put together again (`JoinPieces`).
    """

    tokens: Tokens
    start: int
    end: int
    cuts: frozenset[Node]

    def __str__(self) -> str:
        return f"rows {self.start} to {self.end} of the {self.tokens}"


AxisState = Free | OnGrid | Tokens | Parts | Piece
FREE = Free()


@dataclass(frozen=True)
class Gather:
    """Positional data: `operand` is whole and meets the token axis. Take its rows as `tokens` lays them out."""

    operand: Node
    tokens: Tokens


@dataclass(frozen=True)
class Resize:
    """Argument `arg` (or its entry `position`) counts rows as `tokens` lays them out. N becomes M."""

    arg: int
    position: int | None
    tokens: Tokens


@dataclass(frozen=True)
class Enter:
    """The token axis is born in this node's result. Take its active rows."""

    tokens: Tokens


@dataclass(frozen=True)
class Leave:
    """The token axis of `operand` ends here. Write the active rows into the cached whole tensor.

    Every operator that looks across tokens may have its operands whole like this: the rows of inactive tokens are
    those of the last step that computed them, as they are for attention.
    """

    operand: Node
    tokens: Tokens


@dataclass(frozen=True)
class Attend:
    """Keys and values lie along the token axis. Append the cached context rows; a mask's columns follow."""

    key: Node
    value: Node
    tokens: Tokens
    mask: Node | None = None
    """A mask with a column for each key, if there is one."""


@dataclass(frozen=True)
class Accumulate:
    """A product sums over the token axis (linear attention). Add the cached sum over the context."""

    left: Node
    right: Node
    left_tokens: Tokens
    right_tokens: Tokens


@dataclass(frozen=True)
class Keep:
    """`operand` is whole but depends on tokens, and is needed when none is computed. Cache it as it is."""

    operand: Node


@dataclass(frozen=True)
class Uncut:
    """A piece is cut out of `operand`: take `operand` as it is."""

    operand: Node


@dataclass(frozen=True)
class JoinPieces:
    """Pieces are put together: take each row from its piece. `ends` are the rows at which the pieces end."""

    pieces: tuple[Node, ...]
    ends: tuple[int, ...]
    tokens: Tokens


Edit = Gather | Resize | Enter | Leave | Attend | Accumulate | Keep | Uncut | JoinPieces


@dataclass(frozen=True)
class Flow:
    """What a rule says of a node: the state of its result and the edits it needs."""

    state: AxisState
    edits: tuple[Edit, ...] = ()


@dataclass(frozen=True)
class Reborn:
    """What a rule says of a node that is computed whole, with a token axis in its result; and why it is."""

    reason: str
    tokens: Tokens


@dataclass(frozen=True)
class Never:
    """What a rule says of a node that no form can hold, and what would help."""

    reason: str
    help: str
