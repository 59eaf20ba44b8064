"""What cannot be rewritten is refused: every reason at once, each with operator, module and source line."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile.forms import Forms
from hetcache_compile.passes import attention, dims, patches, query, rules

GRID, N = (2, 3, 5), 30
WIDTH, TEXT, BATCH, CHANNELS = 14, 11, 2, 3

Op = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def make_plan(grid: tuple[int, int, int] = GRID) -> hetcache.Plan:
    return hetcache.Plan.from_token_mask(np.arange(np.prod(grid)) % 3 == 0, grid)


class Block(nn.Module):
    def __init__(self, op: Op) -> None:
        super().__init__()
        self.op = op

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.op(x, text)


class Model(nn.Module):
    """Patches, self-attention, then one block for each operation, side by side on the tokens `[B, N, D]`."""

    def __init__(self, ops: Mapping[str, Op]) -> None:
        super().__init__()
        self.patch = nn.Conv3d(CHANNELS, WIDTH, (1, 2, 2), (1, 2, 2))
        self.blocks = nn.ModuleDict({name: Block(op) for name, op in ops.items()})

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(x, x, x)
        return [x, *(block(x, text) for block in self.blocks.values())]


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(BATCH, CHANNELS, GRID[0], GRID[1] * 2, GRID[2] * 2), torch.randn(BATCH, TEXT, WIDTH)


def reasons_of(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[hetcache.Refusal, ...]:
    with pytest.raises(hetcache.UnsupportedGraphError) as caught:
        hetcache.rewrite(model, make_plan(), args or inputs(), **kwargs)
    return caught.value.reasons


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, **kwargs)


ones = torch.ones
ADD_RULE = "add one to RULES in passes/rules.py"

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
    "attention_by_hand": (
        lambda x, _: (x @ x.mT).softmax(-1) @ x,
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
    "mask_for_each_token": (
        lambda x, text: attend(*[x.unflatten(2, (7, 2)).reshape(BATCH, N, 7, 2)] * 3, attn_mask=ones(7, 7)),
        "aten.scaled_dot_product_attention.default",
        "each token has a mask of its own",
    ),
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

# name: what a block does, the operator that no form can hold, why, and what would help
REFUSED: dict[str, tuple[Op, str, str, str]] = {
    "sort": (lambda x, _: x.sort(1)[0], "aten.sort.default", "no rule for this operator", ADD_RULE),
    "fft": (
        lambda x, _: torch.fft.rfft(x, dim=1).abs(),
        "aten.fft_rfft.default",
        "no rule for this operator",
        ADD_RULE,
    ),
    "dropout": (
        lambda x, _: F.dropout(x, 0.5, training=True),
        "aten.native_dropout.default",
        "it drops elements at random",
        "call model.eval() first",
    ),
    "attention_dropout": (
        lambda x, _: attend(x, x, x, dropout_p=0.5),
        "aten.scaled_dot_product_attention.default",
        "it drops elements at random",
        "call model.eval() first",
    ),
}


@pytest.fixture(scope="module")
def refusals() -> dict[str, hetcache.Refusal]:
    """Every reason of one model with all of `REFUSED`, by module path."""
    reasons = reasons_of(Model({name: op for name, (op, *_) in REFUSED.items()}))
    assert len({reason.module for reason in reasons}) == len(reasons)
    return {reason.module: reason for reason in reasons}


def test_every_reason_at_once(refusals: dict[str, hetcache.Refusal]) -> None:
    assert list(refusals) == [f"blocks.{name}" for name in REFUSED]


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, refusals: dict[str, hetcache.Refusal]) -> None:
    _, target, reason, help = REFUSED[name]
    refusal = refusals[f"blocks.{name}"]
    assert (refusal.op, refusal.reason, refusal.help) == (target, reason, help)
    check_place(refusal)


def check_place(refusal: hetcache.Refusal) -> None:
    assert "[token axis at dim " in refusal.operands
    assert refusal.source == f"{__file__}:{Block.forward.__code__.co_firstlineno + 1}: return self.op(x, text)"


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
    trees = [ast.parse(inspect.getsource(module)) for module in (attention, dims, patches, query, rules)]
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


class Mixer(nn.Module):
    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        y = 2 * x
        y = y + x.sort(1)[0]
        return y - x.kthvalue(2, 1, keepdim=True)[0]


def test_two_bad_operations_are_one_error() -> None:
    model = Model({})
    model.blocks["mixer"] = Mixer()
    with pytest.raises(hetcache.UnsupportedGraphError) as caught:
        hetcache.rewrite(model, make_plan(), inputs())
    line = Mixer.forward.__code__.co_firstlineno
    assert (
        str(caught.value)
        == f"""the graph cannot be rewritten, 2 reasons:
- aten.sort.default: no rule for this operator
    operands: add (2, 30, 14) [token axis at dim 1]
    module: blocks.mixer
    source: {__file__}:{line + 2}: y = y + x.sort(1)[0]
    help: add one to RULES in passes/rules.py
- aten.kthvalue.default: no rule for this operator
    operands: add (2, 30, 14) [token axis at dim 1]
    module: blocks.mixer
    source: {__file__}:{line + 3}: return y - x.kthvalue(2, 1, keepdim=True)[0]
    help: add one to RULES in passes/rules.py"""
    )


def test_the_same_model_without_them_is_accepted() -> None:
    """So each refusal above is for its operation alone."""
    model, args = Model({"fine": lambda x, text: attend(2 * x, text, text)}), inputs()
    output, _ = hetcache.rewrite(model, make_plan(), args).full(*args)
    torch.testing.assert_close(output, model(*args))


# Refusals of a whole model


class Patches(nn.Module):
    """Patches, then any function of the grid and the text."""

    def __init__(self, rest: Op) -> None:
        super().__init__()
        self.patch = nn.Conv3d(CHANNELS, WIDTH, (1, 2, 2), (1, 2, 2))
        self.rest = rest

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return self.rest(self.patch(x), text)


def no_patches(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    x = x.flatten(2).transpose(1, 2)
    return attend(x, x, x)


def other_order(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    x = x.transpose(2, 4).flatten(2).transpose(1, 2)
    return attend(x, x, x)


def two_videos(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    x = torch.cat([x, x], 2).flatten(2).transpose(1, 2)
    return attend(x, x, x)


def within_frames(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    frames = x.transpose(1, 2).flatten(0, 1).flatten(2).mT
    places = attend(frames, frames, frames).unflatten(0, (BATCH, 2)).transpose(1, 2).flatten(0, 1)
    return attend(places, places, places)


def only_the_type(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    x = x.flatten(2).transpose(1, 2)
    return text + attend(x, x, x).new_zeros(WIDTH)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Block(no_patches), "no token axis found: no patch embedding makes the token grid"),
        (Patches(other_order), "no token axis found: the grid is never flattened to tokens in the order (T', H', W')"),
        (Patches(two_videos), "no token axis found: the grid is never flattened to tokens in the order (T', H', W')"),
        (
            Patches(within_frames),
            "no attention sees all 30 tokens, the longest has 15 keys: attention within frames, places or windows "
            "leaves no context to cache",
        ),
        (
            Patches(lambda x, _: x.flatten(2).sin()),
            "no attention has keys and values along the token axis: there is no context to cache",
        ),
        (Patches(only_the_type), "no output depends on the tokens"),
    ],
    ids=["no patches", "another order", "two videos", "within frames", "no attention", "no output"],
)
def test_nothing_to_cache(model: nn.Module, reason: str) -> None:
    assert [refusal.reason for refusal in reasons_of(model)] == [reason]


def test_no_patches_names_token_inputs() -> None:
    assert reasons_of(Block(no_patches))[0].help == "name the packed inputs with token_inputs={'hidden_states': 1}"


class Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: torch.Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.calls


def test_a_model_that_changes_a_buffer() -> None:
    assert [r.reason for r in reasons_of(Counting(), torch.ones(3))] == ["the call changes its own state: calls"]


class Deciding(nn.Module):
    """Branches on what its weights make of the input; a branch on inputs alone is assumed, see `known`."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sin() if (x * self.scale).sum() > 0 else x.cos()


def test_a_model_that_decides_by_its_data() -> None:
    (refusal,) = reasons_of(Deciding(), torch.ones(3))
    assert refusal.reason.startswith("torch.export cannot capture it: ")
    assert "data-dependent" in refusal.reason
    assert refusal.module == "Deciding"


def test_a_plan_for_another_grid() -> None:
    message = "the plan's token grid is (2, 3, 7) but the model's patch embedding makes (2, 3, 5): make the plan for"
    with pytest.raises(hetcache.GridMismatchError, match=re.escape(message)):
        hetcache.rewrite(Model({}), make_plan((2, 3, 7)), inputs())


# Packed tokens


class Packed(nn.Module):
    """Takes tokens and gives tokens."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 3 * WIDTH) for _ in range(layers))

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = hidden_states
        for layer in self.layers:
            x = x + attend(*layer(x).chunk(3, -1))
            x = x + attend(x, text, text)
        return x


def packed_inputs() -> dict[str, torch.Tensor]:
    return {"hidden_states": torch.randn(BATCH, N, WIDTH), "text": torch.randn(BATCH, TEXT, WIDTH)}


@pytest.mark.parametrize("dim", [1, -2])
def test_packed_tokens_with_frozen_input(dim: int) -> None:
    torch.manual_seed(0)
    model, kwargs = Packed(layers=2), packed_inputs()
    forms = hetcache.rewrite(model, make_plan(), kwargs=kwargs, token_inputs={"hidden_states": dim})
    expected = model(**kwargs)
    full, cache = forms.full(**kwargs)
    partial, cache = forms.partial(cache, **kwargs)
    reuse, _ = forms.reuse(cache, **kwargs)
    for output in (full, partial, reuse):
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)


def test_packed_tokens_that_change() -> None:
    """One layer reads context that no other token has touched: active rows are exact, the others stay."""
    torch.manual_seed(0)
    model, old, plan = Packed(layers=1), packed_inputs(), make_plan()
    forms = hetcache.rewrite(model, plan, kwargs=old, token_inputs={"hidden_states": 1})
    _, cache = forms.full(**old)
    active = torch.from_numpy(plan.active_index)
    new = {**old, "hidden_states": old["hidden_states"].index_fill(1, active, 0.5)}
    expected = model(**old).index_copy(1, active, model(**new).index_select(1, active))
    partial, cache = forms.partial(cache, **new)
    reuse, _ = forms.reuse(cache, **new)
    torch.testing.assert_close(partial, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(reuse, expected, rtol=0, atol=1e-5)
    assert (partial - model(**old)).abs().max() > 0.1


@pytest.mark.parametrize("dim", [0, 2, 3, -4])
def test_packed_tokens_of_another_number(dim: int) -> None:
    message = f"the plan's token grid (2, 3, 5) has 30 tokens, but dim {dim} of the token input hidden_states"
    with pytest.raises(hetcache.GridMismatchError, match=re.escape(message)):
        hetcache.rewrite(Packed(1), make_plan(), kwargs=packed_inputs(), token_inputs={"hidden_states": dim})
