"""Packed tokens: found, declared, or refused."""

from __future__ import annotations

import re

import pytest
import torch
from side_by_side import BATCH, TEXT, WIDTH, N, attend, make_plan
from torch import nn

import hetcache_compile as hetcache
from hetcache_compile.capture.capture import capture


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


class ByPlaces(nn.Module):
    """Writes text and tokens into one sequence, at places that it is given, and reads the tokens out of it again."""

    def __init__(self, way: str = "index_copy") -> None:
        super().__init__()
        self.way = way
        self.layer = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(
        self, hidden_states: torch.Tensor, text: torch.Tensor, places: torch.Tensor, text_places: torch.Tensor
    ) -> torch.Tensor:
        x = hidden_states.new_zeros(len(hidden_states), len(places) + len(text_places), WIDTH)
        if self.way == "index_copy":
            x = x.index_copy(1, text_places, text).index_copy(1, places.to(torch.int64), hidden_states)
        elif self.way == "index_put":
            x[:, text_places] = text
            x[:, places + torch.zeros_like(places)] = hidden_states
        else:
            x = x.scatter_add(1, text_places[None, :, None].expand_as(text), text)
            x = x.scatter_add(-2, places[None, :, None].expand_as(hidden_states), hidden_states)
        x = attend(*self.layer(x).chunk(3, -1))
        return x.index_select(1, places) if self.way == "index_copy" else x[:, places]


def of_places(places: torch.Tensor) -> dict[str, torch.Tensor]:
    others = torch.ones(TEXT + N, dtype=torch.bool).index_fill(0, places, False).nonzero().flatten()
    return {**packed_inputs(), "places": places, "text_places": others}


@pytest.mark.parametrize("way", ["index_copy", "index_put", "scatter_add"])
@pytest.mark.parametrize("first", [0, 3, TEXT])
def test_a_sequence_that_is_packed_by_index(first: int, way: str) -> None:
    """Where the places are runs they are slices; the text may lie on both sides."""
    torch.manual_seed(0)
    model, inputs, plan = ByPlaces(way), of_places(first + torch.arange(N)), make_plan()
    forms = hetcache.rewrite(model, plan, kwargs=inputs, token_inputs={"hidden_states": 1})
    assert list(forms.program.assumed) == ["places", "text_places"]
    full, cache = forms.full(**inputs)
    torch.testing.assert_close(full, model(**inputs), rtol=0, atol=1e-6)
    active = torch.from_numpy(plan.active_index)
    new = {**inputs, "hidden_states": inputs["hidden_states"].index_fill(1, active, 0.5)}
    expected = model(**inputs).index_copy(1, active, model(**new).index_select(1, active))
    torch.testing.assert_close(forms.partial(cache, **new)[0], expected, rtol=0, atol=1e-5)
    moved = {**inputs, **{name: inputs[name].flip(0) for name in ("places", "text_places")}}
    with pytest.raises(hetcache.SessionError, match="captured for another value of places"):
        forms.full(**moved)


@pytest.mark.parametrize("way", ["index_copy", "index_put", "scatter_add"])
def test_a_sequence_that_is_packed_in_no_order(way: str) -> None:
    inputs = of_places(torch.randperm(TEXT + N, generator=torch.Generator().manual_seed(0))[:N])
    with pytest.raises(hetcache.UnsupportedGraphError, match=r"its index|several indices|picks rows|reduces"):
        hetcache.rewrite(ByPlaces(way), make_plan(), kwargs=inputs, token_inputs={"hidden_states": 1})


@pytest.mark.parametrize("shape", [(1, 3, WIDTH), (2, 3, 1), (2, 0, WIDTH)])
def test_what_is_added_to_a_part_of_the_rows_at_places(shape: tuple[int, ...]) -> None:
    """To one sample, to one feature, or to none: no slice of whole rows."""

    class Adds(nn.Module):
        def forward(self, x: torch.Tensor, text: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
            return x.scatter_add(1, places[None, :, None].expand_as(text), text)

    given = torch.zeros(2, 6, WIDTH), torch.ones(shape), torch.arange(shape[1])
    program = capture(Adds(), given, {})
    assert torch.equal(program.module(*program.flat_inputs(given, {}))[0], Adds()(*given))


def test_places_that_change_are_seen_in_a_session() -> None:
    torch.manual_seed(0)
    model, inputs = ByPlaces(), of_places(TEXT + torch.arange(N))
    other = of_places(torch.arange(N))
    options = {"inner": "eager", "token_inputs": {"hidden_states": 1}}
    fast = torch.compile(model, backend="hetcache", options=options)
    with torch.no_grad(), hetcache.session(make_plan()) as session:
        torch.testing.assert_close(fast(**inputs), model(**inputs), rtol=0, atol=1e-5)
        with pytest.warns(UserWarning, match="captured for another value of"):
            torch.testing.assert_close(fast(**other), model(**other), rtol=0, atol=1e-5)
        torch.testing.assert_close(fast(**inputs), model(**inputs), rtol=0, atol=1e-5)
    assert (len(session.stats.kinds), session.notices.refused_calls) == (2, 1)
