"""A token axis that is cut apart, computed piece by piece, and put together again."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from freezing import frozen_outputs
from models_check import distance, random_plan
from torch import nn

import hetcache_compile as hetcache

GRID, N, TEXT, WIDTH, FIRST = (2, 3, 5), 30, 11, 14, 15
Op = Callable[[torch.Tensor], torch.Tensor]


class Model(nn.Module):
    """Attention over packed tokens with `text_rows` rows of text behind them; in between, what a test does."""

    def __init__(self, op: Op, text_rows: int) -> None:
        super().__init__()
        self.op, self.text_rows = op, text_rows

    def forward(self, hidden_states: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = torch.cat([hidden_states, text[:, : self.text_rows]], 1)
        for _ in range(2):
            x = self.op(x)
            x = x + F.scaled_dot_product_attention(x, x.sin(), x.cos())
        return x[:, :N]


def inputs(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(1, rows, WIDTH, generator=generator) for name, rows in (("hidden_states", N), ("text", TEXT))
    }


def modulated(x: torch.Tensor) -> torch.Tensor:
    """The first frame has a scale and shift of its own."""
    normed = F.layer_norm(x, (WIDTH,))
    return torch.cat([normed[:, :FIRST] * 1.5 + 0.25, normed[:, FIRST:] * 0.5 - 0.25], 1)


def gated(x: torch.Tensor) -> torch.Tensor:
    """Two token tensors are cut at the same rows."""
    y = x.cos()
    return torch.cat([x[:, :FIRST] + 2 * y[:, :FIRST], x[:, FIRST:] - y[:, FIRST:]], 1)


def in_three(x: torch.Tensor) -> torch.Tensor:
    """Not at the frames, in other shapes on the way, and with values that the other rows cannot have."""
    heads = x[:, 7:20].unflatten(2, (7, 2)).transpose(1, 2).neg().transpose(1, 2).flatten(2)
    return torch.cat([(x[:, :7].abs()).log(), heads, x[:, 20:].abs().sqrt()], 1).nan_to_num()


def nested(x: torch.Tensor) -> torch.Tensor:
    x = torch.cat([x[:, :4], -x[:, 4:]], 1)
    return torch.cat([x[:, :9].sin(), x[:, 9:]], 1)


@pytest.mark.parametrize("text_rows", [0, TEXT])
@pytest.mark.parametrize("op", [modulated, gated, in_three, nested])
def test_pieces_are_exact(op: Op, text_rows: int) -> None:
    """On frozen inputs, and on new ones, where the whole model with its inactive tokens frozen is the reference."""
    model, plan = Model(op, text_rows), random_plan(GRID, 10, 20, 0)
    old, new = inputs(0), inputs(1)
    forms = hetcache.rewrite(model, plan, kwargs=old, token_inputs={"hidden_states": 1})
    assert not forms.analysis.whole
    full, cache = forms.full(**old)
    for output in (full, forms.partial(cache, **old)[0], forms.reuse(cache, **old)[0]):
        assert distance(output, model(**old)) <= 1e-5
    partial, _ = forms.partial(cache, **new)
    assert distance(partial, frozen_outputs(forms.program, forms.analysis, plan, old, new)) <= 1e-5
    assert distance(partial, full) > 0.1


def test_rows_outside_a_piece_may_be_no_numbers() -> None:
    """What a piece holds for the rows of others is never read."""

    def op(x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([x[:, :FIRST].abs() + 1, -x[:, FIRST:].abs() - 1], 1)
        return torch.cat([x[:, :FIRST].log(), x[:, FIRST:].neg().log()], 1)

    model = Model(op, 0)
    forms = hetcache.rewrite(model, random_plan(GRID, 10, 20, 0), kwargs=inputs(0), token_inputs={"hidden_states": 1})
    _, cache = forms.full(**inputs(0))
    assert distance(forms.partial(cache, **inputs(0))[0], model(**inputs(0))) <= 1e-5


def test_whole_runs_in_equal_parts() -> None:
    """Two runs of tokens one after the other, split where one ends; and where none does, computed whole."""
    model = Model(lambda x: torch.cat([x, x.cos()], 1).split(N, 1)[1] + torch.cat([x, x.sin()], 1).chunk(2, 1)[0], 0)
    plan = random_plan(GRID, 10, 20, 0)
    forms = hetcache.rewrite(model, plan, kwargs=inputs(0), token_inputs={"hidden_states": 1})
    assert not forms.analysis.whole
    _, cache = forms.full(**inputs(0))
    assert distance(forms.partial(cache, **inputs(0))[0], model(**inputs(0))) <= 1e-5
    cutting = Model(lambda x: x + torch.cat([x, x.cos()], 1).split(20, 1)[0].mean(1, keepdim=True), 0)
    forms = hetcache.rewrite(cutting, plan, kwargs=inputs(0), token_inputs={"hidden_states": 1})
    assert len(forms.analysis.whole) == 2
    _, cache = forms.full(**inputs(0))
    assert distance(forms.partial(cache, **inputs(0))[0], cutting(**inputs(0))) <= 1e-5


def test_a_repeat_that_knows_its_size() -> None:
    """torch.export writes the size of the result into it, which a partial form does not have."""
    model = Model(lambda x: x.repeat_interleave(2, 1).unflatten(1, (-1, 2))[:, :, 1], 0)
    forms = hetcache.rewrite(model, random_plan(GRID, 10, 20, 0), kwargs=inputs(0), token_inputs={"hidden_states": 1})
    assert not forms.analysis.whole
    _, cache = forms.full(**inputs(0))
    assert distance(forms.partial(cache, **inputs(0))[0], model(**inputs(0))) <= 1e-5


TABLE = torch.randn(1, FIRST, WIDTH)
MISUSED: dict[str, tuple[Op, int]] = {
    "a piece is left out": (lambda x: x[:, :FIRST], 2),
    "the other order": (lambda x: torch.cat([x[:, FIRST:], x[:, :FIRST]], 1), 4),
    "a piece twice": (lambda x: torch.cat([x[:, :FIRST], x[:, :FIRST]], 1), 2),
    "a row missing": (lambda x: torch.cat([x[:, :FIRST], x[:, FIRST + 1 :], x[:, :1]], 1), 6),
    "two pieces meet": (lambda x: torch.cat([x[:, :FIRST] + x[:, FIRST : 2 * FIRST], x[:, FIRST:]], 1), 6),
    "positional data of a piece": (lambda x: torch.cat([x[:, :FIRST] + TABLE, x[:, FIRST:]], 1), 4),
    "a piece is mixed": (lambda x: torch.cat([x[:, :FIRST].softmax(1), x[:, FIRST:]], 1), 4),
    "a piece of a piece": (lambda x: torch.cat([x[:, :FIRST][:, 3:], x[:, :3], x[:, FIRST:]], 1), 6),
    "every second row": (lambda x: torch.cat([x[:, ::2], x[:, 1::2]], 1), 4),
}


@pytest.mark.parametrize("name", MISUSED)
def test_pieces_used_in_another_way_are_computed_whole(name: str) -> None:
    op, count = MISUSED[name]
    model, plan = Model(lambda x: x + op(x).mean(1, keepdim=True), 0), random_plan(GRID, 10, 20, 0)
    forms = hetcache.rewrite(model, plan, kwargs=inputs(0), token_inputs={"hidden_states": 1})
    whole = list(forms.analysis.whole.values())
    assert [refusal.reason for refusal in whole] == ["it cuts the token axis"] * count
    full, cache = forms.full(**inputs(0))
    for output in (full, forms.partial(cache, **inputs(0))[0], forms.reuse(cache, **inputs(0))[0]):
        assert distance(output, model(**inputs(0))) <= 1e-5
