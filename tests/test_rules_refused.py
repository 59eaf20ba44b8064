"""What the rules say no to, and that the oracle catches rules that are wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from hetcache_compile.passes.ir.axis import Tokens
from hetcache_compile.passes.rules.rule import Rule
from hetcache_compile.passes.rules.table import elementwise, fresh, like_first
from hetcache_compile.passes.testing.oracle import (
    SIZES,
    OpCall,
    RefusedError,
    S,
    Sizes,
    T,
    Trace,
    call,
    check_rows,
    choose_rows,
    resolve,
    sample,
)
from hetcache_compile.passes.testing.samples import END, attention, index_below

aten = torch.ops.aten

# What the rules say no to. `holds`: refused although one row would do for one row; too rare to be worth a rule.


@dataclass(frozen=True)
class No:
    call: OpCall
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
    # by an index
    *(
        No(call(op, T("bnd"), *more), "mixes the rows")
        for op, more in ((aten.topk.default, (2, 1)), (aten.sort.default, (1,)))
    ),
    No(call(aten.gather.default, T("bnd"), 1, index_below("bld", 6)), "picks rows of the token axis"),
    No(call(aten.gather.default, T("bnd"), 1, index_below("bnd", 6)), "picks rows of the token axis"),
    No(call(aten.gather.default, T("bnd"), 2, index_below("b1d", 6)), "cuts the token axis"),
    No(call(aten.scatter_add.default, T("b2d"), 1, index_below("bnd", 2), T("bnd")), "reduces over the token axis"),
    No(call(aten.scatter_add.default, T("bnd"), 1, index_below("bnd", 6), T("bNd")), "picks rows of the token axis"),
    No(call(aten.scatter_add.default, T("bnd"), 2, index_below("b1d", 6), T("bnd")), "cuts the token axis"),
    No(call(aten.index_add.default, T("b2d"), 1, index_below("n", 2), T("bNd")), "index carries the token axis"),
    No(call(aten.index_copy.default, T("bNd"), 1, T("N", torch.int64), T("bnd")), "reduces over the token axis"),
    No(call(aten.baddbmm.default, T("blk"), T("bln"), T("bnk")), "contracts the token axis"),
    No(call(aten.baddbmm.default, T("bnn"), T("bne"), T("ben")), "each token meets each other token"),
    No(call(aten.baddbmm.default, T("bnk"), T("bNd"), T("bdk")), "bias carries the token axis"),
    No(call(aten.baddbmm.default, T("bkn"), T("bnd"), T("bdl")), "different token axes", sizes=("all is n",)),
]


def rows_hold(whole: OpCall, sizes: Sizes) -> bool:
    """Whether each result is whole, or has a dim with the active rows, when operands hold active rows alone."""
    active, _ = choose_rows(sizes)
    try:
        parts = run(whole, sizes, active)
    except (RuntimeError, IndexError):
        return False
    results = run(whole, sizes)
    return len(parts) == len(results) and all(map(is_some_rows_of, parts, results, [active] * len(parts)))


def is_some_rows_of(part: torch.Tensor, result: torch.Tensor, active: torch.Tensor) -> bool:
    dims = [dim for dim, size in enumerate(result.shape) if size > int(active.max())]
    candidates = [result, *(result.index_select(dim, active) for dim in dims)]
    return any(part.shape == c.shape and torch.allclose(part, c) for c in candidates)


def run(whole: OpCall, sizes: Sizes, rows: torch.Tensor | None = None) -> list[torch.Tensor]:
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

WRONG: list[tuple[OpCall, Rule]] = [
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
def test_a_wrong_rule_is_caught(whole: OpCall, rule: Rule, sizes: Sizes) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        check_rows(whole, sizes, {whole.op: rule})
