"""What looks across tokens is computed whole, for a reason that is said, and exactly."""

from __future__ import annotations

import ast
import inspect

import pytest
import torch
import torch.nn.functional as F
from side_by_side import BATCH, TEXT, WIDTH, Model, N, Op, attend, check_place, inputs, make_plan
from test_reject import REFUSED
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile.capture.rewrite import Forms
from hetcache_compile.passes.rules import attention, dims, indexing, patches
from hetcache_compile.passes.rules import rule as query
from hetcache_compile.passes.rules import table as rules

ones = torch.ones

# name: what a block does with tokens x and text, the operator that looks across tokens, and why it is computed whole
WHOLE: dict[str, tuple[Op, str, str]] = {
    "different_dims": (
        lambda x, _: (x @ ones(WIDTH, N)) + (x @ ones(WIDTH, N)).mT,
        "aten.add.Tensor",
        "its operands have different token axes",
    ),
    "empty_operand": (
        lambda x, _: torch.cat([x.mT, x.mT, torch.empty(0)], 1),
        "aten.cat.default",
        "an operand of size 0 meets the token axis of size 30",
    ),
    "layer_norm": (
        lambda x, _: F.layer_norm(x.mT, (N,)),
        "aten.layer_norm.default",
        "it normalises over the token axis",
    ),
    "group_norm": (
        lambda x, _: F.group_norm(x.mT, 2),
        "aten.group_norm.default",
        "it normalises over the token axis",
    ),
    "norm_weights": (
        lambda x, text: F.layer_norm(text @ ones(WIDTH, N), (N,), x[0, :, 0]),
        "aten.layer_norm.default",
        "its weights carry the token axis",
    ),
    "linear_over_tokens": (
        lambda x, _: F.linear(x.mT, ones(3, N)),
        "aten.linear.default",
        "it contracts the token axis",
    ),
    "linear_weight": (
        lambda x, text: F.linear(text, x[0]),
        "aten.linear.default",
        "its weight carries the token axis",
    ),
    "matmul_over_tokens": (
        lambda x, _: x.mT @ ones(N, 3),
        "aten.matmul.default",
        "it contracts the token axis",
    ),
    "attention_without_softmax": (
        lambda x, _: (x @ x.mT).relu() @ x,
        "aten.matmul.default",
        "each token meets each other token",
    ),
    "mixed_product": (
        lambda x, _: x[:, :, None] @ x.mT[:, None],
        "aten.matmul.default",
        "its operands have different token axes",
    ),
    "vector": (lambda x, _: ones(5, N) @ x[0, :, 0], "aten.matmul.default", "its right side carries the token axis"),
    "bias": (
        lambda x, text: torch.addmm(x[0, :, 0], ones(5, 3), ones(3, N)),
        "aten.addmm.default",
        "its bias carries the token axis",
    ),
    "outer": (
        lambda x, _: torch.outer(x[0, :, 0], x[1, :, 1]),
        "aten.outer.default",
        "each token meets each other token",
    ),
    "mean": (lambda x, _: x.mean(1), "aten.mean.dim", "it reduces over the token axis"),
    "norm": (lambda x, _: x.norm(dim=1), "aten.linalg_vector_norm.default", "it reduces over the token axis"),
    "softmax": (lambda x, _: x.softmax(1), "aten.softmax.int", "it mixes the rows of the token axis"),
    "cumsum": (lambda x, _: x.cumsum(1), "aten.cumsum.default", "it mixes the rows of the token axis"),
    "roll": (lambda x, _: x.roll(1, 1), "aten.roll.default", "it mixes the rows of the token axis"),
    "table": (
        lambda x, text: F.embedding((text[:, :, 0] > 0).long(), x[0]),
        "aten.embedding.default",
        "its table carries the token axis",
    ),
    "slice": (lambda x, _: x[:, 2:7], "aten.slice.Tensor", "it cuts the token axis"),
    "select": (lambda x, _: x[:, 0], "aten.select.int", "it cuts the token axis"),
    "slice_scatter": (
        lambda x, text: torch.slice_scatter(x, text, 1, 0, TEXT),
        "aten.slice_scatter.default",
        "it cuts the token axis",
    ),
    "pick_rows": (
        lambda x, _: x.index_select(1, torch.tensor([3, 1])),
        "aten.index_select.default",
        "it picks rows of the token axis",
    ),
    "pick_by_tokens": (
        lambda x, text: text.index_select(0, (x[0, :, 0] > 0).long()),
        "aten.index_select.default",
        "its index carries the token axis",
    ),
    "pick_by_several": (
        lambda x, _: x[torch.tensor([0, 1]), torch.tensor([0, 1])],
        "aten.index.Tensor",
        "it picks elements by several indices",
    ),
    "pick_at": (lambda x, _: x[:, torch.tensor([4, 4])], "aten.index.Tensor", "it picks rows of the token axis"),
    "pick_places": (
        lambda x, text: x.gather(1, (text > 0).long()),
        "aten.gather.default",
        "it picks rows of the token axis",
    ),
    "largest": (lambda x, _: x.topk(3, 1)[0], "aten.topk.default", "it mixes the rows of the token axis"),
    "add_at": (
        lambda x, text: x.scatter_add(1, (text > 0).long(), text),
        "aten.scatter_add.default",
        "it picks rows of the token axis",
    ),
    "histogram": (
        lambda x, _: ones(BATCH, 2, WIDTH).scatter_add(1, (x > 0).long(), x),
        "aten.scatter_add.default",
        "it reduces over the token axis",
    ),
    "add_by_tokens": (
        lambda x, _: ones(BATCH, 2, WIDTH).index_add(1, (x[0, :, 0] > 0).long(), ones(BATCH, N, WIDTH)),
        "aten.index_add.default",
        "its index carries the token axis",
    ),
    "product_with_bias": (
        lambda x, text: torch.baddbmm(x, ones(BATCH, N, TEXT), text),
        "aten.baddbmm.default",
        "its bias carries the token axis",
    ),
    "flat_repeat": (
        lambda x, _: x.repeat_interleave(2),
        "aten.repeat_interleave.self_int",
        "it flattens the token axis",
    ),
    "complex": (
        lambda x, _: torch.view_as_real(torch.view_as_complex(x.mT.unflatten(2, (15, 2)).contiguous())),
        "aten.view.default",
        "it mixes the token axis with other dims: (2, 14, 30) -> (2, 14, 15, 2)",
    ),
    "reflect": (
        lambda x, _: F.pad(x.mT, (1, 1), "reflect"),
        "aten.pad.default",
        "it repeats rows of the token axis",
    ),
    "lengths": (
        lambda x, text: torch.nn.utils.rnn.pad_sequence([x[0], text[0]]),
        "aten.pad_sequence.default",
        "it stacks tensors of several lengths",
    ),
    "mix_with_features": (
        lambda x, _: x.reshape(BATCH, WIDTH, N),
        "aten._unsafe_view.default",
        "it mixes the token axis with other dims: (2, 30, 14) -> (2, 14, 30)",
    ),
    "convolution": (
        lambda x, _: F.conv2d(x[:, None], ones(4, 1, 3, 3)),
        "aten.conv2d.default",
        "it convolves over the token axis",
    ),
    "convolution_weight": (
        lambda x, text: F.conv2d(text[:, None], x[0][:, None, None], stride=(1, WIDTH)),
        "aten.conv2d.default",
        "its weight carries the token axis",
    ),
    "causal": (
        lambda x, _: attend(x, x, x, is_causal=True),
        "aten.scaled_dot_product_attention.default",
        "a causal mask depends on the rows that are left out",
    ),
    "mask_of_tokens": (
        lambda x, text: attend(x, text, text, attn_mask=x[:, :, :TEXT]),
        "aten.scaled_dot_product_attention.default",
        "its mask is computed from tokens",
    ),
    "pool": (lambda x, _: F.avg_pool2d(x[:, None], 2), "aten.avg_pool2d.default", "it pools over the token axis"),
    "features": (
        lambda x, _: attend(x.mT, x.mT, x.mT),
        "aten.scaled_dot_product_attention.default",
        "its features lie along the token axis",
    ),
    "folded_keys": (
        lambda x, text: attend(text[:, :, :2], *[x.reshape(BATCH, N * 7, 2)] * 2),
        "aten.scaled_dot_product_attention.default",
        "its keys fold the token axis with another",
    ),
    "whole_values": (
        lambda x, _: attend(x, x, ones(BATCH, N, WIDTH)),
        "aten.scaled_dot_product_attention.default",
        "its keys and values carry the token axis in different ways",
    ),
    "ranks": (
        lambda x, text: attend(x, text[:, None], text[:, None]),
        "aten.scaled_dot_product_attention.default",
        "its queries, keys and values differ in their number of dims",
    ),
    "windows": (
        lambda x, _: attend(*[x.unflatten(1, (2, 15)).flatten(0, 1).unflatten(1, (5, 3)).flatten(0, 1)] * 3),
        "",
        "",
    ),
}


@pytest.fixture(scope="module")
def whole() -> tuple[nn.Module, Forms]:
    """One model with every operator of `WHOLE`."""
    torch.manual_seed(0)
    model = Model({name: op for name, (op, *_) in WHOLE.items()})
    return model, hetcache.rewrite(model, make_plan(), inputs())


@pytest.mark.parametrize("name", WHOLE)
def test_computed_whole_for_a_reason(name: str, whole: tuple[nn.Module, Forms]) -> None:
    _, target, reason = WHOLE[name]
    reasons = [r for r in whole[1].analysis.whole.values() if r.module == f"blocks.{name}"]
    if not target:  # a reshape of the whole grid, which ends the token axis for good
        assert reasons == []
        return
    assert (reasons[0].op, reasons[0].reason) == (target, reason)
    check_place(reasons[0])


def test_what_is_computed_whole_is_exact(whole: tuple[nn.Module, Forms]) -> None:
    """On frozen inputs every output, of operators of every kind, is that of the model itself."""
    model, forms = whole
    for seed in range(2):
        torch.manual_seed(seed)
        args = inputs()
        expected = model(*args)
        full, cache = forms.full(*args)
        partial, cache = forms.partial(cache, *args)
        reuse, _ = forms.reuse(cache, *args)
        for name, *outputs in zip(["attention", *WHOLE], expected, full, partial, reuse, strict=True):
            for output in outputs[1:]:
                torch.testing.assert_close(output, outputs[0], rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_every_answer_of_the_rules_is_among_them() -> None:
    trees = [ast.parse(inspect.getsource(module)) for module in (attention, dims, indexing, patches, query, rules)]
    returns = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Return)]
    texts = [c.value for r in returns for c in ast.walk(r) if isinstance(c, ast.Constant) and isinstance(c.value, str)]
    known = [*(reason for _, _, reason in WHOLE.values()), *(text for row in REFUSED.values() for text in row[2:])]
    missing = {text for text in texts if " " in text and not any(text in reason for reason in known)}
    # What no captured graph holds, because `normalise` names the dims that go; the oracle asks for them.
    assert missing == {
        "it squeezes the token axis",
        "it may drop the token axis when one token is active: name the dim to squeeze",
        "its complex numbers lie along the token axis",
        "it works along the token axis",
        "it has tokens in other dims than its rows",  # of attention operators that a user registers
    }
    assert len(set(texts)) > 25
