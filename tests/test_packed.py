"""Packed tokens: found, declared, or refused."""

from __future__ import annotations

import re

import pytest
import torch
from side_by_side import BATCH, TEXT, WIDTH, N, attend, make_plan
from torch import nn

import hetcache_compile as hetcache


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
