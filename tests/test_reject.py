"""What cannot be rewritten is refused: every reason at once, each with operator, module and source line."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from side_by_side import BATCH, CHANNELS, WIDTH, Block, Model, Op, attend, check_place, inputs, make_plan
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

import hetcache_compile as hetcache


def reasons_of(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[hetcache.Refusal, ...]:
    with pytest.raises(hetcache.UnsupportedGraphError) as caught:
        hetcache.rewrite(model, make_plan(), args or inputs(), **kwargs)
    return caught.value.reasons


ADD_RULE = "add one to RULES in passes/rules/table.py"

# name: what a block does, the operator that no form can hold, why, and what would help
REFUSED: dict[str, tuple[Op, str, str, str]] = {
    "cummax": (lambda x, _: x.cummax(1)[0], "aten.cummax.default", "no rule for this operator", ADD_RULE),
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
    "flex_attention": (
        lambda x, _: flex_attention(x[:, None], x[:, None], x[:, None]),
        "flex_attention",
        "it scores and masks keys by their places in the sequence, which are others among the active tokens",
        "use scaled_dot_product_attention, with an attn_mask if need be",
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


def test_a_model_that_exchanges_tensors_itself() -> None:
    """Its tokens are a share of them, as in diffusers' context parallelism: that is all there is to say of it."""
    c10d = torch.ops._c10d_functional

    def gathered(x: torch.Tensor, _: Any) -> torch.Tensor:
        return c10d.wait_tensor(c10d.all_gather_into_tensor(x, 2, "0"))[: len(x)]

    (refusal,) = reasons_of(Model({"gathered": gathered, "cummax": REFUSED["cummax"][0]}))
    assert refusal.reason == "the model itself exchanges tensors with other processes"
    assert refusal.op == "_c10d_functional.all_gather_into_tensor.default"
    assert "share the edit by `with hetcache.parallel(...):`" in refusal.help
    assert refusal.module == "blocks.gathered"


class Mixer(nn.Module):
    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        y = 2 * x
        y = y + x.cummax(1)[0]
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
- aten.cummax.default: no rule for this operator
    operands: add (2, 30, 14) [token axis at dim 1]
    module: blocks.mixer
    source: {__file__}:{line + 2}: y = y + x.cummax(1)[0]
    help: add one to RULES in passes/rules/table.py
- aten.kthvalue.default: no rule for this operator
    operands: add (2, 30, 14) [token axis at dim 1]
    module: blocks.mixer
    source: {__file__}:{line + 3}: return y - x.kthvalue(2, 1, keepdim=True)[0]
    help: add one to RULES in passes/rules/table.py"""
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
    """Branches on what its weights make of the input; a branch on inputs alone is assumed, see `assumed_values`."""

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
