"""Rows and heads that move between ranks: of what each rank computed on its share, what all ranks computed.

Every rank computes equally many rows, so that all have one graph of one time. Where R rows do not divide by P ranks,
shares overlap: a rank computes some rows of its neighbour too, and one copy is dropped where shares meet. The slowest
rank computes `ceil(R / P)` rows either way.

    R = 7, P = 3        rank 0: 0 1 2     rank 1: 3 4 5     rank 2: 4 5 6, of which it owns 6

The functions here are traced into forms. Their collectives are torch.distributed's functional ones, nodes of a graph,
so a compiler may overlap them with what it computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.distributed._functional_collectives  # registers the operators
from torch import Tensor
from torch.fx import GraphModule

from ..ir.axis import Tokens

c10d = torch.ops._c10d_functional


@dataclass(frozen=True)
class Ranks:
    """The processes that share the rows of a form.

    Attributes:
        rank: of this process among them.
        size: P, how many there are.
        group: name of their process group.
    """

    rank: int
    size: int
    group: str

    def share(self, rows: int) -> int:
        """How many of R rows each rank computes."""
        return -(-rows // self.size)

    def start(self, rows: int, rank: int | None = None) -> int:
        """The first row of a rank, of this one by default."""
        share = self.share(rows)
        return min((self.rank if rank is None else rank) * share, rows - share)

    def owned(self, rows: int) -> int:
        """How many rows at the end of this rank's share no rank before it has."""
        share = self.share(rows)
        return max(0, min(share, rows - self.rank * share))


@dataclass(frozen=True)
class Share:
    """One rank's share of R rows, and how it meets the others.

    Attributes:
        ranks: that share the rows.
        rows: R, the tokens of a form: N or M.
    """

    ranks: Ranks
    rows: int

    @property
    def size(self) -> int:
        """Rows of a share."""
        return self.ranks.share(self.rows)

    def gather_rows(self, layouts: Sequence[Tokens], *operands: Tensor) -> list[Tensor]:
        """The rows of all ranks, of operands that have this rank's: in one collective.

        Args:
            layouts: how the rows of each operand lie.
            operands: of one type.
        """
        parts = [_Rows.of(x, tokens, self.size) for x, tokens in zip(operands, layouts, strict=True)]
        sent = [part.runs for part in parts]
        found = self._split(self._all_gather(_packed(sent, 0)), [x.shape for x in sent])
        return [part.joined(self._in_order(x)) for x, part in zip(found, parts, strict=True)]

    def rows_to_heads(self, layouts: Sequence[Tokens | None], *operands: Tensor) -> list[Tensor]:
        """All rows of this rank's heads, of operands `[..., heads, rows, features]` with all heads of its rows.

        Args:
            layouts: how the rows of each operand lie; None where none is a token: then they are all here.
            operands: of one type.
        """
        size, rank = self.ranks.size, self.ranks.rank
        by_rank = [torch.unflatten(x, -3, (size, -1)).movedim(-4, 0) for x in operands]  # [P, ..., heads of one, ...]
        own = [x[rank] for x in by_rank]
        moving = [number for number, tokens in enumerate(layouts) if tokens is not None]
        parts = [_Rows.of(by_rank[n], layouts[n].at(by_rank[n].ndim - 2), self.size) for n in moving]  # type: ignore[union-attr]
        sent = [torch.unflatten(part.runs, 0, (size, -1)) for part in parts]
        found = self._split(self._all_to_all(_packed(sent, 1)), [x.shape[1:] for x in sent]) if parts else []
        for n, x, part in zip(moving, found, parts, strict=True):
            own[n] = part.mine(rank, size).joined(self._in_order(x))
        return own

    def heads_to_rows(self, tokens: Tokens | None, operand: Tensor) -> Tensor:
        """This rank's rows of all heads, of an operand `[..., own heads, rows, features]` that has all rows.

        Args:
            tokens: how its rows lie, or None where none is a token.
            operand: what an attention makes of `rows_to_heads`.
        """
        if tokens is None:
            return self._all_heads(operand)
        part = _Rows.of(operand, tokens.at(operand.ndim - 2), self.rows)
        sent = torch.unflatten(self._by_rank(part.runs, 2), 2, (self.ranks.size, -1)).movedim(2, 0)
        found = self._all_to_all(sent.contiguous())  # [P, before, runs, share, features]
        lead = operand.shape[:-3]
        runs = torch.unflatten(found, 1, (prod(lead), -1)).transpose(0, 1).flatten(0, 2)
        shape = (*lead, self.ranks.size * operand.shape[-3], *operand.shape[-2:])
        others = part.others
        if sum(tokens.whole):
            rows = self._all_heads(torch.unflatten(torch.cat(others, 1), 0, operand.shape[:-2]))
            others = list(rows.flatten(0, -3).split_with_sizes([other.shape[1] for other in others], 1))
        return _Rows(runs, others, tokens.at(operand.ndim - 2), shape).joined(runs)

    def add_up(self, operand: Tensor) -> Tensor:
        """The sum over all ranks."""
        return _done(c10d.all_reduce(operand, "sum", self.ranks.group))

    def weights(self, tokens: Tokens, operand: Tensor, counted: Tensor | None = None) -> Tensor:
        """For each row of an operand 1, or 0 where a rank before this one has it too: each row counts in one rank.

        Args:
            tokens: how its rows lie, not folded.
            operand: whose type they get.
            counted: which tokens count at all, `[share]` of ones and zeros; then no other row does.
        """
        owned = self.ranks.owned(self.rows)
        run = torch.cat([operand.new_zeros(self.size - owned), operand.new_ones(owned)])
        run = run if counted is None else run * counted
        once = float(counted is None and self.ranks.rank == 0)
        first, *others = (operand.new_full((length,), once) for length in tokens.whole)
        rows = torch.cat([first, *(part for other in others for part in (run, other))])
        return rows.view([-1 if dim == tokens.dim else 1 for dim in range(operand.ndim)])

    def _all_gather(self, operand: Tensor) -> Tensor:
        """`[P, ...]`."""
        found = _done(c10d.all_gather_into_tensor(operand.contiguous(), self.ranks.size, self.ranks.group))
        return torch.unflatten(found, 0, (self.ranks.size, -1))

    def _all_to_all(self, operand: Tensor) -> Tensor:
        """Dim 0 counts the ranks that rows go to, and then those that they come from."""
        sizes = [1] * self.ranks.size
        return _done(c10d.all_to_all_single(operand, sizes, sizes, self.ranks.group))

    def _all_heads(self, operand: Tensor) -> Tensor:
        """All heads, of this rank's."""
        *lead, own, rows, features = operand.shape
        found = self._all_gather(operand.flatten()).view(self.ranks.size, prod(lead), own, rows, features)
        return found.transpose(0, 1).reshape(*lead, self.ranks.size * own, rows, features)

    def _split(self, packed: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """What `_packed` put together, for each rank it comes from: `[P, *shape]`."""
        parts = packed.split_with_sizes([prod(shape) for shape in shapes], 1)
        return [part.reshape(self.ranks.size, *shape) for part, shape in zip(parts, shapes, strict=True)]

    def _in_order(self, found: Tensor) -> Tensor:
        """`[before, runs, R, after]`: every row once, of what came from each: `[P, before, runs, share, after]`."""
        rows = found.permute(1, 2, 0, 3, 4).flatten(2, 3)
        full, rest = divmod(self.rows, self.size)
        if full == self.ranks.size:
            return rows
        parts = [rows[:, :, : full * self.size]]
        if rest:
            end = (full + 1) * self.size
            parts.append(rows[:, :, end - rest : end])
        return _one(parts, 2)

    def _by_rank(self, operand: Tensor, dim: int) -> Tensor:
        """The shares of all ranks one after the other, of all rows."""
        if self.size * self.ranks.size == self.rows:
            return operand
        starts = [self.ranks.start(self.rows, rank) for rank in range(self.ranks.size)]
        return torch.cat([operand.narrow(dim, start, self.size) for start in starts], dim)


@dataclass(frozen=True)
class _Rows:
    """The rows of an operand: `runs` `[before, runs, tokens of a run, after]`, and `others` `[before, rows, after]`."""

    runs: Tensor
    others: list[Tensor]
    tokens: Tokens
    shape: tuple[int, ...]

    @classmethod
    def of(cls, operand: Tensor, tokens: Tokens, count: int) -> _Rows:
        """The rows of an operand with `count` tokens in each run."""
        shape, dim = tuple(operand.shape), tokens.dim
        before, after = prod(shape[:dim]) * tokens.outer, tokens.inner * prod(shape[dim + 1 :])
        rows = operand.reshape(before, tokens.rows(count), after)
        lengths = [tokens.whole[0]]
        for length in tokens.whole[1:]:
            lengths += [count, length]
        parts = rows.split_with_sizes(lengths, 1)
        runs = [part.unsqueeze(1) for part in parts[1::2]]
        return cls(_one(runs, 1), list(parts[::2]), tokens, shape)

    def mine(self, rank: int, size: int) -> _Rows:
        """What is for one rank, of rows whose first dim counts ranks."""
        others = [torch.unflatten(other, 0, (size, -1))[rank] for other in self.others]
        return _Rows(self.runs, others, self.tokens.at(self.tokens.dim - 1), self.shape[1:])

    def joined(self, runs: Tensor) -> Tensor:
        """The operand with other runs of tokens, `[before, runs, tokens of a run, after]`."""
        first, *others = self.others
        rows = [first, *(part for pair in zip(runs.unbind(1), others, strict=True) for part in pair)]
        dim = self.tokens.dim
        size = self.tokens.size(runs.shape[2])
        return _one([part for part in rows if part.shape[1]], 1).reshape(
            *self.shape[:dim], size, *self.shape[dim + 1 :]
        )


def _packed(operands: Sequence[Tensor], dims: int) -> Tensor:
    """Several operands as one, side by side; the first `dims` dims are their own."""
    return _one([x.reshape(*x.shape[:dims], -1) for x in operands], -1).contiguous()


def _one(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Parts put together; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _done(started: Tensor) -> Tensor:
    result: Tensor = c10d.wait_tensor(started)
    return result


def sent_bytes(module: GraphModule, size: int) -> int:
    """Bytes that each of P ranks sends while it runs a form once.

    To gather n bytes a rank sends them to the P - 1 others; to exchange n bytes it sends (P - 1) / P of them, and to
    add up n bytes twice as many, as rings do.
    """
    total = 0
    for node in module.graph.nodes:
        if node.target in SENT:
            operand = node.args[0].meta["val"]
            total += SENT[node.target](operand.numel() * operand.element_size(), size)
    return total


SENT: dict[Any, Callable[[int, int], int]] = {
    c10d.all_gather_into_tensor.default: lambda count, size: count * (size - 1),
    c10d.all_to_all_single.default: lambda count, size: count * (size - 1) // size,
    c10d.all_reduce.default: lambda count, size: 2 * count * (size - 1) // size,
}
"""Bytes that one of P ranks sends, by the bytes of its operand."""
