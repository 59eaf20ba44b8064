"""Golden graphs of every form of one small module, and what holds for every rewritten node."""

from __future__ import annotations

from collections.abc import Callable
from difflib import ndiff
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.passes.infra.pass_base import PassResult
from torch.utils import _pytree as pytree

import hetcache_compile as hetcache
from hetcache_compile.capture.rewrite import Forms, write_form
from hetcache_compile.passes.analysis.normalise import (
    PASSES,
    drop_asserts,
    drop_dead_code,
    drop_empty_operands,
    drop_overwritten,
    drop_whole_slices,
    normalise,
    share_subexpressions,
)
from hetcache_compile.passes.forms.collectives import Ranks
from hetcache_compile.passes.forms.pipeline import in_process
from hetcache_compile.passes.ir.refusal import module_path, shape_of, source_line

aten = torch.ops.aten

GRID = (2, 3, 5)
HEADS, WIDTH, CHANNELS = 2, 14, 3


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q * table, k * table, v).transpose(1, 2).flatten(2))


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(CHANNELS, WIDTH, (1, 2, 2), (1, 2, 2))
        self.attention = Attention()
        self.head = nn.Linear(WIDTH, CHANNELS * 4)
        self.table: torch.Tensor
        self.register_buffer("table", torch.randn(30, WIDTH // HEADS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.attention(x, self.table)
        x = self.head(x).view(1, *GRID, CHANNELS, 2, 2)
        return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(1, CHANNELS, GRID[0], GRID[1] * 2, GRID[2] * 2)


@pytest.fixture(scope="module")
def forms() -> Forms:
    torch.manual_seed(0)
    active = torch.arange(30) % 4 == 0
    plan = hetcache.Plan.from_token_mask(active.numpy(), GRID)
    return hetcache.rewrite(Small(), plan, (torch.randn(1, CHANNELS, 2, 6, 10),))


def compact(module: GraphModule) -> str:
    """One line for each node but the weights: `name: op(args) -> shape`."""
    lines = []
    for node in module.graph.nodes:
        args = ", ".join(map(str, node.args))
        shape = f" -> {shape_of(node)}" if "val" in node.meta else ""
        if node.op == "placeholder":
            line = f"{node.name}: input{shape}"
        elif node.op == "output":
            line = f"return {args}"
        else:
            name = getattr(node.target, "_opname", "getitem")
            line = f"{node.name}: {name}({args}){shape}"
        if not line.startswith("p_"):
            lines.append(line.replace("_default", "").replace("scaled_dot_product_attention", "sdpa"))
    return "\n".join(lines)


def changes(forms: Forms, kind: str) -> str:
    """The lines in which a form with its cache in place differs from the functional one."""
    functional = forms.by_kind[kind]
    in_place = in_process(functional, forms.plan.form_options)
    old, new = (compact(form.module).splitlines() for form in (functional, in_place))
    return "\n".join(line.rstrip() for line in ndiff(old, new) if line[0] in "+-")


def test_full(forms: Forms) -> None:
    assert_expected_inline(
        compact(forms.by_kind["full"].module),
        """\
b_table: input -> (30, 7)
x: input -> (1, 3, 2, 6, 10)
context_index: input -> (22,)
conv3d: conv3d(x, p_patch_weight, p_patch_bias, [1, 2, 2]) -> (1, 14, 2, 3, 5)
view: view(conv3d, [1, 14, 30]) -> (1, 14, 30)
transpose: transpose(view, 1, 2) -> (1, 30, 14)
linear: linear(transpose, p_attention_q_weight, p_attention_q_bias) -> (1, 30, 14)
view_1: view(linear, [1, 30, 2, 7]) -> (1, 30, 2, 7)
transpose_1: transpose(view_1, 1, 2) -> (1, 2, 30, 7)
linear_1: linear(transpose, p_attention_k_weight, p_attention_k_bias) -> (1, 30, 14)
view_2: view(linear_1, [1, 30, 2, 7]) -> (1, 30, 2, 7)
transpose_2: transpose(view_2, 1, 2) -> (1, 2, 30, 7)
linear_2: linear(transpose, p_attention_v_weight, p_attention_v_bias) -> (1, 30, 14)
view_3: view(linear_2, [1, 30, 2, 7]) -> (1, 30, 2, 7)
transpose_3: transpose(view_3, 1, 2) -> (1, 2, 30, 7)
mul: mul(transpose_1, b_table) -> (1, 2, 30, 7)
mul_1: mul(transpose_2, b_table) -> (1, 2, 30, 7)
sdpa: sdpa(mul, mul_1, transpose_3) -> (1, 2, 30, 7)
index_select: index_select(mul_1, 2, context_index) -> (1, 2, 22, 7)
index_select_1: index_select(transpose_3, 2, context_index) -> (1, 2, 22, 7)
transpose_4: transpose(sdpa, 1, 2) -> (1, 30, 2, 7)
view_4: view(transpose_4, [1, 30, 14]) -> (1, 30, 14)
linear_3: linear(view_4, p_attention_out_weight, p_attention_out_bias) -> (1, 30, 14)
add: add(transpose, linear_3) -> (1, 30, 14)
linear_4: linear(add, p_head_weight, p_head_bias) -> (1, 30, 12)
view_5: view(linear_4, [1, 2, 3, 5, 3, 2, 2]) -> (1, 2, 3, 5, 3, 2, 2)
permute: permute(view_5, [0, 4, 1, 2, 5, 3, 6]) -> (1, 3, 2, 3, 2, 5, 2)
clone: clone(permute) -> (1, 3, 2, 3, 2, 5, 2)
_unsafe_view: _unsafe_view(clone, [1, 3, 2, 6, 10]) -> (1, 3, 2, 6, 10)
return (_unsafe_view, index_select, index_select_1, linear_4)""",
    )


def test_partial(forms: Forms) -> None:
    assert_expected_inline(
        compact(forms.by_kind["partial"].module),
        """\
b_table: input -> (30, 7)
x: input -> (1, 3, 2, 6, 10)
active_index: input -> (8,)
past_key_values_0_key: input -> (1, 2, 22, 7)
past_key_values_0_value: input -> (1, 2, 22, 7)
past_output_0: input -> (1, 30, 12)
conv3d: conv3d(x, p_patch_weight, p_patch_bias, [1, 2, 2]) -> (1, 14, 2, 3, 5)
view: view(conv3d, [1, 14, 30]) -> (1, 14, 30)
index_select: index_select(view, 2, active_index) -> (1, 14, 8)
transpose: transpose(index_select, 1, 2) -> (1, 8, 14)
linear: linear(transpose, p_attention_q_weight, p_attention_q_bias) -> (1, 8, 14)
view_1: view(linear, [1, 8, 2, 7]) -> (1, 8, 2, 7)
transpose_1: transpose(view_1, 1, 2) -> (1, 2, 8, 7)
linear_1: linear(transpose, p_attention_k_weight, p_attention_k_bias) -> (1, 8, 14)
view_2: view(linear_1, [1, 8, 2, 7]) -> (1, 8, 2, 7)
transpose_2: transpose(view_2, 1, 2) -> (1, 2, 8, 7)
linear_2: linear(transpose, p_attention_v_weight, p_attention_v_bias) -> (1, 8, 14)
view_3: view(linear_2, [1, 8, 2, 7]) -> (1, 8, 2, 7)
transpose_3: transpose(view_3, 1, 2) -> (1, 2, 8, 7)
index_select_1: index_select(b_table, 0, active_index) -> (8, 7)
mul: mul(transpose_1, index_select_1) -> (1, 2, 8, 7)
mul_1: mul(transpose_2, index_select_1) -> (1, 2, 8, 7)
cat: cat([past_key_values_0_key, mul_1], 2) -> (1, 2, 30, 7)
cat_1: cat([past_key_values_0_value, transpose_3], 2) -> (1, 2, 30, 7)
sdpa: sdpa(mul, cat, cat_1) -> (1, 2, 8, 7)
transpose_4: transpose(sdpa, 1, 2) -> (1, 8, 2, 7)
view_4: view(transpose_4, [1, 8, 14]) -> (1, 8, 14)
linear_3: linear(view_4, p_attention_out_weight, p_attention_out_bias) -> (1, 8, 14)
add: add(transpose, linear_3) -> (1, 8, 14)
linear_4: linear(add, p_head_weight, p_head_bias) -> (1, 8, 12)
index_copy: index_copy(past_output_0, 1, active_index, linear_4) -> (1, 30, 12)
view_5: view(index_copy, [1, 2, 3, 5, 3, 2, 2]) -> (1, 2, 3, 5, 3, 2, 2)
permute: permute(view_5, [0, 4, 1, 2, 5, 3, 6]) -> (1, 3, 2, 3, 2, 5, 2)
clone: clone(permute) -> (1, 3, 2, 3, 2, 5, 2)
_unsafe_view: _unsafe_view(clone, [1, 3, 2, 6, 10]) -> (1, 3, 2, 6, 10)
return (_unsafe_view, index_copy)""",
    )


def test_reuse(forms: Forms) -> None:
    assert_expected_inline(
        compact(forms.by_kind["reuse"].module),
        """\
b_table: input -> (30, 7)
x: input -> (1, 3, 2, 6, 10)
past_output_0: input -> (1, 30, 12)
view_5: view(past_output_0, [1, 2, 3, 5, 3, 2, 2]) -> (1, 2, 3, 5, 3, 2, 2)
permute: permute(view_5, [0, 4, 1, 2, 5, 3, 6]) -> (1, 3, 2, 3, 2, 5, 2)
clone: clone(permute) -> (1, 3, 2, 3, 2, 5, 2)
_unsafe_view: _unsafe_view(clone, [1, 3, 2, 6, 10]) -> (1, 3, 2, 6, 10)
return (_unsafe_view,)""",
    )


def test_full_in_place(forms: Forms) -> None:
    assert_expected_inline(
        changes(forms, "full"),
        """\
- context_index: input -> (22,)
+ past_key_values_0_key: input -> (1, 2, 30, 7)
+ past_key_values_0_value: input -> (1, 2, 30, 7)
+ past_output_0: input -> (1, 30, 12)
- index_select: index_select(mul_1, 2, context_index) -> (1, 2, 22, 7)
- index_select_1: index_select(transpose_3, 2, context_index) -> (1, 2, 22, 7)
- return (_unsafe_view, index_select, index_select_1, linear_4)
+ copy_: copy_(past_key_values_0_key, mul_1)
+ copy__1: copy_(past_key_values_0_value, transpose_3)
+ copy__2: copy_(past_output_0, linear_4)
+ return (_unsafe_view,)""",
    )


def test_partial_in_place(forms: Forms) -> None:
    assert_expected_inline(
        changes(forms, "partial"),
        """\
- past_key_values_0_key: input -> (1, 2, 22, 7)
+ past_key_values_0_key: input -> (1, 2, 30, 7)
- past_key_values_0_value: input -> (1, 2, 22, 7)
+ past_key_values_0_value: input -> (1, 2, 30, 7)
- conv3d: conv3d(x, p_patch_weight, p_patch_bias, [1, 2, 2]) -> (1, 14, 2, 3, 5)
- view: view(conv3d, [1, 14, 30]) -> (1, 14, 30)
- index_select: index_select(view, 2, active_index) -> (1, 14, 8)
+ view_6: view(x, [1, 3, 2, 1, 3, 2, 5, 2]) -> (1, 3, 2, 1, 3, 2, 5, 2)
+ remainder: remainder(active_index, 5) -> (8,)
+ floor_divide: floor_divide(active_index, 5) -> (8,)
+ remainder_1: remainder(floor_divide, 3) -> (8,)
+ floor_divide_1: floor_divide(floor_divide, 3) -> (8,)
+ remainder_2: remainder(floor_divide_1, 2) -> (8,)
+ permute_1: permute(view_6, [0, 2, 4, 6, 1, 3, 5, 7]) -> (1, 2, 3, 5, 3, 1, 2, 2)
+ index: index(permute_1, [None, remainder_2, remainder_1, remainder]) -> (1, 8, 3, 1, 2, 2)
+ view_7: view(index, [1, 8, 12]) -> (1, 8, 12)
+ view_8: view(view_7, [8, 12]) -> (8, 12)
+ view_9: view(p_patch_weight, [14, 12]) -> (14, 12)
+ t: t(view_9) -> (12, 14)
+ addmm: addmm(p_patch_bias, view_8, t) -> (8, 14)
+ view_10: view(addmm, [1, -1, 14]) -> (1, 8, 14)
+ transpose_5: transpose(view_10, 1, 2) -> (1, 14, 8)
+ clone_1: clone(transpose_5) -> (1, 14, 8)
- transpose: transpose(index_select, 1, 2) -> (1, 8, 14)
+ transpose: transpose(clone_1, 1, 2) -> (1, 8, 14)
- cat: cat([past_key_values_0_key, mul_1], 2) -> (1, 2, 30, 7)
- cat_1: cat([past_key_values_0_value, transpose_3], 2) -> (1, 2, 30, 7)
- sdpa: sdpa(mul, cat, cat_1) -> (1, 2, 8, 7)
+ index_copy_1: index_copy(past_key_values_0_key, 2, active_index, mul_1) -> (1, 2, 30, 7)
+ index_copy_2: index_copy(past_key_values_0_value, 2, active_index, transpose_3) -> (1, 2, 30, 7)
+ sdpa: sdpa(mul, index_copy_1, index_copy_2) -> (1, 2, 8, 7)
+ copy_: copy_(past_output_0, index_copy)
+ copy__1: copy_(past_key_values_0_key, index_copy_1)
+ copy__2: copy_(past_key_values_0_value, index_copy_2)
- return (_unsafe_view, index_copy)
+ return (_unsafe_view,)""",
    )


MOVES = {
    "view", "reshape", "permute", "transpose", "clone", "_unsafe_view", "unsqueeze", "squeeze", "getitem", "unbind",
    "select", "split_with_sizes", "cat", "unflatten", "stack", "wait_tensor",
}  # fmt: skip
"""Operators that copy or look at numbers otherwise. Versions of torch trace collectives with others of them."""


def test_partial_of_the_second_of_two_ranks(forms: Forms) -> None:
    """4 of the 8 active tokens, and of the attention one of the two heads."""
    form = write_form("partial", forms.program, forms.analysis, forms.plan, ranks=Ranks(1, 2, "0"))
    lines = [line.partition(": ")[2] for line in compact(form.module).splitlines()]
    steps = [line for line in lines if line and line.partition("(")[0] not in MOVES]
    shown = [f"{line.partition('(')[0]} ->{line.rpartition('->')[2]}" for line in steps if "input" not in line]
    reads = [line for line in compact(form.module).splitlines() if "input" in line]
    assert_expected_inline(
        "\n".join([*reads, *shown]),
        """\
b_table: input -> (30, 7)
x: input -> (1, 3, 2, 6, 10)
active_index: input -> (8,)
past_key_values_0_key: input -> (1, 1, 22, 7)
past_key_values_0_value: input -> (1, 1, 22, 7)
past_output_0: input -> (1, 30, 12)
slice -> (4,)
conv3d -> (1, 14, 2, 3, 5)
index_select -> (1, 14, 4)
linear -> (1, 4, 14)
linear -> (1, 4, 14)
linear -> (1, 4, 14)
index_select -> (4, 7)
mul -> (1, 2, 4, 7)
mul -> (1, 2, 4, 7)
all_to_all_single -> (2, 84)
sdpa -> (1, 1, 8, 7)
all_to_all_single -> (2, 1, 1, 4, 7)
linear -> (1, 4, 14)
add -> (1, 4, 14)
linear -> (1, 4, 12)
all_gather_into_tensor -> (96,)
index_copy -> (1, 30, 12)""",
    )


def test_reuse_in_place_is_the_same(forms: Forms) -> None:
    assert changes(forms, "reuse") == ""


def test_reuse_computes_no_token(forms: Forms) -> None:
    """By operator, and by reach: nothing in it depends on the model's input or on a weight."""
    graph = forms.by_kind["reuse"].module.graph
    targets = {node.target for node in graph.nodes if node.op == "call_function"}
    assert not targets & {aten.linear.default, aten.scaled_dot_product_attention.default, aten.conv3d.default}
    assert [node.name for node in graph.nodes if node.op == "placeholder" and node.users] == ["past_output_0"]


@pytest.mark.parametrize("kind", ["full", "partial", "reuse"])
def test_copied_nodes_keep_their_origin(forms: Forms, kind: str) -> None:
    known = {node.name: node for node in forms.program.module.graph.nodes}
    copies = [n for n in forms.by_kind[kind].module.graph.nodes if n.op == "call_function" and n.name in known]
    assert copies
    for node in copies:
        assert node.target is known[node.name].target
        assert node.meta["stack_trace"] == known[node.name].meta["stack_trace"]
        assert module_path(node) == module_path(known[node.name])


@pytest.mark.parametrize(("kind", "modules"), [("full", ["attention"] * 2), ("partial", ["", *["attention"] * 3, ""])])
def test_new_nodes_name_their_form_and_origin(forms: Forms, kind: str, modules: list[str]) -> None:
    known = {node.name for node in forms.program.module.graph.nodes}
    made = [n for n in forms.by_kind[kind].module.graph.nodes if n.op == "call_function" and n.name not in known]
    assert [module_path(node) for node in made] == modules
    for node in made:
        assert node.meta["hetcache"] == kind
        assert source_line(node).startswith(__file__)


# Normalisation: each pass does its job, and results stay the same to the bit.

X, NOTHING, COUNT = torch.randn(3, 5, 7), torch.empty(3, 0, 7), torch.arange(5)
END = torch.iinfo(torch.int64).max

Function = Callable[..., object]


def traced(function: Function, *inputs: torch.Tensor) -> GraphModule:
    module = make_fx(function, tracing_mode="fake")(*inputs)
    assert isinstance(module, GraphModule)
    return module


def operators(module: GraphModule) -> list[str]:
    return [node.target._opname for node in module.graph.nodes if node.op == "call_function"]


def same_bits(a: object, b: object) -> bool:
    pairs = zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True)
    return all(p.dtype == q.dtype and torch.equal(p, q) for p, q in pairs)


def asserted(x: torch.Tensor) -> torch.Tensor:
    aten._assert_tensor_metadata.default(x, None, None, torch.float32)
    aten._assert_async.msg((x == x).all(), "no number")
    return x.sin()


def unused(x: torch.Tensor) -> torch.Tensor:
    x.exp().cos()
    return x.sin()


def written(x: torch.Tensor, *slices: slice) -> torch.Tensor:
    """Zeros that are written over, slice by slice."""
    result = torch.zeros_like(x)
    for rows in slices:
        result = torch.slice_scatter(result, x[:, rows], 1, rows.start, rows.stop)
    return result.sin()


Pass = Callable[[GraphModule], PassResult]
EFFECTIVE: dict[str, tuple[Pass, Function, tuple[torch.Tensor, ...], list[str]]] = {
    "asserts": (drop_asserts, asserted, (X,), ["eq", "all", "sin"]),
    "padding by nothing": (drop_empty_operands, lambda x, y: torch.cat([y, x, y], 1).sin(), (X, NOTHING), ["sin"]),
    "whole slices": (drop_whole_slices, lambda x: aten.slice(aten.slice(x, 1, 0, END), 2).sin(), (X,), ["sin"]),
    "one copy": (drop_overwritten, lambda x: aten.copy(torch.zeros_like(x), x.sin()), (X,), ["zeros_like", "sin"]),
    "all slices": (
        drop_overwritten,
        lambda x: written(x, slice(3, 5), slice(0, 3)),
        (X,),
        ["zeros_like", "slice", "slice_scatter", "slice", "cat", "sin"],
    ),
    "equal expressions": (share_subexpressions, lambda x: x[1:].sin() * x[1:].sin(), (X,), ["slice", "sin", "mul"]),
    "equal keywords": (share_subexpressions, lambda x: [x.sum(1, dtype=torch.int8) for _ in "ab"], (X,), ["sum"]),
    "dead code": (drop_dead_code, unused, (X,), ["sin"]),
}


@pytest.mark.parametrize(("run", "function", "inputs", "left"), EFFECTIVE.values(), ids=EFFECTIVE)
def test_a_pass_does_its_job(run: Pass, function: Function, inputs: tuple[torch.Tensor, ...], left: list[str]) -> None:
    result = run(traced(function, *inputs))
    assert result.modified
    module = result.graph_module
    module.graph.lint()
    module.recompile()
    assert operators(module) == left
    assert same_bits(module(*inputs), function(*inputs))
    assert not run(module).modified


ALONE: dict[str, tuple[Pass, Function, tuple[torch.Tensor, ...]]] = {
    "no asserts": (drop_asserts, lambda x: x.sin(), (X,)),
    "two operands": (drop_empty_operands, lambda x: torch.cat([x, x], 1), (X,)),
    "an empty operand of another type": (drop_empty_operands, lambda x, y: torch.cat([x, y.double()], 1), (X, NOTHING)),
    "parts": (drop_whole_slices, lambda x: (x[1:], x[:, ::2]), (X,)),
    "some slices": (drop_overwritten, lambda x: written(x, slice(0, 3), slice(4, 5)), (X,)),
    "slices that overlap": (drop_overwritten, lambda x: written(x, slice(0, 3), slice(2, 5)), (X,)),
    "a copy to another type": (drop_overwritten, lambda x: aten.copy(torch.zeros(3, 5, 7).double(), x), (X,)),
    "a copy of a row": (drop_overwritten, lambda x: aten.copy(torch.zeros_like(x), x[0]), (X,)),
    "other arguments": (share_subexpressions, lambda x: (x[1:], x[:, 1:], x.sum(0), x.sum(0, True)), (X,)),
    "other keywords": (share_subexpressions, lambda x: (x.sum(0), x.sum(0, dtype=torch.float64)), (X,)),
    "1 and 1.0": (share_subexpressions, lambda x: (x + 1, x + 1.0), (COUNT,)),
    "0.0 and -0.0": (share_subexpressions, lambda x: (x / 0.0, x / -0.0), (X,)),
    "all of use": (drop_dead_code, lambda x: x.sin().cos(), (X,)),
}


@pytest.mark.parametrize(("run", "function", "inputs"), ALONE.values(), ids=ALONE)
def test_a_pass_leaves_the_rest_alone(run: Pass, function: Function, inputs: tuple[torch.Tensor, ...]) -> None:
    module = traced(function, *inputs)
    before = str(module.graph)
    result = run(module)
    result.graph_module.recompile()
    assert not result.modified
    assert str(result.graph_module.graph) == before
    assert same_bits(result.graph_module(*inputs), function(*inputs))


def test_random_numbers_are_not_shared() -> None:
    module = traced(lambda x: (torch.rand_like(x), torch.rand_like(x)), X)
    assert operators(share_subexpressions(module).graph_module) == ["rand_like", "rand_like"]


def everything(x: torch.Tensor, nothing: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Needs every pass, and some of them because of others."""
    a = torch.cat([asserted(x), nothing], 1)
    b = aten.slice.Tensor(asserted(x), 0, 0, END)
    return a * unused(a), b * unused(b)


def test_all_passes_together() -> None:
    module = normalise(traced(everything, X, NOTHING))
    assert operators(module) == ["sin", "sin", "mul"]
    assert same_bits(module(X, NOTHING), everything(X, NOTHING))


def test_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "new" / "graphs"
    monkeypatch.setenv("HETCACHE_DUMP", str(folder))
    normalise(traced(everything, X, NOTHING))
    names = ["0-given", *(f"{number}-{run.__name__}" for number, run in enumerate(PASSES, start=1))]
    written = sorted(folder.iterdir())
    assert [path.stem.split("-", 2)[2] for path in written] == names
    captured, tidy = written[0], written[-1]
    assert "aten.cat.default" in captured.read_text()
    assert "aten.cat.default" not in tidy.read_text()


def test_no_dump_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HETCACHE_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    normalise(traced(everything, X, NOTHING))
    assert list(tmp_path.iterdir()) == []
