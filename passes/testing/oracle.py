"""The rule oracle: a partial form of one call must give `op(x)[idx]`, for every rule, over shapes and axes.

A call is written with its tensors' dims, one letter each. Token operands have the token axis `n`; `N` is a whole
axis of that size (positional data); a tensor with `t`, `y` and `x` is laid out on the token grid; a digit is
itself. Every call runs with each of `SIZES`: distinct primes (but for `d` = h·e and `n` = t·y·x), and traps in
which the token count equals the width, or every size there is. The calls are those of `samples`.
"""

from __future__ import annotations

import operator
import re
import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from ..analysis.analyse import Analysis
from ..ir.axis import FREE, AxisState, Edit, Enter, Flow, Leave, OnGrid, Place, Reborn, Tokens
from ..ir.cache import CacheEntry
from ..ir.contract import Budgets
from ..rules.rule import Query, Rule
from ..rules.table import RULES, rule_of
from ..writing.write import write_full, write_partial

aten = torch.ops.aten
Sizes = Mapping[str, int]


def sizes_of(t: int, y: int, x: int, **others: int) -> Sizes:
    """A size for each letter: the grid's, the others, and those that follow from them."""
    n, d = t * y * x, others["h"] * others["e"]
    pixels = {"Y": 2 * y, "X": 2 * x, "P": 2 * y - 1, "Q": 2 * x - 1, "U": 2 * y + 1, "V": 2 * x + 1}
    return {"t": t, "y": y, "x": x, "n": n, "N": n, "d": d, "r": (d + 1) // 2, **pixels, **others}


SIZES = {
    "primes": sizes_of(2, 3, 5, b=7, c=29, e=13, h=11, k=17, l=19),
    "width is n": sizes_of(2, 2, 3, b=5, c=2, e=4, h=3, k=12, l=12),
    "all is n": sizes_of(1, 2, 3, b=6, c=6, e=6, h=6, k=6, l=6),
}


@dataclass(frozen=True)
class T:
    """A tensor operand."""

    dims: str
    dtype: torch.dtype = torch.float64

    def __str__(self) -> str:
        return self.dims if self.dtype == torch.float64 else f"{self.dims}:{self.dtype}"

    def state(self, sizes: Sizes) -> AxisState:
        """What its letters say of the token axis."""
        if "n" in self.dims:
            return Tokens(self.dims.index("n"))
        if set("tyx") <= set(self.dims):
            return OnGrid(frozenset({tuple(Place(self.dims.index(letter)) for letter in "tyx" if sizes[letter] != 1)}))
        return FREE


@dataclass(frozen=True)
class S:
    """A list of sizes: `(he)` is a product, `-` is -1."""

    dims: str

    def __str__(self) -> str:
        return f"[{self.dims}]"


@dataclass(frozen=True)
class OpCall:
    """A call; its operands may be calls too. An operand that is one object in two places is one tensor."""

    op: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        name = str(self.op).removeprefix("aten.") if isinstance(self.op, OpOverload) else self.op.__name__
        return f"{name}({', '.join(map(str, pytree.tree_leaves([self.args, self.kwargs])))})"

    def leaves(self) -> list[Any]:
        """Everything that is no call, those inside operands included."""
        leaves = pytree.tree_leaves([self.args, self.kwargs])
        return [x for leaf in leaves for x in (leaf.leaves() if isinstance(leaf, OpCall) else [leaf])]

    def ops(self) -> set[Any]:
        """Every operator called."""
        return {self.op}.union(
            *(x.ops() for x in pytree.tree_leaves([self.args, self.kwargs]) if isinstance(x, OpCall))
        )


def call(op: Any, *args: Any, **kwargs: Any) -> OpCall:
    """`op(*args, **kwargs)`, to be made with the sizes of a run."""
    return OpCall(op, args, kwargs)


def resolve(text: str, sizes: Sizes) -> list[int]:
    """`"b(he)-2"` in numbers."""
    value = {**sizes, "-": -1, **{digit: int(digit) for digit in string.digits}}
    return [prod(value[letter] for letter in token.strip("()")) for token in re.findall(r"\(\w+\)|.", text)]


def sample(operand: T, sizes: Sizes, generator: torch.Generator) -> torch.Tensor:
    """Random data between 0.25 and 1.25."""
    tensor = torch.rand(resolve(operand.dims, sizes), generator=generator, dtype=torch.float64) + 0.25
    return tensor > 0.75 if operand.dtype == torch.bool else tensor.to(operand.dtype)


def choose_rows(sizes: Sizes) -> tuple[torch.Tensor, torch.Tensor]:
    """A third of the tokens and the others, in random order."""
    order = torch.randperm(sizes["n"], generator=torch.Generator().manual_seed(1))
    return order[: sizes["n"] // 3], order[sizes["n"] // 3 :]


class RefusedError(Exception):
    """The rule said no."""


class Trace:
    """A call as a graph of its own, with the states and edits that the rules give its nodes."""

    def __init__(self, whole: OpCall, sizes: Sizes, rules: Mapping[Any, Rule] = RULES) -> None:
        self.sizes, self.rules = sizes, rules
        self.grid = (sizes["t"], sizes["y"], sizes["x"])
        self.graph, self.mode = Graph(), FakeTensorMode()
        self.tensors: list[torch.Tensor] = []
        self.states: dict[Node, AxisState] = {}
        self.edits: dict[Node, tuple[Edit, ...]] = {}
        self._known: dict[int, Node] = {}
        self._random = torch.Generator().manual_seed(0)
        node = self.add(whole)
        results = [node]
        if isinstance(node.meta["val"], list | tuple):
            results = [self._call(operator.getitem, (node, i), {}) for i in range(len(node.meta["val"]))]
        self.results = [self.states[result] for result in results]
        self.graph.output(tuple(results))
        self.module = GraphModule({}, self.graph)

    def add(self, operand: Any) -> Any:
        """The node, or the value, that stands for an operand."""
        if isinstance(operand, S):
            return resolve(operand.dims, self.sizes)
        if not isinstance(operand, T | OpCall):
            return operand
        if id(operand) not in self._known:
            self._known[id(operand)] = self._tensor(operand) if isinstance(operand, T) else self._node(operand)
        return self._known[id(operand)]

    def _tensor(self, operand: T) -> Node:
        tensor = sample(operand, self.sizes, self._random)
        node = self.graph.placeholder(f"x{len(self.tensors)}")
        node.meta["val"] = self.mode.from_tensor(tensor)
        self.tensors.append(tensor)
        state = self.states[node] = operand.state(self.sizes)
        if isinstance(state, Tokens):
            self.edits[node] = (Enter(state),)
        return node

    def _node(self, operand: OpCall) -> Node:
        args, kwargs = pytree.tree_map(self.add, (operand.args, operand.kwargs))
        return self._call(operand.op, args, kwargs)

    def _call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        node = self.graph.call_function(op, args, kwargs)
        node.meta["val"] = self._fake(node)
        rule = self.rules.get(op) or rule_of(op)
        assert rule is not None, op
        flow = rule(Query(node, self.states, self.grid))
        if isinstance(flow, Reborn):
            ends = tuple(Leave(o, s) for o in node.all_input_nodes if isinstance(s := self.states[o], Tokens))
            flow = Flow(flow.tokens, (*ends, Enter(flow.tokens)))
        if not isinstance(flow, Flow):
            raise RefusedError(flow if isinstance(flow, str) else flow.reason)
        self.states[node], self.edits[node] = flow.state, flow.edits
        return node

    def _fake(self, node: Node) -> Any:
        args, kwargs = pytree.tree_map_only(Node, lambda n: n.meta["val"], (list(node.args), dict(node.kwargs)))
        with self.mode:
            return node.target(*args, **kwargs)  # type: ignore[operator]


def check_rows(whole: OpCall, sizes: Sizes, rules: Mapping[Any, Rule] = RULES) -> AxisState:
    """Run a call, and its partial form on the cache that its full form gives; compare row by row.

    Where a token tensor ends, its active rows are spoiled in the cache.
    """
    trace = Trace(whole, sizes, rules)
    active, context = choose_rows(sizes)
    analysis = Analysis(trace.module, trace.grid, trace.states, trace.edits)
    budgets = Budgets(len(active), len(context))
    partial = write_partial(trace.module, analysis, budgets)
    outputs = trace.module(*trace.tensors)
    by_name = {"active_index": active, "context_index": context}
    cache: dict[CacheEntry, torch.Tensor] = {}
    if partial.reads:
        full = write_full(trace.module, analysis, budgets)
        cache = dict(zip(full.writes, full.module(*trace.tensors, context)[len(outputs) :], strict=True))
    for entry, tensor in cache.items():
        if entry.rows == "tokens":
            cache[entry] = tensor.index_fill(entry.dim, positions(entry.tokens, active, sizes["n"]), torch.nan)
    indices = [by_name[name] for name in partial.indices]
    actual = partial.module(*trace.tensors, *indices, *[cache[entry] for entry in partial.reads])
    for result, expected, state in zip(actual[: len(outputs)], outputs, trace.results, strict=True):
        if isinstance(state, Tokens):
            expected = expected.index_select(state.dim, positions(state, active, sizes["n"]))
        if whole.op in UNINITIALISED:
            result, expected = torch.zeros_like(result), torch.zeros_like(expected)
        torch.testing.assert_close(result, expected)
    return trace.results[0]


def positions(tokens: Tokens, active: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """The entries of a token dim that a partial form holds, in order."""
    rows, start = [], 0
    for number, length in enumerate(tokens.whole):
        if number:
            rows += [start + int(index) for index in active]
            start += num_tokens
        rows += range(start, start + length)
        start += length
    folded = [
        (o * start + r) * tokens.inner + i for o in range(tokens.outer) for r in rows for i in range(tokens.inner)
    ]
    return torch.tensor(folded)


UNINITIALISED = (aten.empty_like.default, aten.new_empty.default)


def wrong_rules(calls: Iterable[OpCall]) -> list[str]:
    """The calls whose partial form does not give the rows of the full one, each with what went wrong."""
    wrong = []
    for whole in calls:
        for name, sizes in SIZES.items():
            try:
                check_rows(whole, sizes)
            except (AssertionError, RuntimeError, RefusedError) as error:
                wrong.append(f"{whole} ({name}): {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    return wrong
