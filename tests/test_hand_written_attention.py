"""Attention written by hand, in the ways that models write it: one operator to the passes, exact in every form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from freezing import frozen_outputs
from models_check import distance, random_plan, tensors, write
from side_by_side import BATCH, GRID, WIDTH, Model, N, Op, inputs, make_plan
from torch import Tensor, einsum, nn
from torch.fx import GraphModule, Node

import hetcache_compile as hetcache
from hetcache_compile.capture.capture import Program, capture
from hetcache_compile.capture.regional import capture_by_regions
from hetcache_compile.capture.rewrite import analysed
from hetcache_compile.passes.analysis.analyse import Analysis, analyse
from hetcache_compile.passes.analysis.flops import node_flops
from hetcache_compile.passes.analysis.fuse_attention import fuse_attention
from hetcache_compile.passes.forms.merge import MergeContext
from hetcache_compile.passes.ir.axis import Attend
from hetcache_compile.passes.ir.regions import regions_of

aten = torch.ops.aten
ATTENTION = aten.scaled_dot_product_attention.default

HEADS, SIZE = 2, WIDTH // 2
SCALE = 0.37
TOLERANCE = 3e-6  # relative to the largest value of the output


# What the variants share: queries, keys and values of tokens `[B, N, D]`, and heads in the three usual places.


def qkv(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x, x.flip(-1), x.sin()


def heads(x: Tensor) -> Tensor:
    """`[B, H, N, D]`."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(2)


def folded(x: Tensor) -> Tensor:
    """`[B * H, N, D]`."""
    return heads(x).reshape(-1, x.shape[1], SIZE).contiguous()


def unfolded(x: Tensor) -> Tensor:
    return joined(x.unflatten(0, (-1, HEADS)))


def bias(x: Tensor) -> Tensor:
    """A number for each query and key `[N, N]`."""
    place = torch.arange(x.shape[1])
    return -0.1 * (place[:, None] - 2 * place).abs().to(x.dtype)


def allowed(x: Tensor) -> Tensor:
    """Bool `[N, N]`; one query sees nothing."""
    place = torch.arange(x.shape[1])
    return ((place[:, None] + place) % 3 > 0) & (place[:, None] != 4)


def lowest(x: Tensor) -> float:
    return torch.finfo(x.dtype).min


# Products, scales and masks.


def by_matmul(change: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor] = lambda weights: weights) -> Op:
    """`matmul`, what is done to scores, `softmax`, what is done to weights, `matmul`."""

    def attend(x: Tensor, _: Tensor) -> Tensor:
        q, k, v = map(heads, qkv(x))
        return joined(after(change(q @ k.transpose(-1, -2)).softmax(-1)) @ v)

    return attend


def scaled_operands(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = map(heads, qkv(x))
    return joined(torch.matmul(q * SCALE**0.5, (k * SCALE**0.5).mT).softmax(dim=3) @ v)


def scaled_for_heads(x: Tensor, _: Tensor) -> Tensor:
    """In float32, by a tensor."""
    q, k, v = map(heads, qkv(x))
    scale = SCALE * torch.tensor([10.0, 1.3]).to(torch.promote_types(x.dtype, torch.float32))[:, None, None]
    kind = scale.dtype
    return joined(((q.to(kind) @ k.to(kind).mT) * scale).softmax(-1).to(x.dtype) @ v)


def keys_with_rows_last(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = qkv(x)
    keys = k.unflatten(-1, (HEADS, -1)).permute(0, 2, 3, 1)
    return joined((heads(q) @ keys).softmax(-1) @ heads(v))


def one_head_of_keys(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = qkv(x)
    return joined((heads(q) @ k[:, None, :, :SIZE].mT).softmax(-1) @ v[:, None, :, :SIZE])


def by_baddbmm(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = map(folded, qkv(x))
    empty = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=q.dtype)
    scores = torch.baddbmm(empty, q, k.transpose(-1, -2), beta=0, alpha=SCALE)
    return unfolded(torch.bmm(scores.softmax(dim=-1).to(x.dtype), v))


def by_baddbmm_masked(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = map(folded, qkv(x))
    mask = bias(x).expand(BATCH * HEADS, -1, -1)
    return unfolded(torch.bmm(torch.baddbmm(mask, q, k.mT, beta=1, alpha=SCALE).softmax(-1), v))


def masked_in_another_view(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = map(folded, qkv(x))
    scores = torch.bmm(q, k.mT).view(BATCH, HEADS, N, N) + bias(x)[None, None] * torch.tensor([1.0, 2.0])[:, None, None]
    return unfolded(torch.bmm(scores.view(BATCH * HEADS, N, N).softmax(-1), v))


def by_einsum(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = (t.unflatten(-1, (HEADS, -1)) for t in qkv(x))
    weights = (einsum("b i h d, b j h d -> b h i j", q, k) * SCALE).softmax(-1)
    return einsum("b h i j, b j h d -> b i h d", weights, v).reshape(x.shape)


def by_einsum_keys_first(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = map(heads, qkv(x))
    return joined(einsum("...jd,...ij->...id", v, einsum("...jd,...id->...ij", k, q).softmax(-1)))


def merged_at_once(x: Tensor, _: Tensor) -> Tensor:
    """A view of the result that its layout in the fast kernels does not have."""
    q, k, v = map(heads, qkv(x))
    out = ((q @ k.mT).softmax(-1) @ v).view(BATCH, HEADS * N, SIZE)
    return joined(out.unflatten(1, (HEADS, N)))


def without_heads(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = qkv(x)
    return torch.softmax(torch.bmm(q, k.mT) * SCALE, dim=2).bmm(v)


def by_exp(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = map(folded, qkv(x))
    scores = q @ k.mT
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return unfolded(weights / weights.sum(-1, keepdim=True) @ v)


def divided_at_last(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = map(folded, qkv(x))
    scores = torch.baddbmm(torch.empty(1, 1, 1), q, k.mT, alpha=SCALE, beta=0)
    largest, _ = torch.max(scores, -1, keepdim=True)
    weights = torch.exp(scores - largest.detach())
    return unfolded(torch.bmm(weights, v) / weights.sum(dim=-1, keepdim=True))


# As ComfyUI does it.


def basic(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Bool masks per key `[B, N]` fill scores, others `[N, N]` are added to them."""
    q, k, v = map(folded, qkv(x))
    scores = einsum("b i d, b j d -> b i j", q.float(), k.float()) * SIZE**-0.5
    if mask is not None and mask.dtype is torch.bool:
        per_head = mask.reshape(mask.shape[0], -1)[:, None].expand(-1, HEADS, -1).reshape(-1, 1, N)
        scores.masked_fill_(~per_head, -torch.finfo(scores.dtype).max)
    elif mask is not None:
        scores.add_(mask.reshape(1, 1, N, N).expand(BATCH, HEADS, -1, -1).reshape(-1, N, N))
    return unfolded(einsum("b i j, b j d -> b i d", scores.softmax(dim=-1).to(v.dtype), v))


def split(x: Tensor, rows: int, mask: Tensor | None = None) -> Tensor:
    """A loop over slices of queries writes into a tensor of zeros."""
    q, k, v = map(folded, qkv(x))
    result = torch.zeros(q.shape[0], q.shape[1], v.shape[2], dtype=q.dtype)
    for start in range(0, q.shape[1], rows):
        end = start + rows
        scores = einsum("b i d, b j d -> b i j", q[:, start:end].float(), k.float()) * SCALE
        if mask is not None:
            scores += mask[start:end]
        weights = scores.softmax(dim=-1).to(v.dtype)
        del scores
        result[:, start:end] = einsum("b i j, b j d -> b i d", weights, v)
    return unfolded(result)


def sub_quadratic(x: Tensor, rows: int, mask: Tensor | None = None, mask_rows: int | None = None) -> Tensor:
    """Chunks of queries are put together; keys come transposed."""
    mask_rows = mask_rows or rows
    q, k, v = map(folded, qkv(x))
    keys = k.transpose(1, 2)

    def chunk(start: int) -> Tensor:
        query = q[:, start : start + rows]
        scores = torch.baddbmm(torch.empty(1, 1, 1), query.float(), keys.float(), alpha=SCALE, beta=0)
        if mask is not None:
            place = start // rows * mask_rows
            scores += mask if mask.shape[-2] == 1 else mask[..., place : place + mask_rows, :]
        return torch.bmm(scores.softmax(dim=-1).to(v.dtype), v)

    chunks = [chunk(start) for start in range(0, N, rows)]
    return unfolded(chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=1))


FUSED: dict[str, Op] = {
    "plain": by_matmul(lambda s: s),
    "times": by_matmul(lambda s: SCALE * s),
    "over": by_matmul(lambda s: s / SIZE**0.5),
    "over a tensor": by_matmul(lambda s: s / torch.tensor([1.5, 2.5])[:, None, None]),
    "scaled operands": scaled_operands,
    "keys with rows last": keys_with_rows_last,
    "one head of keys": one_head_of_keys,
    "plus a mask": by_matmul(lambda s: s * SCALE + bias(s[0])[None]),
    "a mask plus": by_matmul(lambda s: torch.arange(s.shape[-1]) * 0.1 + s),
    "filled": by_matmul(lambda s: s.masked_fill(~allowed(s[0]), lowest(s))),
    "filled with less": by_matmul(lambda s: s.masked_fill(~allowed(s[0]), -1e9)),
    "plus a mask and filled": by_matmul(lambda s: (s + bias(s[0])).masked_fill(~allowed(s[0]), lowest(s))),
    "filled plus a mask": by_matmul(lambda s: s.masked_fill(~allowed(s[0]), lowest(s)) + bias(s[0])),
    "filled with infinity": by_matmul(lambda s: s.masked_fill(torch.arange(N) % 3 == 0, -torch.inf)),
    "where": by_matmul(lambda s: torch.where(allowed(s[0]), s, -1e4)),
    "where not": by_matmul(lambda s: torch.where(~allowed(s[0]), torch.full((), -1e4), s)),
    "dropout off": by_matmul(lambda s: s, lambda w: F.dropout(w, 0.5, training=False)),
    "dropout of nothing": by_matmul(lambda s: s, lambda w: F.dropout(w, 0.0, training=True)),
    "scaled for each head": scaled_for_heads,
    "types": by_matmul(lambda s: s.double() * SCALE, lambda w: w.float()),
    "baddbmm": by_baddbmm,
    "baddbmm of a mask": by_baddbmm_masked,
    "masked in another view": masked_in_another_view,
    "einsum": by_einsum,
    "einsum, keys first": by_einsum_keys_first,
    "merged at once": merged_at_once,
    "without heads": without_heads,
    "exp": by_exp,
    "divided at last": divided_at_last,
    "basic": lambda x, _: basic(x),
    "basic, keys masked": lambda x, _: basic(x, (torch.arange(N) % 3 > 0).expand(BATCH, -1)),
    "basic, plus a mask": lambda x, _: basic(x, bias(x)),
    "split once": lambda x, _: split(x, N),
    "split": lambda x, _: split(x, 7),
    "split with a mask": lambda x, _: split(x, 7, bias(x)),
    "sub-quadratic, one chunk": lambda x, _: sub_quadratic(x, N),
    "sub-quadratic": lambda x, _: sub_quadratic(x, 11),
    "sub-quadratic, keys masked": lambda x, _: sub_quadratic(x, 11, bias(x)[None, 3:4]),
    "sub-quadratic, plus a mask": lambda x, _: sub_quadratic(x, 11, bias(x)[None]),
}


def captured(op: Op, **models: Any) -> tuple[Model, Program]:
    torch.manual_seed(0)
    model = Model({"attention": op}).eval()
    return model, fused(capture(model, (), keywords()))


def fused(program: Program) -> Program:
    """What `analyse` does where it must; the tokens are born of the patches."""
    births = program.module.graph.find_nodes(op="call_function", target=aten.conv3d.default)
    fuse_attention(program.module, births)
    return program


def keywords() -> dict[str, Tensor]:
    x, text = inputs()
    return {"x": x, "text": text}


def attentions(program: Program) -> list[Node]:
    """All but the one of the model around it."""
    return program.module.graph.find_nodes(op="call_function", target=ATTENTION)[1:]


@pytest.mark.parametrize("op", FUSED.values(), ids=FUSED)
def test_it_is_one_operator_and_exact(op: Op) -> None:
    """On the inputs of the full step, and on new ones, with all inactive tokens cached and with half of them."""
    model, program = captured(op)
    (attention,) = attentions(program)
    analysis = analyse(program.module, GRID)
    assert len(analysis.of_type(Attend)) == 2
    assert analysis.whole == {}
    assert attention.meta["hetcache"] == "fuse_attention"
    assert max(errors(model, program, analysis)) < TOLERANCE


def errors(model: nn.Module, program: Program, analysis: Analysis) -> list[float]:
    """Of every form, as `models_check.check` measures them."""
    worst = []
    old, new = keywords(), keywords()
    for num_context in (N - 10, 10):
        plan = random_plan(GRID, 10, num_context, seed=1)
        forms = write(program, analysis, plan)
        with torch.no_grad():
            plain = model(**old)
            full, cache = forms.full(**old)
            partial, _ = forms.partial(cache, **old)
            reuse, _ = forms.reuse(cache, **old)
            worst += [distance(full, plain), distance(reuse, plain)]
            if num_context == N - 10:
                worst.append(distance(partial, plain))
            got, _ = forms.partial(cache, **new)
            worst.append(distance(tensors(got), frozen_outputs(program, analysis, plan, old, new)))
    return worst


# What stays as it is.


def shows_weights(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = map(heads, qkv(x))
    weights = (q @ k.mT).softmax(-1)
    return joined(weights @ v) + weights.amax((1, 3))[..., None]


def shows_scores(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = map(heads, qkv(x))
    scores = q @ k.mT
    return joined(scores.softmax(-1) @ v) + scores.amax((1, 3))[..., None]


def of_its_own_scores(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = map(heads, qkv(x))
    scores = q @ k.mT
    return joined((scores + scores).softmax(-1) @ v)


def masked_in_two_views(x: Tensor, _: Tensor) -> Tensor:
    """As attention in shifted windows: a bias for heads, then a mask for windows."""
    q, k, v = map(heads, qkv(x))
    scores = q @ k.mT + bias(x)[None].expand(HEADS, -1, -1)
    scores = scores.view(1, BATCH, HEADS, N, N) + bias(x).expand(BATCH, -1, -1)[:, None][None]
    return joined(scores.view(-1, HEADS, N, N).softmax(-1) @ v)


LEFT_ALONE: dict[str, Op] = {
    "masked in two views": masked_in_two_views,
    "filled twice": by_matmul(lambda s: s.masked_fill(~allowed(s[0]), -1e4).masked_fill(allowed(s[0]).mT, -1e9)),
    "filled, and a mask that counts": by_matmul(lambda s: s.masked_fill(~allowed(s[0]), -1e4) + bias(s[0])),
    "weights are shown": shows_weights,
    "scores are shown": shows_scores,
    "twice its scores": of_its_own_scores,
    "dropout": by_matmul(lambda s: s, lambda w: F.dropout(w, 0.5, training=True)),
    "over queries": lambda x, _: joined((heads(x) @ heads(x).mT).softmax(-2) @ heads(x)),
    "a cap": by_matmul(lambda s: 5 * torch.tanh(s / 5)),
    "a fill that leaves a weight": by_matmul(lambda s: s.masked_fill(~allowed(s[0]), -3.0)),
    "scaled for each key": by_matmul(lambda s: s * torch.arange(N)),
    "a mask that is scaled": by_matmul(lambda s: (s + bias(s[0])) * SCALE),
    "scaled by no positive number": by_matmul(lambda s: s * -SCALE),
    "weights are scaled": by_matmul(lambda s: s, lambda w: w * 2),
    "weights over one": by_matmul(lambda s: s, lambda w: w.cumsum(-1)),
    "a larger mask": lambda x, _: (x[:1] @ x[:1].mT + bias(x).expand(BATCH, -1, -1)).softmax(-1) @ x,
}


@pytest.mark.parametrize("op", LEFT_ALONE.values(), ids=LEFT_ALONE)
def test_anything_else_stays(op: Op) -> None:
    torch.manual_seed(0)
    model = Model({"attention": op}).eval()
    program = capture(model, (), keywords())
    before = str(program.module.graph)
    assert str(fused(program).module.graph) == before
    assert attentions(program) == []
    if op is not LEFT_ALONE["dropout"]:
        kwargs = keywords()
        with torch.no_grad():
            given = program.module(*program.flat_inputs((), kwargs))
            assert all(map(torch.equal, tensors(given), model(**kwargs)))


def test_attention_with_a_mask_of_tokens_is_computed_whole() -> None:
    _, program = captured(masked_by_tokens)
    assert len(attentions(program)) == 1
    (refusal,) = analyse(program.module, GRID).whole.values()
    assert refusal.reason == "its mask is computed from tokens"
    assert "return self.op(x, text)" in refusal.source


def masked_by_tokens(x: Tensor, _: Tensor) -> Tensor:
    q, k, v = map(heads, qkv(x))
    return joined((q @ k.mT + x[:, None, None, :, 0]).softmax(-1) @ v)


def two_in_another_order(x: Tensor, _: Tensor) -> Tensor:
    """The first softmax is used last; both have one mask."""
    q, k, v = map(heads, qkv(x))
    mask = ~allowed(x)
    first, second = ((a @ b.mT).masked_fill(mask, -1e4).softmax(-1) for a, b in ((q, k), (k, q)))
    after = second @ v
    return joined(first @ after.sin())


def a_mask_for_two(x: Tensor, _: Tensor) -> Tensor:
    """Three dims become four where it is used last, first."""
    mask = bias(x)[None]
    return basic(split(x, 7, mask[0]) + sub_quadratic(x, N, mask), mask[0]) + sub_quadratic(x.cos(), 11, mask)


@pytest.mark.parametrize(("op", "count"), [(two_in_another_order, 2), (a_mask_for_two, 4)])
def test_several_that_share_operands(op: Op, count: int) -> None:
    model, program = captured(op)
    assert len(attentions(program)) == count
    analysis = analyse(program.module, GRID)
    assert analysis.whole == {}
    assert max(errors(model, program, analysis)) < 2 * TOLERANCE


def test_slices_with_other_masks_are_not_joined() -> None:
    """One row of the mask is for all queries of a slice. The slices are computed whole."""
    model, program = captured(lambda x, _: sub_quadratic(x, 15, bias(x)[None, :2], 1))
    assert len(attentions(program)) == 2
    assert max(errors(model, program, analyse(program.module, GRID))) < TOLERANCE


def test_attention_to_the_text_stays_exact() -> None:
    def to_text(x: Tensor, text: Tensor) -> Tensor:
        q, k, v = map(heads, (x, text, text.sin()))
        return joined((q @ k.mT).masked_fill(torch.arange(text.shape[1]) > 7, -1e4).softmax(-1) @ v)

    model, program = captured(to_text)
    assert attentions(program) == []
    analysis = analyse(program.module, GRID)
    assert len(analysis.of_type(Attend)) == 1
    assert max(errors(model, program, analysis)) < TOLERANCE


def test_only_attention_to_tokens_changes_and_only_where_it_must() -> None:
    """FULL is the model's bit for bit where nothing else has to change: text that attends to text, tokens to text."""

    def text_alone(x: Tensor, text: Tensor) -> Tensor:
        q, k, v = map(heads, qkv(text))
        text = joined((q @ k.mT).softmax(-1) @ v)
        return joined((heads(x) @ heads(text).mT).softmax(-1) @ heads(text))

    for ops, count in (({"text": text_alone}, 1), ({"text": text_alone, "tokens": FUSED["plain"]}, 2)):
        torch.manual_seed(0)
        model, kwargs = Model(ops).eval(), keywords()
        program = capture(model, (), kwargs)
        found, analysis = analysed(program, GRID, None)
        assert program.module.graph.find_nodes(op="call_function", target=ATTENTION)[1:] == []
        assert len(found.module.graph.find_nodes(op="call_function", target=ATTENTION)) == count
        assert (found.module is program.module) == (count == 1)
        with torch.no_grad():
            full, _ = write(found, analysis, random_plan(GRID, 10, N - 10, seed=1)).full(**kwargs)
            assert all(map(torch.equal, full[:2], model(**kwargs)[:2]))


# Rounding, and what else is counted.


HALF = ["plain", "plus a mask", "filled", "filled plus a mask", "baddbmm", "basic", "split", "scaled for each head"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.wide)])
@pytest.mark.parametrize("name", HALF)
def test_half_precision_loses_no_more_than_the_model(name: str, dtype: torch.dtype) -> None:
    """Against float64. The model's own inputs are the same numbers in both."""
    torch.manual_seed(1)
    x = (4 * torch.randn(BATCH, N, WIDTH)).to(dtype)
    with torch.no_grad():
        text = torch.zeros(1)
        program = capture(_Alone(FUSED[name]), (x, text), {})
        module = program.module
        fuse_attention(module, module.graph.find_nodes(op="placeholder"))
        assert module.graph.find_nodes(op="call_function", target=ATTENTION)
        truth = FUSED[name](x.double(), text)
        own, fused = FUSED[name](x, text), module(*program.flat_inputs((x, text), {}))[0]
    assert fused.dtype == own.dtype == dtype
    errors = [float((result.double() - truth).abs().mean()) for result in (own, fused)]
    assert errors[1] < 1.1 * errors[0]


class _Alone(nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.op(x, text)


def test_slices_of_queries_are_one_attention() -> None:
    _, program = captured(FUSED["split"])
    operators = {node.target for node in program.module.graph.nodes}
    assert not operators & {aten.slice_scatter.default, aten.copy.default, aten.cat.default, aten.zeros.default}


@pytest.mark.parametrize("name", ["plain", "baddbmm", "split"])
def test_it_counts_the_same_work(name: str) -> None:
    """Two products of `[N, D]` and `[N, D]` for each head."""
    _, program = captured(FUSED[name])
    (attention,) = attentions(program)
    assert node_flops(program.module)[attention] == 2 * (2 * BATCH * HEADS * N * N * SIZE)


# From end to end.


class Blocks(nn.Module):
    """Blocks with attention by hand, and no other."""

    def __init__(self, count: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, WIDTH, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleList(_Block() for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return x


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(split(self.norm(x), 11))


def test_blocks_are_still_captured_once() -> None:
    torch._dynamo.reset()
    found: list[tuple[Program, Program | None]] = []

    def backend(graph: GraphModule, args: Sequence[Any]) -> Any:
        regional = capture_by_regions(graph)
        found.append((fused(capture(graph, tuple(args), {})), fused(regional) if regional else None))
        return graph

    with torch.no_grad():
        torch.compile(Blocks(4).eval(), backend=backend, fullgraph=True)(inputs()[0])
    ((whole, regional),) = found
    assert regional is not None
    assert operators(regional) == operators(whole)
    assert operators(regional)[ATTENTION] == 4
    regions = regions_of(regional.module.graph, lambda node: node.meta.get("val"))
    assert max(Counter(region.key for region in regions).values()) == 4


def operators(program: Program) -> Counter[Any]:
    return Counter(node.target for node in program.module.graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("merging", ["boxes", "kmeans"])
def test_its_context_can_be_merged(merging: str) -> None:
    """Exact, where each cluster has one member."""
    model, _ = captured(FUSED["basic"])
    plan, kwargs, count = make_plan(), keywords(), N - N // 3
    forms = hetcache.rewrite(model, plan, kwargs=kwargs)
    by_kind = {kind: MergeContext(count, count, merging)(form) for kind, form in forms.by_kind.items()}
    merged = replace(forms, by_kind=by_kind, plan=replace(plan, context_cluster=np.arange(count), merging=merging))
    with torch.no_grad():
        expected, cache = merged.full(**kwargs)
        assert distance(merged.partial(cache, **kwargs)[0], expected) < TOLERANCE


def test_rewrite_and_the_backend() -> None:
    """Both give the same."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    model, plan = Blocks().eval(), make_plan()
    first, second = inputs()[0], inputs()[0]
    with torch.no_grad():
        forms = hetcache.rewrite(model, plan, (first,))
        full, cache = forms.full(first)
        partial, _ = forms.partial(cache, second)
        assert distance(full, model(first)) < TOLERANCE
        fast: Any = torch.compile(model, backend="hetcache", options={"inner": "eager"})
        plan = hetcache.Plan(
            GRID, plan.active_index, plan.context_index, np.zeros(N, np.uint8),
            (hetcache.StepKind.FULL, hetcache.StepKind.PARTIAL),
        )  # fmt: skip
        with hetcache.session(plan) as session:
            outputs = [fast(first), fast(second)]
    assert session.stats.steps == {"FULL": 1, "PARTIAL": 1, "REUSE": 0}
    assert distance(outputs, [full, partial]) < TOLERANCE
