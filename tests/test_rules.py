"""The rule oracle: a partial form of one call must give `op(x)[idx]`, for every rule, over shapes and axes.

A call is written with its tensors' dims, one letter each. Token operands have the token axis `n`; `N` is a whole
axis of that size (positional data); a tensor with `t`, `y` and `x` is laid out on the token grid; a digit is
itself. Every call runs with each of `SIZES`: distinct primes (but for `d` = h·e and `n` = t·y·x), and traps in
which the token count equals the width, or every size there is.
"""

from __future__ import annotations

import operator
import re
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import pytest
import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from hetcache_compile.passes.analyse import Analysis
from hetcache_compile.passes.axis import FREE, AxisState, Edit, Enter, Flow, Grid, Place, Tokens
from hetcache_compile.passes.cache import Budgets, CacheEntry
from hetcache_compile.passes.forms import write_full, write_partial
from hetcache_compile.passes.query import Query, Rule
from hetcache_compile.passes.rules import ELEMENTWISE, RULES, elementwise, fresh, like_first

aten = torch.ops.aten
END = torch.iinfo(torch.int64).max

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
        if "n" in self.dims:
            return Tokens(self.dims.index("n"))
        if set("tyx") <= set(self.dims):
            return Grid(frozenset({tuple(Place(self.dims.index(letter)) for letter in "tyx" if sizes[letter] != 1)}))
        return FREE


@dataclass(frozen=True)
class S:
    """A list of sizes: `(he)` is a product, `-` is -1."""

    dims: str

    def __str__(self) -> str:
        return f"[{self.dims}]"


@dataclass(frozen=True)
class Call:
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
        return [x for leaf in leaves for x in (leaf.leaves() if isinstance(leaf, Call) else [leaf])]

    def ops(self) -> set[Any]:
        """Every operator called."""
        return {self.op}.union(*(x.ops() for x in pytree.tree_leaves([self.args, self.kwargs]) if isinstance(x, Call)))


def call(op: Any, *args: Any, **kwargs: Any) -> Call:
    return Call(op, args, kwargs)


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

    def __init__(self, whole: Call, sizes: Sizes, rules: Mapping[Any, Rule] = RULES) -> None:
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
        if not isinstance(operand, T | Call):
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

    def _node(self, operand: Call) -> Node:
        args, kwargs = pytree.tree_map(self.add, (operand.args, operand.kwargs))
        return self._call(operand.op, args, kwargs)

    def _call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        node = self.graph.call_function(op, args, kwargs)
        node.meta["val"] = self._fake(node)
        flow = (self.rules.get(op) or RULES[op])(Query(node, self.states, self.grid))
        if not isinstance(flow, Flow):
            raise RefusedError(flow if isinstance(flow, str) else flow.reason)
        self.states[node], self.edits[node] = flow.state, flow.edits
        return node

    def _fake(self, node: Node) -> Any:
        args, kwargs = pytree.tree_map_only(Node, lambda n: n.meta["val"], (list(node.args), dict(node.kwargs)))
        with self.mode:
            return node.target(*args, **kwargs)  # type: ignore[operator]


def check_rows(whole: Call, sizes: Sizes, rules: Mapping[Any, Rule] = RULES) -> AxisState:
    """Run a call, and its partial form on the cache that its full form gives; compare row by row.

    Where a token tensor ends, its active rows are spoiled in the cache.
    """
    trace = Trace(whole, sizes, rules)
    active, context = choose_rows(sizes)
    analysis = Analysis(trace.grid, trace.states, trace.edits)
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

# Elementwise operators: `PATTERNS` for their number of tensors, `ARGUMENTS` for what else they need.

PATTERNS: dict[int, list[tuple[str, ...]]] = {
    1: [("n",), ("bnd",), ("bdn",)],
    2: [("bnd", "bnd"), ("bnd", "d"), ("bnd", "b1d"), ("bnd", "Nd"), ("bdn", "N"), ("bnd", "bN1"), ("bn", "")],
    3: [("bnd", "bnd", "b1d"), ("nd", "d", "Nd"), ("bnd", "1", "n1"), ("bdn", "dN", "d1")],
}
BROADCAST_FIRST = [("d", "bnd"), ("b1d", "bnd"), ("Nd", "bnd"), ("bN1", "n1"), ("dN", "bdn")]
ARGUMENTS: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {
    aten.clamp.default: ((0.5, 0.8), {}),
    aten.to.dtype: ((torch.float32,), {}),
    aten._to_copy.default: ((), {"dtype": torch.float32}),
    aten.masked_fill.Scalar: ((2.0,), {}),
    aten.masked_fill.Tensor: ((T(""),), {}),
    aten.div.Tensor_mode: ((), {"rounding_mode": "floor"}),
    aten.div.Scalar_mode: ((), {"rounding_mode": "trunc"}),
}
DTYPES: dict[Any, tuple[torch.dtype, ...]] = {
    **dict.fromkeys((aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther), (torch.bool, torch.float64)),
    **dict.fromkeys((aten.masked_fill.Scalar, aten.masked_fill.Tensor), (torch.float64, torch.bool)),
    **dict.fromkeys(
        (
            aten.bitwise_and.Tensor,
            aten.bitwise_or.Tensor,
            aten.bitwise_not.default,
            aten.__and__.Tensor,
            aten.__or__.Tensor,
        ),
        (torch.bool,),
    ),
    **dict.fromkeys((aten.real.default, aten.imag.default, aten._conj.default), (torch.complex128,)),
}


def elementwise_calls() -> list[Call]:
    """Each elementwise operator with each pattern for as many tensors as it takes."""
    calls = []
    for op in ELEMENTWISE:
        required = [a for a in op._schema.arguments if not a.has_default_value() and a.name != "value"]
        tensors = sum(str(a.type) == "Tensor" for a in required)
        patterns = list(PATTERNS[tensors])
        if tensors > 1 and op is not aten.copy.default:  # which has the shape of its first operand
            patterns += [(*pattern, "1")[:tensors] for pattern in BROADCAST_FIRST]
        more, kwargs = ARGUMENTS.get(op, ((), {}))
        dtypes = DTYPES.get(op, (torch.float64,))
        for pattern in patterns:
            operands = iter(T(dims, dtypes[min(i, len(dtypes) - 1)]) for i, dims in enumerate(pattern))
            given = [
                1.5 if str(a.type) == "number" else next(operands)
                for a in required
                if str(a.type) in ("Tensor", "number")
            ]
            calls.append(call(op, *given, *more, **kwargs))
    return calls


def norms(op: Any, *dims_and_weights: tuple[str, str]) -> list[Call]:
    """A norm over trailing dims, with weights and without."""
    with_weights = [call(op, T(dims), S(weights), T(weights)) for dims, weights in dims_and_weights]
    return with_weights + [call(op, T(dims), S(weights)) for dims, weights in dims_and_weights]


def attention(q: str | Call, k: str | Call, v: str | Call, *more: Any, **kwargs: Any) -> Call:
    operands = [T(x) if isinstance(x, str) else x for x in (q, k, v)]
    return call(aten.scaled_dot_product_attention.default, *operands, *more, **kwargs)


def self_attention_of_one_tensor(dims: str) -> Call:
    operand = T(dims)
    return call(aten.scaled_dot_product_attention.default, operand, operand, operand)


# Axes that hold more than one run of tokens, or fold it with other dims.
JOINT = call(aten.cat.default, [T("bhle"), T("bhne"), T("bhke")], 2)
JOINT_COLUMNS = call(aten.transpose.int, JOINT, 2, 3)
JOINT_MASK = call(aten.matmul.default, WHOLE_JOINT := call(aten.cat.default, [T("bhle"), T("bhNe"), T("bhke")], 2),
                  call(aten.transpose.int, WHOLE_JOINT, 2, 3))  # fmt: skip
TWO_RUNS = call(aten.cat.default, [T("bhne"), T("bhle"), T("bhne")], 2)
IN_BATCH = call(aten.view.default, T("bnd"), S("(bn)d"))
IN_FEATURES = call(aten.view.default, T("bnhe"), S("b(nh)e"))
JOINT_IN_BOTH = call(aten.reshape.default, call(aten.transpose.int, JOINT, 1, 2), S("-e"))
FRAMES = call(aten.view.default, T("bnd"), S("bt(yx)d"))
FOLDED: list[Call] = [
    *(call(aten.add.Tensor, axis, T("d")) for axis in (IN_BATCH, FRAMES)),
    call(aten.add.Tensor, IN_BATCH, call(aten.view.default, T("bNd"), S("(bn)d"))),
    call(aten.add.Tensor, IN_FEATURES, call(aten.view.default, T("bNhe"), S("b(nh)e"))),
    call(aten.linear.default, IN_BATCH, T("kd"), T("k")),
    call(aten.view.default, IN_BATCH, S("bnd")),
    call(aten.view.default, IN_BATCH, S("bnhe")),
    call(aten.view.default, IN_FEATURES, S("bnhe")),
    call(aten.view.default, IN_FEATURES, S("bn(he)")),
    call(aten.view.default, IN_FEATURES, S("(bnhe)")),
    call(aten.repeat.default, T("nd"), [2, 1]),
    call(aten.repeat.default, T("bnd"), [2, 3, 1]),
    call(aten.repeat_interleave.self_int, T("bnd"), 3, 1),
    call(aten.repeat_interleave.self_int, T("bnd"), 2, -1),
    call(aten.repeat_interleave.self_int, T("bnd"), 2, 0),
    call(aten.add.Tensor, call(aten.repeat_interleave.self_int, T("nd"), 2, 0), T("d")),
    call(aten.add.Tensor, JOINT_IN_BOTH, T("e")),
    call(aten.reshape.default, JOINT_IN_BOTH, S("b-he")),
    call(aten.cat.default, [IN_BATCH, IN_BATCH], 1),
    attention(*[call(aten.view.default, T("bnke"), S("(bn)ke"))] * 3),
    # joint axes
    JOINT,
    TWO_RUNS,
    call(aten.cat.default, [T("nd"), T("nd")]),
    call(aten.cat.default, [JOINT, T("bh2e")], 2),
    call(aten.add.Tensor, JOINT, T("e")),
    call(aten.mul.Tensor, JOINT, WHOLE_JOINT),
    *(call(aten.slice.Tensor, JOINT, 2, *ends) for ends in ((0, 3), (2, 5), (-3, -1), (-4,), (3,), (0, -5), (0, END))),
    *(call(aten.select.int, JOINT, 2, index) for index in (0, -1)),
    call(aten.split_with_sizes.default, JOINT, S("lnk"), 2),
    call(operator.getitem, call(aten.split_with_sizes.default, TWO_RUNS, S("nln"), 2), 2),
    call(aten.split_with_sizes.default, T("nd"), S("n"), 0),
    call(aten.constant_pad_nd.default, T("bnd"), [0, 0, 2, 3]),
    call(aten.constant_pad_nd.default, T("bnd"), [1, 2], 0.5),
    call(aten.pad.default, T("bnd"), [0, 0, 0, 5]),
    call(aten.pad.default, T("bnd"), [1, 1], "reflect"),
    call(aten.slice_scatter.default, JOINT, call(aten.slice.Tensor, JOINT, 2, 2, END), 2, 2, END),
    call(aten.slice_scatter.default, T("bhne"), T("bhNe"), 2),
    call(aten.slice_scatter.default, JOINT, T("bh2e"), 2, 1, 3),
    call(aten.slice_scatter.default, JOINT, call(aten.slice.Tensor, WHOLE_JOINT, 2, 2, END), 2, 2, END),
    call(aten.reshape.default, JOINT_COLUMNS, S("b(he)-")),
    call(aten.linear.default, call(aten.transpose.int, JOINT_IN_BOTH, 0, 0), T("ke")),
]

ACCEPTED: list[Call] = [
    *FOLDED,
    *elementwise_calls(),
    call(aten.add.Tensor, T("bdtyx"), T("d111")),
    call(aten.add.Tensor, T("bdtyx"), T("tyx")),
    # shapes and types of others
    call(aten.type_as.default, T("bnd"), T("bnd", torch.float32)),
    call(aten.type_as.default, T("bnd"), T("d", torch.float32)),
    call(aten.type_as.default, T("Nd"), T("bnd", torch.float32)),
    *(call(op, T(d)) for op in (aten.zeros_like.default, aten.ones_like.default) for d in ("n", "bnd", "bdn")),
    *(call(aten.empty_like.default, T(d)) for d in ("n", "bnd", "bdn")),
    *(call(aten.full_like.default, T(d), 2.0) for d in ("n", "bnd", "bdn")),
    *(call(op, T("bnd"), S("bNd")) for op in (aten.new_zeros.default, aten.new_ones.default)),
    call(aten.new_empty.default, T("bnd"), S("bNd")),
    call(aten.new_full.default, T("bnd"), S("bNd"), 2.0),
    call(aten.add.Tensor, call(aten.new_zeros.default, T("bnd"), S("N1")), T("bnd")),
    # products
    *(call(aten.linear.default, T(dims), T("kd"), T("k")) for dims in ("nd", "bnd", "nbd", "blnd")),
    call(aten.linear.default, T("bnd"), T("kd")),
    call(aten.matmul.default, T("nd"), T("dk")),
    call(aten.matmul.default, T("bnd"), T("dk")),
    call(aten.matmul.default, T("nbd"), T("dk")),
    call(aten.matmul.default, T("nbd"), T("d")),
    call(aten.matmul.default, T("nd"), T("d")),
    call(aten.matmul.default, T("bhne"), T("bhek")),
    call(aten.matmul.default, T("bhne"), T("1hek")),
    call(aten.matmul.default, T("nd"), T("bdk")),
    call(aten.matmul.default, T("hne"), T("bhek")),
    call(aten.mm.default, T("nd"), T("dk")),
    call(aten.bmm.default, T("bnd"), T("bdk")),
    call(aten.addmm.default, T("k"), T("nd"), T("dk")),
    call(aten.addmm.default, T("Nk"), T("nd"), T("dk")),
    call(aten.addmm.default, T("1k"), T("nd"), T("dk")),
    call(aten.addmm.default, T("nk"), T("nd"), T("dk")),
    call(aten.mm.default, T("ld"), T("dn")),
    call(aten.matmul.default, T("bhle"), T("bhen")),
    call(aten.matmul.default, T("bnld"), T("Ndk")),
    call(aten.matmul.default, T("nld"), T("1dk")),
    call(aten.matmul.default, T("nld"), T("bndk")),
    call(aten.bmm.default, T("nld"), T("Ndk")),
    call(aten.matmul.default, T("bhkn"), T("bhne")),
    call(aten.matmul.default, JOINT_COLUMNS, JOINT),
    call(aten.matmul.default, call(aten.matmul.default, T("bhkn"), T("bhne")), T("bhen")),
    call(aten.einsum.default, "bnd->ndb", [T("bnd")]),
    call(aten.einsum.default, "bnd -> bn", [T("bnd")]),
    call(aten.einsum.default, "bnd,kd->bkn", [T("bnd"), T("kd")]),
    call(aten.einsum.default, "nd,bnd->bn", [T("Nd"), T("bnd")]),
    call(aten.einsum.default, "bnd,nd->dn", [T("bnd"), T("nd")]),
    call(aten.outer.default, T("n"), T("k")),
    call(aten.outer.default, T("k"), T("n")),
    # norms
    *norms(aten.layer_norm.default, ("bnd", "d"), ("nbd", "d"), ("bnhe", "he"), ("bhne", "e"), ("nd", "d")),
    *norms(aten.rms_norm.default, ("bnd", "d"), ("nbd", "d"), ("bnhe", "he"), ("bhne", "e"), ("nd", "d")),
    call(aten.layer_norm.default, T("bdtyx"), S("x"), T("x")),
    call(aten.group_norm.default, T("nkl"), 1, T("k"), T("k")),
    call(aten.group_norm.default, T("bdtyx"), 1),
    # convolutions
    call(aten.conv3d.default, T("bctYX"), T("dc122"), T("d"), [1, 2, 2]),
    call(aten.conv2d.default, T("bcYX"), T("dc22"), T("d"), [2, 2]),
    call(aten.conv1d.default, T("bcn"), T("dc1"), T("d")),
    call(aten.conv2d.default, T("bcnl"), T("dc11"), T("d")),
    call(aten.conv2d.default, T("ncYX"), T("dc22"), T("d"), [2, 2]),
    call(aten.conv3d.default, T("nctYX"), T("dc122"), None, [1, 2, 2]),
    call(aten.convolution.default, T("bcn"), T("dc1"), T("d"), [1], [0], [1], False, [0], 1),
    # attention: cross, self, token by token
    attention("bhne", "bhle", "bhlk"),
    attention("hne", "hle", "hle"),
    attention("bhne", "bhle", "bhle", None, 0.0, False, scale=0.3),
    attention("bhne", "bhle", "bhle", T("Nl")),
    attention("bhne", "bhle", "bhle", T("bhNl", torch.bool)),
    attention("bhne", "bhle", "bhle", T("b11l")),
    attention("bhne", "bhne", "bhnk"),
    attention("bne", "bne", "bne"),
    attention("bhne", "bhne", "bhne", scale=0.3),
    self_attention_of_one_tensor("bhne"),
    # masks: a row for each query, a column for each key
    attention("bhne", "bhne", "bhne", T("NN")),
    attention("bhne", "bhne", "bhne", T("b11N", torch.bool)),
    attention("bhne", "bhne", "bhne", T("N1")),
    attention("bhne", "bhne", "bhne", attn_mask=T("bhNN")),
    # whole queries, joint keys
    attention("bhle", "bhne", "bhne"),
    attention("bhle", "bhne", "bhne", T("lN")),
    attention(JOINT, JOINT, JOINT),
    attention(JOINT, JOINT, JOINT, JOINT_MASK),
    attention("bhne", JOINT, JOINT),
    attention("bhle", TWO_RUNS, TWO_RUNS),
    attention(TWO_RUNS, TWO_RUNS, TWO_RUNS),
    attention("nhke", "Nhle", "Nhle"),
    attention("nhke", "1hle", "1hle"),
    call(aten.scaled_dot_product_attention.default, T("bhne"), T("b1ne"), T("b1ne"), enable_gqa=True),
    attention("nhke", "nhle", "nhle"),
    attention("bnke", "bnle", "bnle"),
    # reductions
    *(
        call(op, T("bnd"), *more)
        for op in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
        for more in (([2],), ([-1], True), ([0],), ([0, 2],), ([0, -1], True))
    ),
    *(call(aten.softmax.int, T(dims), dim) for dims, dim in (("bnd", 2), ("bnd", 0), ("bhnl", -1), ("bdn", -2))),
    *(call(aten._softmax.default, T(dims), dim, False) for dims, dim in (("bnd", 2), ("bnd", 0), ("bdn", -2))),
    # reshapes: the token axis stays, is born, dies
    *(
        call(op, T(old), S(new))
        for op in (aten.view.default, aten._unsafe_view.default, aten.reshape.default)
        for old, new in (
            *(
                ("bnd", "bnhe"),
                ("bnhe", "bnd"),
                ("nbd", "n(bd)"),
                ("bnd", "b-he"),
                ("bnhe", "bn-"),
                ("bnd", "1bnd1"),
            ),
            *(("1nd", "nd"), ("bdn", "bhen"), ("bhen", "(bhe)n"), ("bdn", "bd-")),
            *(("bdtyx", "bdN"), ("tyxd", "Nd"), ("btyxhe", "b-d"), ("bdtyx", "bhetyx")),
            *(("bnd", "btyxd"), ("bnd", "btyxhe"), ("dn", "dtyx"), ("nd", "tyx1d")),
        )
    ),
    call(aten.transpose.int, call(aten.view.default, T("bdtyx"), S("bdN")), 1, 2),
    call(aten.view.default, call(aten.permute.default, T("tyxbd"), [3, 0, 1, 2, 4]), S("bNd")),
    call(aten.view.default, call(aten.conv3d.default, T("bctYX"), T("dc122"), None, [1, 2, 2]), S("bdN")),
    *(call(aten.select_scatter.default, T(a), T(b), 2, 1) for a, b in (("bnd", "bn"), ("bNd", "bn"), ("bnd", "bN"))),
    call(aten.select_scatter.default, T("bnd"), T("nd"), 0, 1),
    call(aten.index_put.default, T("bnd"), [None, None, T("2", torch.int64)], T("bn2")),
    call(aten.index_put.default, T("bnd"), [None, None, T("2", torch.int64)], T("bN2")),
    call(aten.index_put.default, T("bNd"), [None, None, T("2", torch.int64)], T("bn2")),
    *(call(op, T("bnd", torch.bool), dim) for op in (aten.any.dim, aten.all.dim) for dim in (0, -1)),
    # lookups, and operators along other dims
    call(aten.embedding.default, T("kd"), call(aten.to.dtype, T("bn"), torch.int64)),
    *(
        call(op, T(dims), dim)
        for op in (aten.cumsum.default, aten.glu.default)
        for dims, dim in (("bn2", 2), ("2nd", 0))
    ),
    *(call(aten.flip.default, T("bnd"), flipped) for flipped in ([0], [-1, 0])),
    *(call(aten.roll.default, T("bnd"), *more) for more in (([1], [2]), ([1, 2], [0, -1]))),
    *(call(aten.linalg_vector_norm.default, T("bnd"), 2, [-1], keep) for keep in (True, False)),
    *(call(op, T("bnd"), 0.5, False) for op in (aten.dropout.default, aten.native_dropout.default)),
    call(aten.index_select.default, T("bnd"), 2, T("2", torch.int64)),
    call(aten.index.Tensor, T("bnd"), [T("3", torch.int64)]),
    call(aten.index.Tensor, T("bnd"), [None, None, T("13", torch.int64)]),
    call(aten.pad_sequence.default, [T("nd"), T("nd")], True),
    call(aten.pad_sequence.default, [T("nd"), T("Nd")], True),
    call(aten.view_as_real.default, call(aten.view_as_complex.default, T("bn2"))),
    # dims
    *(call(aten.permute.default, T("bnd"), order) for order in ([2, 0, 1], [0, 2, 1], [-2, -1, -3])),
    call(aten.permute.default, T("bnhe"), [0, 2, 1, 3]),
    *(call(aten.transpose.int, T("bnhe"), a, b) for a, b in ((1, 2), (-2, -3), (0, 3), (3, 1), (-4, 1))),
    *(call(aten.t.default, T(dims)) for dims in ("nd", "dn", "n")),
    *(call(aten.unsqueeze.default, T("bnd"), dim) for dim in (0, 1, 2, 3, -1, -2, -3)),
    *(call(aten.squeeze.dim, T(dims), dim) for dims, dim in (("1nd", 0), ("bn1", -1), ("1bn", 0), ("bnd", 0))),
    *(call(aten.squeeze.dims, T("1b1n1"), dims) for dims in ([0, 2], [-1, 0], [0, 1, 4], [4])),
    call(aten.squeeze.default, T("1dtyx")),
    *(call(aten.expand.default, T(old), S(new)) for old, new in (("1nd", "bnd"), ("nd", "bnd"), ("n1", "bnd"))),
    *(call(aten.expand.default, T(old), S(new)) for old, new in (("1n", "b-"), ("d1n", "b-hn"), ("1dtyx", "bdtyx"))),
    *(call(aten.repeat.default, T(dims), times) for dims, times in (("1nd", [2, 1, 3]), ("nd", [3, 1, 2]))),
    # pieces
    call(aten.cat.default, [T("bnd"), T("bnk")], 2),
    call(aten.cat.default, [T("bnd"), T("lnd")]),
    call(aten.cat.default, [T("bnd"), T("bNk"), T("bn1")], -1),
    call(aten.cat.default, [T("bdtyx"), T("bktyx")], 1),
    *(call(aten.stack.default, [T("bnd"), T("bnd")], dim) for dim in (0, 1, 2, 3, -1, -3)),
    call(aten.stack.default, [T("bNd"), T("bnd")]),
    *(call(aten.split.Tensor, T("bnd"), 2, dim) for dim in (0, 2, -1)),
    call(aten.split.Tensor, T("bnd"), 2),
    *(call(aten.split_with_sizes.default, T("bn5"), [2, 3], dim) for dim in (2, -1)),
    *(call(aten.chunk.default, T("bnd"), 2, dim) for dim in (0, 2, -1)),
    *(call(aten.slice.Tensor, T("bnd"), *more) for more in ((2, 1, 5), (0, 0, 2), (-1, 0, END, 2), ())),
    *(call(aten.select.int, T("bnd"), dim, 1) for dim in (0, 2, -1, -3)),
    *(call(aten.unbind.int, T(dims), *dim) for dims, dim in (("bnd", ()), ("bnd", (2,)), ("bdn", (-2,)))),
    *(call(operator.getitem, call(aten.unbind.int, T("bnd"), dim), 1) for dim in (0, 2)),
    call(operator.getitem, call(aten.chunk.default, T("bnd"), 2, -1), 0),
    *(
        call(aten.slice_scatter.default, T(whole), T(part), dim, 0, END, 2)
        for whole, part, dim in (("bnd", "bnr", 2), ("bNd", "bnr", 2), ("bnd", "bNr", -1), ("dn", "rn", 0))
    ),
    call(aten.slice_scatter.default, call(aten.empty_like.default, T("bnd")), T("bnd"), 2),
]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("whole", ACCEPTED, ids=str)
def test_partial_rows_are_the_rows_of_the_whole(whole: Call, sizes: Sizes) -> None:
    check_rows(whole, sizes)


def test_every_rule_has_a_sample_with_tokens() -> None:
    takes_no_tokens = {aten.squeeze.default}
    with_tokens = [c for c in ACCEPTED if any("n" in leaf.dims for leaf in c.leaves() if isinstance(leaf, T))]
    assert set().union(*(c.ops() for c in with_tokens)) == set(RULES) - takes_no_tokens
    assert set().union(*(c.ops() for c in ACCEPTED)) == set(RULES)


# Where the token axis is born and ends: the state of the result, written as its dims.

PATCH = call(aten.conv3d.default, T("bctYX"), T("dc122"), T("d"), [1, 2, 2])
MOVED = call(aten.permute.default, T("bdtyx"), [0, 1, 4, 3, 2])
DOUBLED = call(aten.cat.default, [T("bdtyx"), T("bdtyx")], 3)
STRUCTURE: list[tuple[Call, str]] = [
    # a convolution into patches makes the grid, and nothing else does
    (PATCH, "bdtyx"),
    (call(aten.conv3d.default, T("bdtyx"), T("kd111")), "bktyx"),
    (call(aten.conv3d.default, T("bdtyx"), T("kd333"), None, [1], [1]), "bktyx"),
    (call(aten.conv3d.default, T("bctYX"), T("dc144"), None, [1, 2, 2], [0, 1, 1]), "bd..."),
    (call(aten.conv3d.default, T("bctYX"), T("dc111"), None, [1, 2, 2]), "bd..."),
    (call(aten.conv3d.default, T("bctPQ"), T("dc122"), None, [1, 2, 2], [0, 1, 1]), "bd..."),
    (call(aten.conv3d.default, T("bctUV"), T("dc122"), None, [1, 2, 2], [0], [1, 2, 2]), "bd..."),
    (call(aten.conv3d.default, T("bctYX"), T("dc122"), None, [1, 2, 2], [0], [1, 1, 1], 1), "bdtyx"),
    (call(aten.conv3d.default, T("bctYX"), T("dc111")), "bd..."),
    # the grid moves with its dims
    (call(aten.add.Tensor, PATCH, T("d111")), "bdtyx"),
    (call(aten.mul.Tensor, T("tyx"), T("bdtyx")), "bdtyx"),
    (call(aten.group_norm.default, PATCH, 1), "bdtyx"),
    (call(aten.permute.default, PATCH, [0, 2, 3, 4, 1]), "btyxd"),
    (call(aten.transpose.int, call(aten.transpose.int, PATCH, 1, 2), 2, 3), "btydx"),
    (call(aten.unsqueeze.default, PATCH, 1), "b1dtyx"),
    (call(aten.squeeze.dim, T("1dtyx"), 0), "dtyx"),
    (call(aten.expand.default, T("dtyx"), S("bdtyx")), "bdtyx"),
    (call(aten.view.default, PATCH, S("bhetyx")), "bhetyx"),
    (call(aten.cat.default, [PATCH, T("bktyx")], 1), "b.tyx"),
    (call(aten.slice.Tensor, PATCH, 3, 1), "....."),
    (call(aten.repeat.default, T("dtyx"), [2, 1, 1, 1]), ".tyx"),
    (call(aten.repeat.default, T("dtyx"), [1, 1, 2, 1]), "...."),
    # birth: all of the grid, in order, and nothing else
    (call(aten.view.default, PATCH, S("bdN")), "bdn"),
    (call(aten.reshape.default, PATCH, S("bd-")), "bdn"),
    (call(aten.view.default, T("tyxbd"), S("N(bd)")), "n."),
    (call(aten.transpose.int, call(aten.view.default, PATCH, S("bdN")), 1, 2), "bnd"),
    (call(aten.view.default, DOUBLED, S("bd-")), "bd."),
    # death: exactly the grid
    (call(aten.view.default, T("bnd"), S("btyxd")), "btyxd"),
    (call(aten.view.default, T("bnd"), S("btyxhe")), "btyxhe"),
    (call(aten.view.default, T("dn"), S("1dtyx")), "1dtyx"),
    # and born again
    (call(aten.view.default, call(aten.view.default, T("bnd"), S("btyxd")), S("bNd")), "bnd"),
]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("whole", "result"), STRUCTURE, ids=str)
def test_where_the_token_axis_is(whole: Call, result: str, sizes: Sizes) -> None:
    assert check_rows(whole, sizes) == T(result).state(sizes)


def test_an_image_is_a_video_of_one_frame() -> None:
    patch = call(aten.conv2d.default, T("bcYX"), T("dc22"), None, [2, 2])
    assert check_rows(patch, SIZES["all is n"]) == Grid(frozenset({(Place(2), Place(3))}))
    assert check_rows(patch, SIZES["primes"]) == FREE  # 7 frames are no batch of videos of 2 frames
    frames = call(aten.conv2d.default, T("kcYX"), T("dc22"), None, [2, 2])
    assert check_rows(frames, {**SIZES["primes"], "k": 14}) == Grid(
        frozenset({(Place(0, outer=7), Place(2), Place(3))})
    )


def test_the_grid_in_another_order_is_no_token_axis() -> None:
    """Places are kept even where the order of the dims is wrong; only neighbours in the right order are tokens."""
    for sizes in SIZES.values():
        assert isinstance(check_rows(call(aten.reshape.default, MOVED, S("bdN")), sizes), Grid)


def test_a_folded_birth() -> None:
    for sizes in SIZES.values():
        assert check_rows(call(aten.view.default, PATCH, S("b(dN)")), sizes) == Tokens(1, outer=sizes["d"])
        assert check_rows(FRAMES, sizes) == (Tokens(2) if sizes["t"] == 1 else Grid(frozenset({frames_of(sizes)})))


def frames_of(sizes: Sizes) -> tuple[Place, ...]:
    return Place(1), Place(2, inner=sizes["x"]), Place(2, outer=sizes["y"])


# What the rules say no to. `holds`: refused although one row would do for one row; too rare to be worth a rule.


@dataclass(frozen=True)
class No:
    call: Call
    reason: str
    holds: bool = False
    sizes: tuple[str, ...] = tuple(SIZES)


PRIMES, TRAPS, LONG = ("primes",), ("width is n", "all is n"), ("primes", "width is n")
CONV = ([1, 2, 2],)
CAUSAL, DIFFERENT = "a causal mask depends", "carry the token axis in different ways"
REFUSED = [
    No(call(aten.add.Tensor, T("bnk"), T("kn")), "different token axes", sizes=TRAPS),
    No(call(aten.cat.default, [T("bdn"), T("bdn"), T("0")], 1), "an operand of size 0 meets", holds=True),
    # norms
    *(
        No(call(op, T(dims), S(weights)), "normalises over the token axis")
        for op in (aten.layer_norm.default, aten.rms_norm.default)
        for dims, weights in (("bdn", "n"), ("bnd", "nd"), ("nd", "nd"))
    ),
    No(call(aten.layer_norm.default, T("blN"), S("N"), T("n")), "weights carry the token axis"),
    No(call(aten.group_norm.default, T("bnl"), 1), "normalises over the token axis"),
    No(call(aten.group_norm.default, T("bln"), 1), "normalises over the token axis"),
    No(call(aten.group_norm.default, T("bNl"), 1, T("n"), T("n")), "weights carry the token axis"),
    # products
    No(call(aten.linear.default, T("bdn"), T("kN")), "contracts the token axis"),
    No(call(aten.linear.default, T("bd"), T("Nd"), T("n")), "weight carries the token axis"),
    No(call(aten.linear.default, T("bld"), T("nd")), "weight carries the token axis", holds=True),
    No(call(aten.matmul.default, T("dn"), T("Nk")), "contracts the token axis"),
    No(call(aten.matmul.default, T("n"), T("Nk")), "contracts the token axis"),
    No(call(aten.matmul.default, T("bhne"), T("bhen")), "each token meets each other token"),
    No(call(aten.einsum.default, "bnd->bd", [T("bnd")]), "contracts the token axis"),
    No(call(aten.einsum.default, "bnd,bnk->bdk", [T("bnd"), T("bnk")]), "contracts the token axis"),
    No(call(aten.einsum.default, "bnd,bmd->bnm", [T("bnd"), T("bnd")]), "different token axes"),
    # convolutions
    No(call(aten.conv2d.default, T("bcnX"), T("dc22"), None, [2, 2]), "convolves over the token axis"),
    No(call(aten.conv3d.default, T("bntYX"), T("dN122"), None, *CONV), "convolves over the token axis"),
    No(call(aten.conv3d.default, T("bctYX"), T("Nc122"), T("n"), *CONV), "weight carries the token axis"),
    # attention
    No(attention("bhne", "bhne", "bhne", None, 0.0, True), CAUSAL),
    No(attention("bhne", "bhle", "bhle", None, 0.0, True), CAUSAL),
    No(attention("bhne", "bhle", "bhle", None, 0.5), "drops elements at random"),
    No(attention("bhNe", "bhle", "bhle", T("nl")), "mask is computed from tokens"),
    No(attention("bhne", "bhle", "bhle", T("nl")), "mask is computed from tokens", holds=True),
    No(attention("bhne", "bhne", "bhNe"), DIFFERENT),
    No(attention("bhne", "bhNe", "bhne"), DIFFERENT),
    No(attention("bhkn", "bhln", "bhln"), "features lie along the token axis"),
    No(attention("hne", "bhle", "bhle"), "differ in their number of dims", holds=True),
    # reductions
    *(
        No(call(op, T("bnd"), *dims), "reduces over the token axis")
        for op in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)
        for dims in (([1],), ([-2], True), ([1, 2],))
    ),
    *(No(call(aten.sum.dim_IntList, T("bnd"), dims), "reduces over the token axis") for dims in (None, [])),
    No(call(aten.amax.default, T("bnd")), "reduces over the token axis"),
    No(call(aten.softmax.int, T("bnd"), 1), "mixes the rows of the token axis"),
    No(call(aten._softmax.default, T("bnd"), -2, False), "mixes the rows of the token axis"),
    # reshapes
    No(call(aten.reshape.default, T("nd"), S("dn")), "mixes the token axis", sizes=PRIMES),
    No(call(aten.view.default, T("bnd"), S("bxytd")), "mixes the token axis"),
    No(call(aten.squeeze.default, T("1nd")), "may drop the token axis", holds=True),
    No(call(aten.squeeze.dim, T("bnd"), 1), "squeezes the token axis", holds=True),
    No(call(aten.squeeze.dims, T("1nd"), [0, -2]), "squeezes the token axis", holds=True),
    # pieces
    No(call(aten.split.Tensor, T("bnd"), 2, 1), "cuts the token axis"),
    No(call(aten.chunk.default, T("nd"), 2), "cuts the token axis"),
    No(call(aten.slice.Tensor, T("bnd"), 1, 1, 4), "cuts the token axis"),
    No(call(aten.slice.Tensor, T("nd"), 0, 0, END, 2), "cuts the token axis"),
    No(call(aten.select.int, T("bnd"), -2, 0), "cuts the token axis"),
    No(call(aten.unbind.int, T("nd")), "cuts the token axis"),
    No(call(aten.slice_scatter.default, T("bnd"), T("b1d"), 1, 0, 1), "cuts the token axis"),
]


def rows_hold(whole: Call, sizes: Sizes) -> bool:
    """Whether each result is whole, or has a dim with the active rows, when operands hold active rows alone."""
    active, _ = choose_rows(sizes)
    try:
        parts = run(whole, sizes, active)
    except RuntimeError:
        return False
    results = run(whole, sizes)
    return len(parts) == len(results) and all(map(is_some_rows_of, parts, results, [active] * len(parts)))


def is_some_rows_of(part: torch.Tensor, result: torch.Tensor, active: torch.Tensor) -> bool:
    dims = [dim for dim, size in enumerate(result.shape) if size > int(active.max())]
    candidates = [result, *(result.index_select(dim, active) for dim in dims)]
    return any(part.shape == c.shape and torch.allclose(part, c) for c in candidates)


def run(whole: Call, sizes: Sizes, rows: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The results of a call; with `rows`, of the same call on these rows of its token operands."""
    generator = torch.Generator().manual_seed(0)

    def value(operand: Any) -> Any:
        if isinstance(operand, S):
            return resolve(operand.dims, sizes if rows is None else {**sizes, "n": len(rows)})
        if not isinstance(operand, T):
            return operand
        tensor, state = sample(operand, sizes, generator), operand.state(sizes)
        return tensor.index_select(state.dim, rows) if rows is not None and isinstance(state, Tokens) else tensor

    args, kwargs = pytree.tree_map(value, (whole.args, whole.kwargs))
    results = whole.op(*args, **kwargs)
    return list(results) if isinstance(results, list | tuple) else [results]


@pytest.mark.parametrize(
    ("no", "sizes"), [pytest.param(no, SIZES[name], id=f"{no.call}-{name}") for no in REFUSED for name in no.sizes]
)
def test_refused_for_a_reason(no: No, sizes: Sizes) -> None:
    with pytest.raises(RefusedError, match=no.reason):
        Trace(no.call, sizes)
    assert rows_hold(no.call, sizes) == no.holds


# The oracle itself: it has to catch rules that are wrong.

WRONG: list[tuple[Call, Rule]] = [
    (call(aten.softmax.int, T("bnd"), 1), elementwise),
    (call(aten.cumsum.default, T("bnd"), 1), elementwise),
    (call(aten.flip.default, T("bnd"), [1]), elementwise),
    (call(aten.sum.dim_IntList, T("bnd"), [1]), fresh),
    (call(aten.mean.dim, T("bnd"), [1], True), fresh),
    (call(aten.layer_norm.default, T("bdn"), S("n")), fresh),
    (call(aten.zeros_like.default, T("bnd")), fresh),
    (call(aten.transpose.int, T("bnk"), 1, 2), like_first),
    (call(aten.unsqueeze.default, T("nk"), 0), like_first),
    (call(aten.matmul.default, T("nd"), T("bdk")), like_first),
    (attention("bhne", "bhne", "bhne"), like_first),
    (call(aten.slice.Tensor, T("bnd"), 1, 0, 2), fresh),
    (call(aten.view.default, T("bnd"), S("btyxd")), fresh),
]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("whole", "rule"), WRONG, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_wrong_rule_is_caught(whole: Call, rule: Rule, sizes: Sizes) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check_rows(whole, sizes, {whole.op: rule})
